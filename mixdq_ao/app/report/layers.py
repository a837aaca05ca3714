"""Layer by layer: the map of bits over the network, and the table of sensitivities."""

from __future__ import annotations

from collections.abc import Mapping

from ...plan import LayerPlan, Plan
from ...search.sensitivity import LayerSensitivity
from .html import Html, breakable, join, section, tag
from .inputs import Inputs
from .names import block_of, block_rank, plan_label
from .reasons import Reasons, score
from .strip import scales, strip

BITS = (2, 4, 8, 16)
NONE = LayerPlan()


def layers_section(inputs: Inputs) -> Html:
    """The plan switch, a map for each plan, and the table (its bits and reasons follow the switch)."""
    if not inputs.plans and inputs.sensitivity is None:
        return Html()
    maps = [_map(inputs, k, plan) for k, plan in enumerate(inputs.plans.values())]
    return section(
        "layers",
        "Layer by layer",
        _switch(list(inputs.plans)) if inputs.plans else None,
        tag("h3", "Bits per layer") if maps else None,
        maps,
        _table(inputs),
    )


def plan_css(count: int) -> str:
    """Shows what belongs to the chosen plan, without a script; the first one in browsers that cannot."""
    rules = [f"body:has(#plan-{k}:checked) .p{k}{{display:revert}}" for k in range(count)]
    return "\n".join([".plan{display:none}", *rules, "@supports not selector(:has(a)){.p0{display:revert}}"])


def _switch(names: list[str]) -> Html:
    choices = [
        tag("label", tag("input", type="radio", name="plan", id=f"plan-{k}", checked=k == 0), plan_label(name))
        for k, name in enumerate(names)
    ]
    return tag("fieldset", tag("legend", "Plan"), choices, class_="switch")


def _map(inputs: Inputs, k: int, plan: Plan) -> Html:
    order = list(inputs.sensitivity.layers) if inputs.sensitivity else list(plan.layers)
    order += [n for n in plan.layers if n not in set(order)] if inputs.sensitivity else []
    blocks: dict[str, list[str]] = {}
    for name in (n for n in order if n in plan.layers):
        blocks.setdefault(block_of(name), []).append(name)
    rows = [
        tag("div", tag("dt", block), tag("dd", (_cell(inputs, n, plan.layers[n]) for n in names)))
        for block, names in sorted(blocks.items(), key=lambda item: block_rank(item[0]))
    ]
    four = sum(layer.act_bits == 4 for layer in plan.layers.values())
    note = f" {four} layers have 4-bit activations, which save no time on current hardware." if four else ""
    return tag(
        "div",
        tag("p", _summary(inputs, plan) + note),
        tag("div", _legend(), tag("dl", rows, class_="map"), class_="panel"),
        class_=f"plan p{k}",
    )


def _summary(inputs: Inputs, plan: Plan) -> str:
    counts = {b: sum(layer.weight_bits == b for layer in plan.layers.values()) for b in BITS}
    parts = ", ".join(f"{n} at {b} bit" for b, n in counts.items() if n)
    sized = inputs.sensitivity.layers if inputs.sensitivity else {}
    known = {n: sized[n].weight_size for n in plan.layers if n in sized}
    if len(known) < len(plan.layers) or not known:
        return f"{len(plan.layers)} layers: {parts}."
    mean = sum(plan.layers[n].weight_bits * w for n, w in known.items()) / sum(known.values())
    return f"{len(plan.layers)} layers, {mean:.2f} bits per weight on average: {parts}."


def _legend() -> Html:
    swatches = [tag("span", tag("b", str(b), class_=f"cell b{b}"), f"{b} bit weights") for b in BITS]
    marks = tag("span", tag("b", "8", class_="cell b8 a4"), "underlined: 4-bit activations")
    full = tag("span", tag("b", "8", class_="cell b8 a16"), "ringed: activations kept")
    return tag("p", swatches, marks, full, class_="legend")


