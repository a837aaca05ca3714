"""The section on schedules: those found, where errors come from, quality against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...temporal.plan import TemporalPlan
from ...temporal.results import ScheduleResults
from ..output import counted
from .html import Html, join, section, tag
from .names import significant
from .schedule_charts import added_chart, kind_of, pareto_chart, step_chart
from .steps import levels_legend, steps_strip

ADD_UP = 0.9
"""The R squared (of logarithms) from which on single-step errors count as predicting a schedule."""


def schedule_section(schedules: Mapping[str, TemporalPlan], results: Sequence[ScheduleResults]) -> Html:
    """Strips of the schedules, then the charts of each file of results."""
    if not schedules and not results:
        return Html()
    intro = (
        "A step of the denoising loop runs at one level, and the levels share one copy of the weights. A schedule says "
        "which step runs at which; its cost is the mean of its steps' relative costs."
    )
    return section(
        "schedule",
        "A precision for every step",
        tag("p", intro),
        _strips(schedules),
        [_measured(r, many=len(results) > 1) for r in results],
    )


def _strips(schedules: Mapping[str, TemporalPlan]) -> Html | None:
    """All schedules; one legend for each set of levels."""
    parts: list[Html] = []
    shown: list[str] | None = None
    for name, plan in schedules.items():
        if list(plan.levels) != shown:
            shown = list(plan.levels)
            parts.append(levels_legend(plan.costs or dict.fromkeys(shown)))
        error = plan.metadata.get("error")
        facts = [counted(len(plan.steps), "step")]
        facts += [f"cost {plan.cost:.3g}"] if plan.cost is not None else []
        facts += [f"error {significant(error)}"] if isinstance(error, float) else []
        title = tag("h4", tag("b", name.replace("_", " ")), tag("small", ", ".join(facts)))
        parts.append(join(title, steps_strip(plan.steps, plan.levels)))
    return tag("div", parts, class_="panel") if parts else None


def _measured(results: ScheduleResults, *, many: bool) -> Html:
    title = f"{counted(results.steps, 'step')}: {results.metric}" if many else f"Measured: {results.metric}"
    checks = [added_chart(name, added) for name, added in results.additivity.items()]
    return join(
        tag("h3", title),
        levels_legend(results.levels),
        tag("h4", "Error of each step"),
        tag(
            "p",
            "One step at a cheaper level, all others at the most precise one. A hollow mark stands for an interval of "
            "steps that was measured together; its error is shared evenly.",
        ),
        step_chart(results),
        tag("h4", "Quality against cost"),
        tag("p", "Each dot is a measured schedule. Down and to the left is better."),
        pareto_chart(results),
        tag("details", tag("summary", "Named schedules as a table"), _table(results)),
        join(
            tag("h4", "Do the errors of steps add up?"),
            [tag("p", _verdict(name, added.r_squared, added.ratio)) for name, added in results.additivity.items()],
            tag("div", checks, class_="pair"),
        )
        if checks
        else None,
    )


def _verdict(name: str, r_squared: float, ratio: float) -> str:
    known = "is not defined, as all are equal" if math.isnan(r_squared) else f"is {r_squared:.3f}"
    figures = f"{name}: R² of the logarithms {known}, measured errors are {ratio:.2f} times the sum of their"
    if math.isnan(r_squared):
        return f"{figures} single steps (median). Whether that sum ranks schedules these do not tell."
    if r_squared >= ADD_UP:
        return f"{figures} single steps (median). The sum of single-step errors ranks schedules well."
    return (
        f"{figures} single steps (median). The sum of single-step errors is no good guide here; the search relies on "
        "what it measured."
    )


def _table(results: ScheduleResults) -> Html:
    rows = sorted(results.named.items(), key=lambda item: (results.cost(item[1]), results.measured[item[1]]))
    body = [
        tag(
            "tr",
            tag("th", tag("b", name) if kind_of(name) == "found" else name, scope="row"),
            tag("td", f"{results.cost(steps):.3f}"),
            tag("td", significant(float(results.measured[steps]))),
            tag("td", steps_strip(steps, results.levels, mini=True)),
        )
        for name, steps in rows
    ]
    head = tag(
        "thead", tag("tr", (tag("th", h, scope="col") for h in ("Schedule", "Cost", "Error", "First to last step")))
    )
    table = tag("table", head, tag("tbody", body), class_="figures")
    return tag("div", table, class_="scroll tall", tabindex="0", role="region", aria_label="Named schedules")
