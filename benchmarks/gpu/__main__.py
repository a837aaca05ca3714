"""One step: ``python -m benchmarks.gpu STEP --out FOLDER [--dry-run]``."""

import argparse
from pathlib import Path

import torch

from . import kernels, results, unet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("step", help="kernels, unet-<pixels>-<batch> or report")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    if arguments.step == "report":
        print(results.report(arguments.out))
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device: use --dry-run to walk the code on the CPU")
    torch.manual_seed(0)
    with torch.no_grad():
        if arguments.step == "kernels":
            rows = kernels.sweep(dry=arguments.dry_run)
        else:
            name, pixels, batch = arguments.step.split("-")
            if name != "unet":
                parser.error(f"step {arguments.step!r}: expected kernels, unet-<pixels>-<batch> or report")
            rows = unet.compare(int(pixels), int(batch), dry=arguments.dry_run)
    results.write(arguments.out, arguments.step, rows, dry=arguments.dry_run)


if __name__ == "__main__":
    main()