def _cell(inputs: Inputs, name: str, layer: LayerPlan) -> Html:
    measured = inputs.sensitivity.layers.get(name) if inputs.sensitivity else None
    value = measured.weight_scores.get(layer.weight_bits) if measured else None
    extra = f", {score(measured, value)}" if measured and value is not None else ""
    special = (", BOS apart" if layer.bos else "") + (f", split at {layer.split}" if layer.split else "")
    hint = f"{name}: weight {layer.weight_bits} bit, activation {layer.act_bits} bit{special}{extra}"
    classes = f"cell b{layer.weight_bits} a{layer.act_bits}"
    target = f"#{anchor(name)}" if measured else None
    return tag("a" if target else "span", str(layer.weight_bits), href=target, class_=classes, title=hint)


def anchor(name: str) -> str:
    return "layer-" + "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def _table(inputs: Inputs) -> Html:
    if inputs.sensitivity is None:
        return Html()
    layers, reasons = inputs.sensitivity.layers, Reasons(inputs.sensitivity)
    weight_bits = [b for b in BITS if any(b in v.weight_scores for v in layers.values())]
    act_bits = [b for b in BITS if any(b in v.act_scores for v in layers.values())]
    columns = [
        "Layer",
        "Group",
        "Weights",
        *(f"W{b}" for b in weight_bits),
        *(f"A{b}" for b in act_bits),
        "Harm ← → none",
    ]
    columns += ["Bits", "Why"] if inputs.plans else []
    ranges = scales(layers)
    body = []
    for number, (name, layer) in enumerate(layers.items()):
        cells = [_score(layer, layer.weight_scores.get(b)) for b in weight_bits]
        cells += [_score(layer, layer.act_scores.get(b)) for b in act_bits]
        cells.append(tag("td", strip(layer, ranges.get(layer.group))))
        cells += _chosen(name, inputs.plans, reasons) if inputs.plans else []
        size_cell = tag("td", f"{layer.weight_size:,}".replace(",", "\u2009"), data_sort=layer.weight_size)
        head = tag("th", breakable(name), scope="row", data_sort=number)
        body.append(tag("tr", head, tag("td", layer.group), size_cell, cells, id=anchor(name)))
    header = tag(
        "thead",
        tag("tr", (tag("th", c, scope="col", data_sortable=c not in columns[-3:-2] + ["Why"]) for c in columns)),
    )
    table = tag("table", header, tag("tbody", body), class_="layers", id="layer-table")
    return join(
        tag("h3", "Sensitivity of each layer"),
        tag("p", _EXPLAIN),
        _CONTROLS,
        tag("div", table, class_="scroll tall", tabindex="0", role="region", aria_label="Sensitivity of each layer"),
    )


_EXPLAIN = (
    "One layer at a time was rounded, its weight (W) or its input (A), with everything else in full precision. Content "
    "layers are judged by the SSIM of the pictures, quality layers by the signal-to-noise ratio of the model's output in "
    "dB; higher is less sensitive. A dot's colour is its bits, as above; the scale is shared within a group."
)
_CONTROLS = tag(
    "p",
    tag("label", "Find ", tag("input", type="search", id="find", placeholder="attn2.to_k")),
    tag("label", "Group ", tag("select", (tag("option", g, value=v) for g, v in (("all", ""), ("content", "content"), ("quality", "quality"))), id="group")),
    tag("span", "", id="shown", role="status"),
    class_="controls",
    hidden=True,
)  # fmt: skip


def _score(layer: LayerSensitivity, value: float | None) -> Html:
    if value is None:
        return tag("td", "–")
    text = f"{value:.4f}" if layer.group == "content" else f"{value:.1f}"
    return tag("td", text, data_sort=value)


def _chosen(name: str, plans: Mapping[str, Plan], reasons: Reasons) -> list[Html]:
    bits, why = [], []
    for k, plan in enumerate(plans.values()):
        layer = plan.layers.get(name, NONE)
        bits.append(
            tag(
                "span",
                tag("b", str(layer.weight_bits), class_=f"cell b{layer.weight_bits} a{layer.act_bits}"),
                class_=f"plan p{k}",
                data_sort=layer.weight_bits,
            )
        )
        why.append(tag("span", reasons.weight(name, layer), class_=f"plan p{k}"))
    return [tag("td", bits), tag("td", why, class_="why")]
