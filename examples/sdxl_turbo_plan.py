"""A plan for SDXL-Turbo, solved here from published sensitivities: python -m examples.sdxl_turbo_plan FOLDER

The sensitivities are the MixDQ authors' measurements (Zhao et al., "MixDQ: Memory-Efficient Few-Step Text-to-Image
Diffusion Models with Metric-Decoupled Mixed Precision Quantization", ECCV 2024, arXiv 2405.17873), read from the files
of their repository in FOLDER; those files are not part of this project. The plan is ours: 4 bits a weight on average
with the least summed error power, 8-bit activations but for the one layer in a hundred whose activation hurts most,
which keep 16 bits as in the paper. It has no ranges: calibrate with your prompts, then ``Plan.with_calibration``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from math import ceil
from pathlib import Path

from mixdq_ao import Plan, Sensitivity, allocate
from mixdq_ao.search.prediction import predicted_error

OUT = Path(__file__).parent / "plans" / "sdxl_turbo_w4a8.json"
SOURCE = "sensitivities of arXiv 2405.17873 (SDXL-Turbo); bits solved by mixdq_ao.allocate, objective additive"


def solve(sensitivity: Sensitivity, weight_bits: float = 4.0) -> Plan:
    """Solves for the plan. Raises AllocationError if no plan has so few bits."""
    found = allocate(sensitivity, weight_bits=weight_bits, act_bits=8, objective="additive")
    errors = {n: layer.act_errors[8] for n, layer in sensitivity.layers.items()}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[: ceil(0.01 * len(errors))]
    plan = found.plan.with_layers({n: replace(found.plan.layers[n], act_bits=16) for n in worst})
    metadata = {"source": SOURCE, "average_bits": dict(found.average_bits), "status": found.status}
    metadata |= {"predicted_error": predicted_error(sensitivity, plan), "activations_at_16_bits": worst}
    return replace(plan, metadata=metadata)


def read(folder: Path) -> Sensitivity:
    names = ("weight_ssim", "weight_sqnr", "act_ssim", "act_sqnr")
    files = {n: folder / f"{n.split('_')[0]}_sensitivity_{n.split('_')[1]}.yaml" for n in names}
    files |= {n: folder / f"{n}.yaml" for n in ("weight_ratio", "act_ratio")}
    return Sensitivity.from_mixdq_yaml(**files)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the authors' files")
    parser.add_argument("--weight-bits", type=float, default=4.0, help="on average (default 4)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    plan = solve(read(args.folder), args.weight_bits)
    plan.save(args.out)
    print(f"{args.out}: {len(plan.layers)} layers, predicted error {plan.metadata['predicted_error']:.3g}")


if __name__ == "__main__":
    main()
