"""The section on where the figures were measured and how to reproduce them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .html import Html, section, tag
from .names import significant

DEPTH = 4
STEPS = """make demo                      # everything on this page

mixdq calibrate PIPELINE --prompts prompts.txt --out calibration.json
mixdq analyze PIPELINE --prompts prompts.txt --calibration calibration.json --store results.jsonl --out sensitivity.json
mixdq allocate sensitivity.json --weight-bits 4 --calibration calibration.json --out plan_w4a8.json
mixdq quantize PIPELINE --plan plan_w4a8.json
mixdq generate PIPELINE --plan plan_w4a8.json --prompts prompts.txt --out pictures"""


def environment_section(environment: Mapping[str, Any]) -> Html:
    facts = ((name.removeprefix("packages "), value) for name, value in flatten(environment))
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
    return section(
        "environment",
        "Environment, and how to repeat this",
        tag("dl", rows, class_="facts") if rows else None,
        tag("p", "Speeds are ratios measured side by side in one process on this machine; other machines differ."),
        tag("pre", tag("code", STEPS)),
    )


def flatten(value: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Nested objects as "a b": text, four levels deep."""
    if isinstance(value, Mapping) and depth < DEPTH:
        for key, inner in value.items():
            yield from flatten(inner, f"{name} {key}".strip().replace("_", " "), depth + 1)
    elif isinstance(value, list) and depth < DEPTH:
        yield name, ", ".join(text for inner in value for _, text in flatten(inner, "", depth + 1))
    else:
        yield name, _text(value)


def _text(value: object) -> str:
    if isinstance(value, Mapping | list):
        return "..."
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return significant(value, 6) if isinstance(value, float) else str(value)
