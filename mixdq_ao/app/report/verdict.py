"""Plain sentences computed from the figures: what broke, what helped, what it saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .html import Html, tag
from .inputs import Figures
from .names import decibel, percent

NOTHING = Figures()
WITHIN = 0.01  # one point of agreement


@dataclass(frozen=True, slots=True)
class Verdict:
    """A card: what it is about, one big figure and its name, some sentences. ``tone``: "good", "bad" or "plain"."""

    title: str
    figure: str
    unit: str
    text: str
    tone: str


def verdicts(variants: Mapping[str, Figures]) -> list[Verdict]:
    """The verdicts that the available figures support."""
    full = variants.get("fp32", NOTHING)
    cards = [
        _naive(full, variants.get("naive_w8a8")),
        _bos(variants.get("naive_w8a8"), variants.get("bos_w8a8")),
        _mixed("MixDQ, 8 bit", full, variants.get("mixdq_w8a8"), None),
        _mixed("MixDQ, 4 bit", full, variants.get("mixdq_w4a8"), variants.get("bos_w4a8")),
        _mixed("MixDQ, 3 bit", full, variants.get("mixdq_w3a8"), None),
    ]
    return [card for card in cards if card is not None]


def _naive(full: Figures, naive: Figures | None) -> Verdict | None:
    if naive is None or naive.agreement is None:
        return None
    before = "" if full.agreement is None else f"; in full precision {percent(full.agreement)} do"
    broken = full.agreement is not None and naive.agreement < full.agreement - WITHIN
    start = "Rounding every layer to 8 bits breaks the pipeline" if naive.agreement <= 0.5 else "Every layer at 8 bits"
    text = f"{start}: {percent(naive.agreement)} of the pictures show what their caption says{before}."
    return Verdict("Naive 8 bit", percent(naive.agreement), "agreement", text, "bad" if broken else "plain")


def _bos(naive: Figures | None, bos: Figures | None) -> Verdict | None:
    if naive is None or bos is None or bos.agreement is None:
        return None
    gained = naive.agreement is not None and bos.agreement > naive.agreement + WITHIN
    verb = "brings agreement to" if gained else "leaves agreement at"
    text = f"Keeping the first text token (BOS) apart, with 8 bits still everywhere, {verb} {percent(bos.agreement)}"
    if naive.psnr is not None and bos.psnr is not None:
        text += f" and moves the pictures from {decibel(naive.psnr)} to {decibel(bos.psnr)} PSNR"
    return Verdict("BOS apart", percent(bos.agreement), "agreement", text + ".", "good" if gained else "plain")


def _mixed(title: str, full: Figures, mixed: Figures | None, uniform: Figures | None) -> Verdict | None:
    if mixed is None:
        return None
    parts = [part for part in (_quality(full, mixed), _peer(mixed, uniform), _cost(full, mixed)) if part]
    if not parts:
        return None
    close = full.agreement is not None and mixed.agreement is not None and mixed.agreement >= full.agreement - WITHIN
    figure, unit = (percent(mixed.agreement), "agreement") if mixed.psnr is None else (decibel(mixed.psnr), "PSNR")
    return Verdict(title, figure, unit, " ".join(parts), "good" if close else "plain")


def _quality(full: Figures, mixed: Figures) -> str | None:
    if mixed.agreement is None or full.agreement is None:
        return None
    points = f"{abs(100 * (full.agreement - mixed.agreement)):.1f}"
    side = "below" if mixed.agreement < full.agreement else "above"
    noun = "point" if points == "1.0" else "points"
    distance = "the same as full precision" if points == "0.0" else f"{points} {noun} {side} full precision"
    return f"Agreement is {percent(mixed.agreement)}, {distance}."


def _peer(mixed: Figures, uniform: Figures | None) -> str | None:
    if uniform is None or uniform.psnr is None or mixed.psnr is None:
        return None
    word = "closer to" if mixed.psnr >= uniform.psnr else "further from"
    gap = abs(mixed.psnr - uniform.psnr)
    return f"Its pictures are {gap:.1f} dB {word} the originals than with uniform 4 bit ({decibel(uniform.psnr)})."


def _cost(full: Figures, mixed: Figures) -> str | None:
    parts = []
    if full.weight_bytes and mixed.weight_bytes:
        parts.append(f"The weights take {100 * mixed.weight_bytes / full.weight_bytes:.0f} % of their fp32 bytes")
    if mixed.speedup is not None:
        fast = f"runs {mixed.speedup:.2f}× as fast as compiled fp32"
        slow = f"is slower than compiled fp32 here ({mixed.speedup:.2f}×)"
        parts.append(f"{'it' if parts else 'It'} {fast if mixed.speedup >= 1 else slow}")
    return f"{', and '.join(parts)}." if parts else None


def cards(variants: Mapping[str, Figures]) -> Html | None:
    """The verdicts as cards."""
    found = verdicts(variants)
    if not found:
        return None
    return tag("div", (_card(v) for v in found), class_="cards")


def _card(v: Verdict) -> Html:
    figure = tag("p", v.figure, tag("small", " ", v.unit), class_="figure")
    return tag("div", tag("h3", v.title), figure, tag("p", v.text), class_=f"card {v.tone}")
