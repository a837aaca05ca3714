"""Inputs of the commands: prompt files, pipelines, and option values parsed from text."""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MixDQError, SensitivityError
from ..jsonfile import read_object
from ..search.part import Part
from ..textfile import prompts_of, read_text

if TYPE_CHECKING:
    from ..plan import Plan


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: one per line, UTF-8 with or without a byte order mark; blank lines are skipped.

    Raises MixDQError if the file cannot be read, is not UTF-8, or holds no prompt.
    """
    return prompts_of(read_text(path, MixDQError, "; expected a text file with one prompt a line"), path)


def load_plan(path: Path, calibration: Path | None) -> Plan:
    """The plan in a file, with the ranges of a calibration file if one is given."""
    from ..plan import Plan
    from ..search.calibration import Calibration

    plan = Plan.load(path)
    return plan if calibration is None else plan.with_calibration(Calibration.load(calibration))


def plan_of(args: argparse.Namespace) -> Plan | None:
    """The plan of ``--plan`` and ``--calibration``, if any. Raises MixDQError for a calibration without a plan."""
    if args.plan is None and args.calibration is not None:
        raise MixDQError("--calibration fills in the ranges of a plan; give --plan too, or leave it out")
    return None if args.plan is None else load_plan(args.plan, args.calibration)


def load_pipeline(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    steps: Iterable[int] = (),
    quantizing: Any = None,
) -> Any:
    """Loads a diffusers pipeline from a directory, or by its name on the hub.

    device: "cpu", "cuda", ...; None for a GPU if there is one. dtype: "float32", "float16" or "bfloat16"; None for
    float32 on a CPU and float16 elsewhere. variant: of the files, such as "fp16". steps: numbers of denoising steps
    that the scheduler must support. quantizing: a MixDQConfig; each weight of the denoiser is then quantized as it
    is read, so that the full-precision denoiser is never in memory.
    Raises MixDQError naming the pipeline, or a number of steps that its scheduler does not support.
    """
    if looks_local(name) and not (Path(name) / "model_index.json").is_file():
        raise MixDQError(f"{name}: {_instead_of_a_pipeline(Path(name))}")
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from .. import models  # noqa: F401  (registers our format with diffusers)
    from .quiet import silence_loading_bars

    silence_loading_bars()
    device = _usable(device) if device else "cuda" if torch.cuda.is_available() else "cpu"
    wanted = getattr(torch, dtype or ("float32" if device.startswith("cpu") else "float16"))
    try:
        how: dict[str, Any] = {} if variant is None else {"variant": variant}
        how |= {} if quantizing is None else {"quantization_config": _for_denoiser(name, quantizing)}
        pipe = DiffusionPipeline.from_pretrained(name, dtype=wanted, **how).to(device=device, dtype=wanted)
    except MixDQError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, re.error) as e:
        raise MixDQError(f"{name}: cannot be loaded as a diffusers pipeline: {first_line(e)}") from e
    if getattr(pipe, "watermark", None) is not None:
        pipe.watermark = None  # it would be measured as an error
    pipe.set_progress_bar_config(disable=True)
    _check_steps(pipe, steps)
    return pipe


def _instead_of_a_pipeline(path: Path) -> str:
    """Says what a directory without a model_index.json holds, and for a denoiser how to make a pipeline of it."""
    wanted = "expected a directory with a model_index.json or a name like org/model"
    try:
        config = read_object(path / "config.json", MixDQError)
    except MixDQError:
        return f"is no pipeline, {wanted}"
    kind = str(config.get("_class_name", "model"))
    part = "transformer" if "Transformer" in kind else "unet" if "UNet" in kind else None
    if part is None:
        return f"holds one model ({kind}), {wanted}"
    load = "mixdq_ao.load_quantized" if "quantization_config" in config else f"diffusers.{kind}.from_pretrained"
    return (
        f"holds a denoiser ({kind}) without its pipeline, {wanted}; load the pipeline it was made from as pipe, put "
        f"pipe.{part} = {load}({str(path)!r}) into it, and pipe.save_pretrained it to a directory for this command"
    )


def _check_steps(pipe: Any, steps: Iterable[int]) -> None:
    """Raises MixDQError for more steps than the scheduler supports. A scheduler that refuses even one step needs more
    arguments than a number, and is not checked."""
    scheduler = copy.deepcopy(getattr(pipe, "scheduler", None))
    for count in steps:
        reason = _refusal(scheduler, count) if count > 1 and _refusal(scheduler, 1) is None else None
        if reason is not None:
            raise MixDQError(f"{count} denoising steps are more than {type(scheduler).__name__} takes: {reason}")


def _refusal(scheduler: Any, steps: int) -> str | None:
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, TypeError, AttributeError) as e:
        return first_line(e)
    return None


def _usable(device: str) -> str:
    """Returns ``device``. Raises MixDQError, before anything is loaded, if tensors cannot be created on it here."""
    import torch

    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("tensors of it hold no values; expected cpu, cuda, ...")
    except (RuntimeError, AssertionError) as e:  # an AssertionError if torch was built without it
        raise MixDQError(f"device {device!r} cannot be used here: {first_line(e)}") from e
    return device


def _for_denoiser(name: str, config: Any) -> Any:
    """A pipeline quantization config for the denoiser alone. Raises MixDQError if the pipeline has no denoiser."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.quantizers import PipelineQuantizationConfig

    parts: Any = DiffusionPipeline.load_config(name)
    part = next((n for n in ("unet", "transformer") if isinstance(parts.get(n), list) and parts[n][0]), None)
    if part is None:
        raise MixDQError(f"{name}: has neither a unet nor a transformer, which is what is quantized")
    return PipelineQuantizationConfig(quant_mapping={part: config})


def looks_local(name: str) -> bool:
    """Whether ``name`` is a path rather than a hub's ``org/model``."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def first_line(error: BaseException) -> str:
    """The message of an error as one line of at most 1000 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 1000 else text[:997] + "..."


def integers(text: str) -> list[int]:
    """ "1,4" as [1, 4], for argparse."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 1,4") from None


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def at_least(low: int) -> Callable[[str], int]:
    """A whole number with a lower bound, for argparse."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def between(low: int, high: int) -> Callable[[str], int]:
    """A whole number within bounds, for argparse."""

    def parse(text: str) -> int:
        if (value := at_least(low)(text)) > high:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {high}, expected a whole number of at most that")
        return value

    return parse


def multiple_of(unit: int) -> Callable[[str], int]:
    """A whole number of times ``unit``, at least once, for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < unit or int(text) % unit:
            raise argparse.ArgumentTypeError(f"{text!r} is no multiple of {unit}, expected {unit}, {2 * unit}, ...")
        return int(text)

    return parse


def part(text: str) -> str:
    """ "2/8", the second of eight, as it is, for argparse: ``Part.parse`` takes it."""
    try:
        Part.parse(text)
    except SensitivityError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


def budget(text: str) -> float | dict[str, float]:
    """ "4.5", or "content=5,quality=4", as a budget of ``allocate``."""
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.split("=") for part in text.split(",")]
        found = {group.strip(): float(bits) for group, bits in pairs}
        if len(found) < len(pairs):
            raise argparse.ArgumentTypeError(f"{text!r} names a group twice, expected content=BITS,quality=BITS")
        return found
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits, or content=BITS,quality=BITS") from None
