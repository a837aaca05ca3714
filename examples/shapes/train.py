"""Trains the whole pipeline from scratch: `python -m examples.shapes.train`. A killed run continues when repeated.

Every stage runs in its own process; stages that do not depend on each other run at the same time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from examples.shapes.progress import Report, follow, write_atomically

ROOT = Path(__file__).resolve().parents[2]


def run_stage(name: str, out: Path, threads: int, parent: int) -> None:
    """Runs one stage in this process and records that it is done, its measurements and its seconds."""
    import torch
    import transformers

    from examples.shapes.stages import STAGES

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    start = time.monotonic()
    measured = STAGES[name](out, Report(_progress(out, name), parent))
    measured = {"seconds": time.monotonic() - start} | measured  # a stage's own count includes killed runs
    _done(out, name).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_done(out, name), json.dumps(measured, indent=1).encode())


def _done(out: Path, name: str) -> Path:
    return out / "done" / f"{name}.json"


def _progress(out: Path, name: str) -> Path:
    return out / "progress" / f"{name}.json"


def start(name: str, out: Path, threads: int) -> subprocess.Popen:
    """Starts the process of one stage."""
    _progress(out, name).unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "examples.shapes.train", "--out", str(out), "--stage", name]
    command += ["--threads", str(threads), "--parent", str(os.getpid())]
    return subprocess.Popen(command, env=environment, cwd=ROOT)


def run_group(names: list[str], out: Path) -> None:
    """Runs the stages of a group at the same time; the processes share the cores."""
    threads = max(1, (os.cpu_count() or 1) // len(names))
    codes = follow({name: (start(name, out, threads), _progress(out, name)) for name in names})
    for name in names:
        if codes[name] != 0:
            sys.exit(f"stage {name} ended with status {codes[name]}; run the same command again to continue")
        print(f"{name}: {_done(out, name).read_text()}", flush=True)


def ship(out: Path) -> None:
    """Replaces the weights in the repository by those of `out`."""
    here = Path(__file__).parent
    shutil.copytree(out / "pipeline", here / "pipeline", dirs_exist_ok=True)
    shutil.copy(out / "scorer.safetensors", here / "scorer.safetensors")


def main() -> None:
    """Runs all stages that are not done yet, or the one given by ``--only``."""
    from examples.shapes.stages import GROUPS, STAGES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "shapes", help="folder of everything that is made")
    parser.add_argument("--only", choices=STAGES, help="run this stage alone, also when it is done")
    parser.add_argument("--ship", action="store_true", help="then copy the weights into the repository")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=os.getppid(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    if options.stage:
        return run_stage(options.stage, out, options.threads, options.parent)
    for group in [(options.only,)] if options.only else GROUPS:
        again = options.only or group == GROUPS[-1]  # the last stage takes a second, and must read what was repeated
        waiting = [name for name in group if again or not _done(out, name).exists()]
        if waiting:
            run_group(waiting, out)
    if options.ship:
        ship(out)


if __name__ == "__main__":
    main()
