"""Error messages for requests without a plan: the budget asked, the least reachable, its cause, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import AllocationError
from .request import Demand, Request
from .split import smallest_budget
from .tables import Table


class Unreachable(AllocationError):
    """The budget is below that of any plan; a larger budget may be reachable."""


def too_small(request: Request, demand: Demand, table: Table, groups: list[str]) -> str:
    """The message for the first budget that even the smallest choices exceed."""
    if not isinstance(demand.budget, dict):
        if len(groups) < len(table.size):
            least = table.reach(groups[0])[0]
            return f"{_subject(demand, groups[0])}: the smallest reachable average is {least:.4g}" + _cause(
                request, demand
            )
        least = sum(table.reach(g)[0] * table.size[g] for g in groups) / sum(table.size.values())
        return _least(request, demand, None, _amount(demand, demand.budget), least, sum(table.size.values()))
    group = next((g for g in groups if table.reach(g)[0] > demand.budget[g]), groups[0])
    asked = f"{demand.budget[group]:.4g} bits on average"
    return _least(request, demand, group, asked, table.reach(group)[0], table.size[group])


def _least(request: Request, demand: Demand, group: str | None, asked: str, least: float, size: float) -> str:
    smallest = f"{least * size / 8 + demand.kept:.0f} bytes" if demand.in_bytes else f"{least:.4g} bits on average"
    advice = f"raise {demand.field} or offer smaller {demand.kind}_choices"
    return (
        f"{_subject(demand, group)}: {asked} asked, but the smallest reachable is {smallest}"
        f"{_cause(request, demand)}; {advice}"
    )


def no_split(
    request: Request, demand: Demand, average: float, ratio: float, reach: Mapping[str, tuple[float, float]]
) -> str:
    """The message where no split of one budget keeps both groups within the averages that their choices reach."""
    least = smallest_budget(ratio, demand.splits, reach)
    ranges = ", ".join(f"{group} {low:.4g} to {high:.4g}" for group, (low, high) in reach.items())
    asked = f"{_amount(demand, demand.budget)} asked" + (f" ({average:.4g} bits a weight)" if demand.in_bytes else "")
    smallest = "no budget does" if least is None else f"the smallest that does is {least:.4g} bits on average"
    tried = f"[{min(demand.splits):.4g}, {max(demand.splits):.4g}]"
    return (
        f"{demand.field}: {asked}, but no split k = content / quality in {tried} keeps both groups within what their "
        f"choices reach ({ranges} bits); {smallest}{_cause(request, demand)}; raise {demand.field}, give more "
        f"{demand.kind}_splits, offer smaller {demand.kind}_choices, or use objective='additive', which needs no split"
    )


def protected_alone(budget: float, kept: int, count: int) -> str:
    return (
        f"weight_bytes: {budget:.0f} bytes asked, but the {count} protected layers alone hold {kept} at 16 bits; "
        "raise weight_bytes or protect fewer layers"
    )


def out_of_time(request: Request, demand: Demand) -> str:
    return (
        f"{demand.field}: no plan found within time_limit={request.time_limit:g} seconds; "
        "raise time_limit, or ask for fewer splits"
    )


def _subject(demand: Demand, group: str | None) -> str:
    return demand.field if group is None else f"{demand.field} of {group} layers"


def _amount(demand: Demand, budget: object) -> str:
    assert isinstance(budget, float)
    return f"{budget + demand.kept:.0f} bytes" if demand.in_bytes else f"{budget:.4g} bits on average"


def _cause(request: Request, demand: Demand) -> str:
    choices = ", ".join(f"{group} {{{', '.join(map(str, bits))}}}" for group, bits in demand.choices.items())
    protected = len(request.protect)
    if not protected:
        return f" with choices {choices}"
    counted = f"hold {demand.kept} bytes of it" if demand.in_bytes else "not counted"
    return f" with choices {choices} ({protected} protected layers {counted})"
