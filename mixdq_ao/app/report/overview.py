"""The first screen, and the ablation."""

from __future__ import annotations

from collections.abc import Mapping

from .html import Html, join, section, tag
from .inputs import Figures, Inputs
from .names import decibel, label, percent
from .table import figures_table
from .verdict import cards

CHAINS = {8: ("naive_w8a8", "bos_w8a8", "mixdq_w8a8"), 4: ("naive_w4a8", "bos_w4a8", "mixdq_w4a8")}
STEPS = ("one range for everything", "+ BOS apart", "+ bits chosen per layer")
NOTE = (
    "Best of the quantized variants in bold; a greyed one no longer draws what was asked and does not count. "
    "Activations of 4 bits, where a plan has them, use 16 levels of an 8-bit container: they cost quality and save no "
    "time on current hardware."
)


def overview(inputs: Inputs) -> Html:
    """Cards and the main table."""
    variants = inputs.variants or inputs.one_step
    if not variants:
        return Html()
    return tag(
        "section",
        cards(variants),
        figures_table(variants, "Measured, four steps" if inputs.variants else "Measured, one step"),
        tag("p", NOTE, class_="note"),
        _folded(inputs.one_step if inputs.variants else {}),
        id="results",
    )


def _folded(figures: Mapping[str, Figures]) -> Html | None:
    """The same table for one step, collapsed at first."""
    if not figures:
        return None
    return tag("details", tag("summary", "The same in one step"), figures_table(figures, "Measured, one step"))


def ablation(inputs: Inputs) -> Html:
    """The ablation: the ingredients one after another, and the metrics of the search against each other."""
    chains = [c for bits, names in CHAINS.items() if (c := _chain(inputs.variants, bits, names))]
    if not chains and not inputs.ablation:
        return Html()
    table = figures_table(inputs.ablation, "Search metrics compared") if inputs.ablation else None
    why = tag(
        "p",
        "The published search judges layers that decide content by SSIM of the picture and all others by SQNR of the "
        "model's output. Judging all by SQNR, or minimising the summed error, are the alternatives.",
    )
    return section(
        "ablation",
        "What each ingredient brings",
        tag("div", chains, class_="chains") if chains else None,
        join(why, table, _folded(inputs.ablation_one_step)) if table else None,
    )


def _chain(variants: Mapping[str, Figures], bits: int, names: tuple[str, ...]) -> Html | None:
    """Bars of PSNR (or agreement) of the variants that were measured, in order."""
    rows = [(n, step, variants[n]) for n, step in zip(names, STEPS, strict=True) if n in variants]
    if len(rows) < 2:
        return None
    use_psnr = all(f.psnr is not None for _, _, f in rows)
    values = [(f.psnr if use_psnr else f.agreement) or 0.0 for _, _, f in rows]
    top = max(*values, 1e-9)
    bars = [
        tag(
            "li",
            tag("span", step, title=label(name)),
            tag("span", tag("i", style=f"width:{100 * max(value, 0) / top:.1f}%"), class_="bar", aria_hidden="true"),
            tag("span", f"{decibel(f.psnr)}, agreement {percent(f.agreement)}", class_="value"),
        )
        for (name, step, f), value in zip(rows, values, strict=True)
    ]
    measure = "PSNR" if use_psnr else "agreement"
    return tag("div", tag("h3", f"{bits}-bit weights"), tag("ol", bars), tag("p", f"Bars: {measure}.", class_="note"))
