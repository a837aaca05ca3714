"""Layer by layer: the map of bits over the network, and the table of sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...layer_plan import LayerPlan
from ...plan import Plan
from ..output import counted
from .html import Html, section, tag
from .inputs import Inputs
from .metric import metrics
from .names import anchor, block_of, block_rank, plan_label
from .sensitivity import sensitivity_table

BITS = (2, 4, 8, 16)


def layers_section(inputs: Inputs) -> Html:
    """The plan switch, a map for each plan, and the table (its bits and reasons follow the switch)."""
    if not inputs.plans and inputs.sensitivity is None:
        return Html()
    maps = [_map(inputs, k, plan) for k, plan in enumerate(inputs.plans.values())]
    return section(
        "layers",
        "Layer by layer",
        _switch(inputs.plans) if inputs.plans else None,
        tag("h3", "Bits per layer") if maps else None,
        maps,
        sensitivity_table(inputs),
    )


def plan_css(plans: Mapping[str, Plan]) -> str:
    """CSS that shows the parts of the chosen plan without a script; browsers without ``:has`` show the first choice."""
    rules = [f"body:has(#plan-{k}:checked) .p{k}{{display:revert}}" for k in range(len(plans))]
    fallback = f"@supports not selector(:has(a)){{.p{_first(plans)}{{display:revert}}}}"
    return "\n".join([".plan{display:none}", *rules, fallback])


def _first(plans: Mapping[str, Plan]) -> int:
    """The plan to show first: the one with the most bit widths."""
    widths = [len(_widths(plan)) for plan in plans.values()]
    return widths.index(max(widths)) if widths else 0


def _widths(plan: Plan) -> set[int]:
    return {layer.weight_bits for layer in plan.layers.values()} - {16}


def _switch(plans: Mapping[str, Plan]) -> Html:
    first = _first(plans)
    choices = [
        tag("label", tag("input", type="radio", name="plan", id=f"plan-{k}", checked=k == first), plan_label(name))
        for k, name in enumerate(plans)
    ]
    return tag("fieldset", tag("legend", "Plan"), choices, class_="switch")


def _map(inputs: Inputs, k: int, plan: Plan) -> Html:
    layers = list(inputs.sensitivity.layers) if inputs.sensitivity else list(plan.layers)
    layers += [n for n in plan.layers if n not in set(layers)] if inputs.sensitivity else []
    blocks: dict[str, list[str]] = {}
    for name in (n for n in layers if n in plan.layers):
        blocks.setdefault(block_of(name), []).append(name)
    order = sorted(blocks, key=block_rank)
    places = u_shape(order)
    rows = [
        tag(
            "div",
            tag("dt", block),
            tag("dd", (_cell(inputs, n, plan.layers[n]) for n in blocks[block])),
            class_=_side(block) if places else None,
            style=places.get(block),
        )
        for block in order
    ]
    four = sum(layer.act_bits == 4 for layer in plan.layers.values())
    note = f" {four} layers have 4-bit activations, which save no time on current hardware." if four else ""
    return tag(
        "div",
        tag("p", _summary(inputs, plan) + note),
        tag("div", _legend(), tag("dl", rows, class_="map u" if places else "map"), class_="panel"),
        class_=f"plan p{k}",
    )


def u_shape(blocks: Sequence[str]) -> dict[str, str]:
    """{block: its place in a grid}, as a UNet is drawn: down on the left, the middle below, up on the right, every
    block beside the one it shares shortcuts with. Empty for networks of another shape."""
    down, up = (sorted(b for b in blocks if b.startswith(f"{side}_blocks.")) for side in ("down", "up"))
    if not down or not up:
        return {}
    rows = {"input": (1, "1"), "output": (1, "2")}
    rows |= {block: (2 + i, "1") for i, block in enumerate(down)}
    rows |= {block: (2 + i, "2") for i, block in enumerate(reversed(up))}
    below = 2 + max(len(down), len(up))
    others = [b for b in blocks if b not in rows]
    rows |= {block: (below + i, "1 / -1") for i, block in enumerate(others)}
    return {block: f"grid-row:{row};grid-column:{column}" for block, (row, column) in rows.items()}


def _side(block: str) -> str:
    """ "down", "up", "input", ...: what a block's place in the drawing looks like."""
    known = ("down", "up", "mid", "input", "output")
    return next((side for side in known if block == side or block.startswith(f"{side}_block")), "other")


def _summary(inputs: Inputs, plan: Plan) -> str:
    counts = {b: sum(layer.weight_bits == b for layer in plan.layers.values()) for b in BITS}
    parts = ", ".join(f"{n} at {b} bit" for b, n in counts.items() if n)
    sized = inputs.sensitivity.layers if inputs.sensitivity else {}
    known = {n: sized[n].weight_size for n in plan.layers if n in sized}
    if len(known) < len(plan.layers) or not known:
        return f"{counted(len(plan.layers), 'layer')}: {parts}."
    mean = sum(plan.layers[n].weight_bits * w for n, w in known.items()) / sum(known.values())
    return f"{counted(len(plan.layers), 'layer')}, {mean:.2f} bits per weight on average: {parts}."


def _legend() -> Html:
    swatches = [tag("span", tag("b", str(b), class_=f"cell b{b}"), f"{b} bit weights") for b in BITS]
    marks = tag("span", tag("b", "8", class_="cell b8 a4"), "underlined: 4-bit activations")
    full = tag("span", tag("b", "8", class_="cell b8 a16"), "ringed: activations kept")
    return tag("p", swatches, marks, full, class_="legend")


def _cell(inputs: Inputs, name: str, layer: LayerPlan) -> Html:
    measured = inputs.sensitivity.layers.get(name) if inputs.sensitivity else None
    value = measured.weight_scores.get(layer.weight_bits) if measured else None
    judged = inputs.sensitivity and metrics(inputs.sensitivity)
    extra = f", {judged[measured.group].score(value)}" if judged and measured and value is not None else ""
    special = (", BOS apart" if layer.bos else "") + (f", split at {layer.split}" if layer.split else "")
    hint = f"{name}: weight {layer.weight_bits} bit, activation {layer.act_bits} bit{special}{extra}"
    classes = f"cell b{layer.weight_bits} a{layer.act_bits}"
    target = f"#{anchor(name)}" if measured else None
    return tag("a" if target else "span", str(layer.weight_bits), href=target, class_=classes, title=hint)
