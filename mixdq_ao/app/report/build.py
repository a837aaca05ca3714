"""Assembles the page."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from string import Template

from ...atomicfile import replacing
from .environment import environment_section
from .grid import grid_section
from .html import Html, join, tag
from .inputs import Inputs, read_inputs
from .layers import layers_section, plan_css
from .orthogonality import orthogonality_section
from .overview import ablation, overview
from .pareto import pareto_section
from .prediction import prediction_section
from .schedule import schedule_section

LINKS = {
    "results": "Results",
    "pictures": "Pictures",
    "ablation": "Ingredients",
    "pareto": "Size and quality",
    "prediction": "Prediction",
    "layers": "Layers",
    "schedule": "Steps",
    "orthogonality": "Correlation",
    "environment": "Environment",
}


def build(directory: str | os.PathLike[str]) -> Path:
    """Writes ``report.html`` from the results in ``directory``, in one file that needs no network. Returns its path.

    Reads results.json, sensitivity.json, plan_*.json, pareto.json, schedule*.json, orthogonality.json, and grid.png
    with grid.json; a missing file drops its section. Raises MixDQError if a file is broken or none is there.
    """
    directory = Path(directory)
    page = render(read_inputs(directory))
    path = directory / "report.html"
    with replacing(path) as file:
        file.write(page.encode())
    return path


def render(inputs: Inputs) -> str:
    """The page."""
    sections = {
        "results": overview(inputs),
        "pictures": grid_section(inputs.grid),
        "ablation": ablation(inputs),
        "pareto": pareto_section(inputs.points),
        "prediction": prediction_section(inputs),
        "layers": layers_section(inputs),
        "schedule": schedule_section(inputs.schedules, inputs.schedule_results),
        "orthogonality": orthogonality_section(inputs.orthogonality),
        "environment": environment_section(inputs.environment),
    }
    here = files("mixdq_ao.app.report")
    return Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        css=(here / "page.css").read_text(encoding="utf-8") + plan_css(inputs.plans),
        js=(here / "page.js").read_text(encoding="utf-8"),
        lede=tag("p", _lede(inputs), class_="lede"),
        links=join(*(tag("a", LINKS[name], href=f"#{name}") for name, html in sections.items() if html)),
        body=join(*sections.values()),
    )


def _lede(inputs: Inputs) -> Html:
    if not inputs.variants and not inputs.one_step:
        return Html("Measurements of one pipeline.")
    many = len([n for n in inputs.variants if n != "fp32"])
    what = f"{many} quantized variants of one pipeline" if many > 1 else "A quantized pipeline"
    return join(
        f"{what}, compared with the original. All draw the same held-out captions from the same noise; a classifier "
        "reads from each picture whether it shows what its caption says (",
        tag("em", "agreement"),
        "), and each is compared with the full-precision picture (",
        tag("em", "PSNR, SSIM"),
        ").",
    )
