"""Which kinds of quantized layers are faster than unquantized ones on a machine, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..plan import Plan

KINDS = ("W8A8", "W4A8", "W2A8", "weights only")
ONLY_WEIGHTS = "weights only"
FASTER = 1.05


@dataclass(frozen=True, slots=True)
class Pace:
    """Whether layers of a kind are ``faster`` than the ``baseline`` ("float16", "bfloat16", "float32"), and why.

    ``measured``: {layer: speed relative to the fastest floating point} of the timed layers. If there are any,
    ``faster`` says whether all of them gained, and ``because`` is None if this contradicts the expected verdict.
    """

    kind: str
    baseline: str
    faster: bool
    because: str | None
    measured: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        what = "16 bit" if self.baseline != "float32" else "float32"
        if quick_and_slow := self._divided():
            return f"{self.kind}: faster than {what} at {quick_and_slow}; measured."
        verdict = "faster than" if self.faster else "no faster than"
        why = "" if self.because is None else f", because {self.because}"
        figures = " and ".join(f"{value:.2f} times the speed at {name}" for name, value in self.measured.items())
        return f"{self.kind}: {verdict} {what} here{why}{figures and f'; measured: {figures}'}."

    def _divided(self) -> str | None:
        """ "conv 320 (1.42 times), not at linear 1280 (1.04 times)"; None if all or no layers gained."""
        sides: dict[bool, list[str]] = {True: [], False: []}
        for name, value in self.measured.items():
            sides[gained(value)].append(f"{name} ({value:.2f} times)")
        quick, slow = (" and ".join(side) for side in sides.values())
        return f"{quick}, not at {slow}" if quick and slow else None


def gained(ratio: float) -> bool:
    """Whether ``ratio``, rounded as it is printed, is a gain of 5 % or more over floating point."""
    return round(ratio, 2) >= FASTER


def kind_of(weight_bits: int, act_bits: int) -> str:
    """ "W4A8", "weights only" or "16 bit". 4-bit activations are held in 8 bits and count as such."""
    if weight_bits == 16:
        return "16 bit"
    return ONLY_WEIGHTS if act_bits == 16 else f"W{weight_bits}A8"


def paces(facts: Mapping[str, Mapping[str, Any]]) -> list[Pace]:
    """A Pace for each of ``KINDS``, for the GPU if there is one, else the CPU. ``facts``: from ``machine.examine``."""
    gpu = facts["gpu"]
    of = _on_gpu if gpu["name"] is not None else _on_cpu
    return [of(kind, facts) for kind in KINDS]


def _on_gpu(kind: str, facts: Mapping[str, Mapping[str, Any]]) -> Pace:
    from inductor_kernels.tiles import TILES

    gpu, oldest = facts["gpu"], min(TILES)
    number = int(str(gpu.get("capability", "sm_0")).rpartition("_")[2])
    if gpu.get("rocm"):
        why = "no kernels are generated for ROCm: the operators unpack weights and multiply in floating point"
    elif facts["versions"]["triton"] is None:
        why = "Triton is not installed, which the kernels are generated with: pip install triton"
    elif number < oldest:
        why = f"{gpu['name']} is sm_{number} and kernels are generated from sm_{oldest} on"
    elif kind == ONLY_WEIGHTS:
        why = "the product itself is in floating point; unpacking comes on top, and only reading fewer bytes saves time"
    else:
        why = (
            "8-bit integers are multiplied on tensor cores. That holds for compiled models (torch.compile): eager, "
            "every operator unpacks and multiplies in floating point"
        )
        return Pace(kind, "float16", True, why)
    return Pace(kind, "float16", False, why)


def _on_cpu(kind: str, facts: Mapping[str, Mapping[str, Any]]) -> Pace:
    cpu = facts["cpu"]
    baseline = "bfloat16" if cpu["amx"] or cpu["bf16"] else "float32"
    if kind == ONLY_WEIGHTS:
        return Pace(kind, baseline, False, "weights are unpacked to float32 and the product is float32's")
    bits = kind[1]
    route = facts["int8 products"][f"{bits}-bit weights"]
    if route == "onednn-int8":
        unit = next((n for n in ("amx", "vnni") if cpu[n]), None)
        if unit is not None:
            return Pace(kind, baseline, True, f"oneDNN multiplies 8-bit integers with {unit.upper()}")
        return Pace(
            kind, baseline, True, f"products with {bits}-bit weights fit 16 bits, where oneDNN is exact without VNNI"
        )
    if route == "avx2":
        return Pace(
            kind, baseline, True, "a C kernel built here multiplies 16-bit pairs; by little: there is no VNNI or AMX"
        )
    if cpu["oneDNN"]:
        why = (
            "there is neither VNNI nor AMX, and no C compiler or no AVX2 for the kernel that would do: integer codes "
            "are multiplied in float32"
        )
    else:
        why = "this build of torch has no oneDNN: integer codes are multiplied in float32"
    return Pace(kind, baseline, False, why)


def as_measured(known: Iterable[Pace], ratios: Mapping[str, Mapping[str, float]]) -> list[Pace]:
    """Verdicts by measurement. ``ratios``: {layer: {kind: speed relative to the fastest floating point}}.

    A kind counts as faster if every layer gained; the reason is kept if every layer did what it says.
    """
    found = []
    for pace in known:
        own = {name: of[pace.kind] for name, of in ratios.items()}
        verdicts = {gained(value) for value in own.values()}
        why = pace.because if verdicts == {pace.faster} else None
        found.append(replace(pace, faster=verdicts == {True}, because=why, measured=own))
    return found


def plan_paces(plan: Plan, known: Iterable[Pace]) -> list[str]:
    """Sentences that count the layers of each kind in a plan, most first, and say how fast they are here."""
    counts = Counter(kind_of(layer.weight_bits, layer.act_bits) for layer in plan.layers.values())
    by_kind = {pace.kind: pace for pace in known}
    lines = []
    for kind, count in counts.most_common():
        said = str(by_kind[kind]) if kind in by_kind else f"{kind}: as fast as before, because the plan keeps them."
        lines.append(f"{count} layer{'s' * (count != 1)}, {said}")
    four = sum(layer.act_bits == 4 for layer in plan.layers.values())
    if four:
        lines.append(f"{four} of them have 4-bit activations, which take the time of 8-bit ones.")
    return lines
