"""Builds the wheel, installs it into a clean environment and uses it there. Run before a release, for each Python:

    python tests/smoke.py --python python3.12            # dependencies from the package index
    python tests/smoke.py --python python3.11 --reuse    # dependencies of the environment this script runs in

The environment has nothing of the repository but the wheel. What is checked: the files of the wheel, its metadata, that
`pip check` agrees (unless --reuse), `mixdq --help` and `mixdq doctor`, and a model quantized by a plan from a file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = {
    "mixdq_ao/py.typed",
    "mixdq_ao/app/report/page.html",
    "mixdq_ao/app/report/page.css",
    "mixdq_ao/app/report/page.js",
    "inductor_kernels/py.typed",
    "inductor_kernels/avx2.c",
    "inductor_kernels/templates/gemm.py.jinja",
    "inductor_kernels/templates/conv2d.py.jinja",
    "inductor_kernels/templates/dequantize.jinja",
    "inductor_kernels/templates/signature.jinja",
    "inductor_kernels/templates/unpack.jinja",
}
USE = """
import json, sys
from pathlib import Path
import torch
from torch import nn
import mixdq_ao
from mixdq_ao import LayerPlan, Plan, calibrate, mixdq_config, quantize_
from mixdq_ao.app.report import build

assert Path(sys.argv[1]) not in Path(mixdq_ao.__file__).parents, "the repository was imported, not the wheel"
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 16)
    def forward(self, x):
        return self.out(self.conv(x).mean((2, 3)))

torch.manual_seed(0)
net, x = Net().eval(), torch.randn(4, 8, 16, 16)
with torch.no_grad():
    full = net(x)
    calibration = calibrate(net, run=lambda: net(x))
    layers = {"conv": LayerPlan(weight_bits=8, act_bits=8), "out": LayerPlan(weight_bits=4, act_bits=8)}
    Plan(layers).with_calibration(calibration).save("plan_smoke.json")
    quantize_(net, mixdq_config(Plan.load("plan_smoke.json")))
    error = ((net(x) - full).norm() / full.norm()).item()
assert 0 < error < 0.1, error
print(json.dumps({"error": error, "report": str(build("."))}))
"""


def run(*command: object, cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed. Nothing of the caller's Python paths is passed on."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]}: code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build_wheel(out: Path) -> Path:
    """The wheel of a copy of the tracked and new files, so that no earlier build is mixed in."""
    source = out / "source"
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if name.startswith(("mixdq_ao/", "inductor_kernels/", "pyproject.toml", "README.md", "LICENSE")):
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source)
    return next(out.glob("*.whl"))


def check_wheel(wheel: Path) -> None:
    """Package data is inside, nothing else is, and the metadata says what is needed."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(metadata).decode())
    missing = sorted(DATA - names)
    assert not missing, f"{wheel.name}: lacks {missing}"
    tracked = {n for n in run("git", "ls-files", "mixdq_ao", "inductor_kernels", cwd=ROOT).splitlines() if "." in n}
    absent = sorted(n for n in tracked - names if (ROOT / n).is_file())
    assert not absent, f"{wheel.name}: lacks {absent}"
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"mixdq_ao", "inductor_kernels"}, tops
    assert said["Requires-Python"] == ">=3.11" and said["License-Expression"] == "Apache-2.0"
    named = {c.rpartition(" :: ")[2] for c in said.get_all("Classifier", []) if "Python :: 3." in c}
    assert named == {"3.11", "3.12"}, named  # those this script is run with
    needed = {line.split(";")[0].split(">")[0].strip() for line in said.get_all("Requires-Dist", [])}
    assert {"torch", "torchao", "diffusers", "transformers", "highspy", "safetensors"} <= needed, needed


def environment(folder: Path, python: str, reuse: bool) -> Path:
    """The interpreter of a new environment. reuse: it sees the packages installed beside this script's interpreter."""
    run(python, "-m", "venv", folder)
    interpreter = folder / "bin" / "python"
    if reuse:
        site = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        ours = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(site, "reused.pth").write_text(ours + "\n")
    return interpreter


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter to make the environment with")
    parser.add_argument("--reuse", action="store_true", help="reuse the dependencies installed here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        check_wheel(wheel)
        interpreter = environment(folder / "environment", args.python, args.reuse)
        pip = (interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, *(["--no-deps"] if args.reuse else ["-c", ROOT / "constraints.txt"]), wheel)
        if not args.reuse:
            run(interpreter, "-m", "pip", "check")
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        used = json.loads(run(interpreter, "-c", USE, ROOT, cwd=elsewhere))
        assert (elsewhere / "report.html").stat().st_size > 10_000
        mixdq = interpreter.parent / "mixdq"
        assert "quantize" in run(mixdq, "--help", cwd=elsewhere)
        facts = json.loads(run(mixdq, "doctor", "--json", cwd=elsewhere))
        assert facts["versions"]["mixdq-ao"] in wheel.name
        print(f"{wheel.name} on Python {facts['versions']['python']}: relative error {used['error']:.4f}; works")


if __name__ == "__main__":
    main()
