"""The table of sensitivities: every layer's scores, a strip chart, and its bits under the chosen plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...layer_plan import LayerPlan
from ...plan import Plan
from .html import Html, breakable, join, tag
from .inputs import Inputs
from .metric import Metric, metrics
from .names import MISSING, anchor
from .reasons import Reasons
from .strip import scales, strip

EXPLAIN = (
    "One layer at a time was rounded, its weight (W) or its input (A), with everything else in full precision. Content "
    "layers are judged by the {content} of the pictures, quality layers by the signal-to-noise ratio of the model's "
    "output in dB; higher is less sensitive. A dot's colour is its bits, as above; the scale is shared within a group."
)
GROUPS = (("all", ""), ("content", "content"), ("quality", "quality"))
NONE = LayerPlan()


def sensitivity_table(inputs: Inputs) -> Html:
    """The table of layers; empty without a sensitivity file."""
    if inputs.sensitivity is None:
        return Html()
    layers = inputs.sensitivity.layers
    weight_bits = sorted({b for layer in layers.values() for b in layer.weight_scores})
    act_bits = sorted({b for layer in layers.values() for b in layer.act_scores})
    names = ["Layer", "Group", "Weights", *(f"W{b}" for b in weight_bits), *(f"A{b}" for b in act_bits)]
    header = [*((n, True) for n in names), ("worse ← → better", False)]
    header += [("Bits", True), ("Why these bits", False)] if inputs.plans else []
    judged = metrics(inputs.sensitivity)
    reasons, ranges = Reasons(inputs.sensitivity), scales(layers, judged)
    rows = [
        tag(
            "tr",
            tag("th", breakable(name), scope="row", data_sort=number),
            tag("td", layer.group),
            tag("td", f"{layer.weight_size:,}".replace(",", "\u2009"), data_sort=layer.weight_size),
            _scores(judged[layer.group], layer.weight_scores, weight_bits),
            _scores(judged[layer.group], layer.act_scores, act_bits),
            tag("td", strip(layer, ranges.get(layer.group), judged[layer.group])),
            _chosen(name, inputs.plans, reasons) if inputs.plans else None,
            id=anchor(name),
        )
        for number, (name, layer) in enumerate(layers.items())
    ]
    titles = (tag("th", text, scope="col", data_sortable=sortable) for text, sortable in header)
    table = tag("table", tag("thead", tag("tr", titles)), tag("tbody", rows), class_="layers", id="layer-table")
    title = "Sensitivity of each layer"
    box = tag("div", table, class_="scroll tall", tabindex="0", role="region", aria_label=title)
    return join(tag("h3", title), tag("p", EXPLAIN.format(content=judged["content"].name)), _controls(), box)


def _controls() -> Html:
    """The controls for filtering, which the script makes visible."""
    groups = tag("select", (tag("option", text, value=value) for text, value in GROUPS), id="group")
    return tag(
        "p",
        tag("label", "Find ", tag("input", type="search", id="find", placeholder="attn2.to_k")),
        tag("label", "Group ", groups),
        tag("span", "", id="shown", role="status"),
        class_="controls",
        hidden=True,
    )


def _scores(metric: Metric, scores: Mapping[int, float], bits: Iterable[int]) -> list[Html]:
    """Sorted by their place on the strip chart, so that SSIM and dB mix sensibly."""
    values = (scores.get(b) for b in bits)
    return [
        tag("td", MISSING, data_sort=None)
        if v is None
        else tag("td", f"{v:.{metric.digits}f}", data_sort=f"{metric.position(v):.4g}")
        for v in values
    ]


def _chosen(name: str, plans: Mapping[str, Plan], reasons: Reasons) -> list[Html]:
    bits, why = [], []
    for k, plan in enumerate(plans.values()):
        layer = plan.layers.get(name, NONE)
        cell = tag("b", str(layer.weight_bits), class_=f"cell b{layer.weight_bits} a{layer.act_bits}")
        bits.append(tag("span", cell, class_=f"plan p{k}", data_sort=layer.weight_bits))
        why.append(tag("span", reasons.weight(name, layer), class_=f"plan p{k}"))
    return [tag("td", bits), tag("td", why, class_="why")]
