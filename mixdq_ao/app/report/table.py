"""The table of variants, with the best figure of each column emphasized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .html import Html, join, tag
from .inputs import Figures
from .names import describe, label, number, percent, significant, size


@dataclass(frozen=True, slots=True)
class Column:
    """``better``: +1 where higher is better, -1 where lower is, 0 where neither."""

    key: str
    title: str
    better: int
    show: Callable[[float | None], str]
    hint: str


COLUMNS = (
    Column("agreement", "Agreement", 1, percent, "pictures that show everything their caption says"),
    Column("psnr", "PSNR, dB", 1, lambda v: number(v, 1), "against the full-precision picture of the same noise"),
    Column("ssim", "SSIM", 1, lambda v: number(v, 4), "likewise; 1 is the same picture"),
    Column(
        "frechet", "Fréchet", -1, significant, "distance of all pictures' features from full precision; 0 is the same"
    ),
    Column("weight_bytes", "Weights", -1, size, "bytes of the tensors held, scales and zero points included"),
    Column("average_weight_bits", "W bits", 0, lambda v: number(v, 2), "average bits of a weight"),
    Column("average_act_bits", "A bits", 0, lambda v: number(v, 2), "average bits of an activation"),
    Column("latency_ms", "Latency, ms", -1, lambda v: number(v, 1), "one run of the compiled model"),
    Column("speedup", "Speed", 1, lambda v: "–" if v is None else f"{v:.2f}×", "against compiled fp32, same process"),
)
REFERENCE = "fp32"
FAILED = 0.5  # agreement, as a share of the reference's, below which a variant no longer draws what was asked


def figures_table(variants: Mapping[str, Figures], caption: str) -> Html:
    """A table with a row per variant, without columns that have no measurements."""
    columns = [c for c in COLUMNS if any(getattr(v, c.key) is not None for v in variants.values())]
    best = {c.key: best_names(variants, c) for c in columns}
    reference = variants.get(REFERENCE, Figures()).weight_bytes
    head = [tag("th", c.title, scope="col", title=c.hint) for c in columns]
    body = []
    for name, figures in variants.items():
        cells = [_cell(c, figures, name in best[c.key], reference) for c in columns]
        words = tag("th", tag("b", label(name)), tag("small", describe(name)), scope="row")
        state = "reference" if name == REFERENCE else "failed" if failed(variants, name) else None
        body.append(tag("tr", words, cells, class_=state))
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", tag("th", "Variant", scope="col"), head)),
        tag("tbody", body),
        class_="figures",
    )
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def failed(variants: Mapping[str, Figures], name: str) -> bool:
    """Whether a variant agrees with its captions less than half as often as the reference does."""
    own, reference = variants[name].agreement, variants.get(REFERENCE, Figures()).agreement
    return own is not None and own < FAILED * (1.0 if reference is None else reference)


def best_names(variants: Mapping[str, Figures], column: Column) -> set[str]:
    """The best working quantized variants of a column, as displayed; none if all look the same."""
    names = [n for n in variants if n != REFERENCE and not failed(variants, n)]
    values = {n: getattr(variants[n], column.key) for n in names}
    known = {n: v for n, v in values.items() if v is not None}
    if not column.better or len({column.show(v) for v in known.values()}) < 2:
        return set()
    top = column.show(max(known.values(), key=lambda v: column.better * v))
    return {n for n, v in known.items() if column.show(v) == top}


def _cell(column: Column, figures: Figures, best: bool, reference: float | None) -> Html:
    value = getattr(figures, column.key)
    text: Html | str = column.show(value)
    if best:
        text = join(tag("strong", text), tag("span", " best", class_="aside"))
    extra = None
    if column.key == "weight_bytes" and value is not None and reference:
        extra = tag("small", f"{100 * value / reference:.0f} % of fp32")
    if column.key == "agreement" and value is not None:
        extra = tag("span", tag("i", style=f"width:{100 * value:.1f}%"), class_="meter", aria_hidden="true")
    return tag("td", text, extra, class_="best" if best else None)
