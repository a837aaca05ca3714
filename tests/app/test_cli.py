"""The command line: what it accepts, its errors in one line, its exit codes, and that it starts at once."""

from __future__ import annotations

import copy
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixdq_ao.app import cli
from mixdq_ao.app.environment import environment
from mixdq_ao.errors import MixDQError
from mixdq_ao.layers import find_layers
from mixdq_ao.plan import LayerPlan, Plan
from mixdq_ao.search.calibration import Calibration
from mixdq_ao.search.moments import Moments
from mixdq_ao.search.sensitivity import Sensitivity
from tests.command import run

from .synthetic import sensitivity

PIPELINE = Path(__file__).parents[2] / "examples" / "shapes" / "pipeline"


def mixdq(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """The command in its own process."""
    command = [sys.executable, "-m", "mixdq_ao.app.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60, **options)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa large red circle\n\n  a small blue square  \n", encoding="utf-8")
    return path


@pytest.fixture
def scores(tmp_path) -> Path:
    path = tmp_path / "sensitivity.json"
    sensitivity(["conv_in", "mid_block.attn2.to_k", "up_blocks.0.ff.net.2", "conv_out"]).save(path)
    return path


def test_help_is_instant_and_imports_no_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = mixdq("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and all(name in shown.stdout for name in cli.COMMANDS)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    script = "import sys; from mixdq_ao.app import cli; cli.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], timeout=60).returncode == 0


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_shows_an_example(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"mixdq {command}" in out.partition("example:")[2]


KINDS = [
    *(("schedule", kind) for kind in ("search", "show", "export", "import")),
    *(("evaluate", kind) for kind in ("run", "real", "table", "prompts")),
    *(("import", kind) for kind in ("plan", "sensitivity")),
]


@pytest.mark.parametrize("words", [*((name,) for name in cli.COMMANDS if name != "completion"), *KINDS], ids=" ".join)
def test_examples_are_of_their_command_and_accepted(capsys, words):
    _, shown, _ = run(capsys, *words, "--help")
    program, *arguments = shlex.split(shown.partition("example:\n")[2], comments=True)
    assert program == "mixdq" and cli.parser().parse_args(arguments).command == words[0]
    assert tuple(arguments[: len(words)]) == words


@pytest.mark.parametrize("words", KINDS, ids=" ".join)
def test_kinds_of_commands_have_their_own_errors(capsys, words):
    """And --traceback, wherever it stands."""
    _, shown, _ = run(capsys, *words, "--help")
    assert "--traceback" in shown
    code, out, err = run(capsys, *words)
    assert code == 2 and f"see mixdq {' '.join(words)} --help" in err
    arguments = shlex.split(shown.partition("example:\n")[2])[1:]
    assert cli.parser().parse_args([*arguments, "--traceback"]).traceback
    code, out, err = run(capsys, *arguments, "--nonsense")
    said = f"mixdq {' '.join(words)}: error: unrecognized arguments: --nonsense; see mixdq {' '.join(words)} --help\n"
    assert (code, out, err) == (2, "", said)


def test_traceback_of_a_kind_of_command(capsys, tmp_path):
    for where in (("--traceback", "schedule", "show", "none"), ("schedule", "show", "none", "--traceback")):
        code, _, err = run(capsys, *where)
        assert (
            code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("mixdq: error: none: cannot be read")
        )


SIZED = {
    **{name: ("p", "--prompts", "f") for name in ("calibrate", "analyze")},
    "moments": ("p", "--prompts", "f", "--calibration", "f"),
    "allocate": ("s", "--weight-bits", "4"),
    "generate": ("p", "--prompt", "t"),
    "recover": ("p", "--prompts", "f", "--plan", "f"),
    "compile": ("p",),
    "schedule search": ("p", "--prompts", "f", "--level", "a", "none", "1", "--max-cost", "1"),
    "evaluate run": ("p", "--prompts", "f"),
}


@pytest.mark.parametrize("command", SIZED)
def test_sizes_are_multiples_of_8(capsys, command):
    for option, value in (
        ("--height", "100"),
        ("--width", "4"),
        ("--height", "0"),
        ("--width", "-8"),
        ("--width", "x"),
    ):
        code, out, err = run(capsys, *command.split(), *SIZED[command], option, value)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"argument {option}: {value!r} is no multiple of 8, expected 8, 16, ..." in err
    args = cli.parser().parse_args([*command.split(), *SIZED[command], "--height", "1024", "--width", "8"])
    assert (args.height, args.width) == (1024, 8)


NO_FIGURES = {"report", "import", "completion"}
"""Commands that write a file, or print text that is no figure."""


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - NO_FIGURES))
def test_figures_can_be_had_as_json(capsys, command):
    actions = {"schedule": ("search",), "evaluate": ("run",)}.get(command, ())
    assert "--json" in run(capsys, command, *actions, "--help")[1]


def test_errors_reach_the_shell_as_one_line_and_a_code(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    done = mixdq("calibrate", PIPELINE, "--prompts", tmp_path / "empty.txt")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"mixdq: error: {tmp_path}/empty.txt: holds no prompt, expected one a line\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["calibrate", "p"], "required: --prompts"),
        (["calibrate", "p", "--prompts", "f", "--steps", "1,x"], "'1,x' is not a list of whole numbers"),
        (["calibrate", "p", "--prompts", "f", "--guidance-scale", "nan"], "'nan' is not a finite number"),
        (["recover", "p", "--plan", "f", "--prompts", "f", "--guidance-scale", "x"], "'x' is not a finite number"),
        (["generate", "p", "--prompt", "t", "--steps", "0"], "'0' is not a whole number of at least 1"),
        (["generate", "p"], "one of the arguments --prompt --prompts is required"),
        (["allocate", "s.json", "--weight-bits", "four"], "'four' is not a number of bits"),
        (["allocate", "s.json", "--weight-bits", "content=4,content=5,quality=4"], "names a group twice"),
        (["generate", "p", "--prompt", "t", "--seed", str(2**63)], f"is more than {2**63 - 1}, expected a whole"),
        (["recover", "p", "--plan", "f", "--prompts", "f", "--seed", str(2**43)], f"is more than {2**43 - 1}"),
        (["allocate", "s.json", "--weight-bits", "4", "--objective", "luck"], "invalid choice: 'luck'"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert words in err and "--help" in err


def test_wrong_files_are_one_line(capsys, tmp_path, prompts, scores):
    plan, latin = tmp_path / "plan.json", tmp_path / "latin.txt"
    plan.write_text('{"format": "mixdq-plan", "version": 1, "layers": {')
    latin.write_bytes("ein grüner Kreis".encode("latin-1"))
    here, missing = tmp_path, tmp_path / "missing"
    (here / "empty").mkdir()
    cases = [
        (["calibrate", PIPELINE, "--prompts", missing], "missing: cannot be read"),
        (["calibrate", PIPELINE, "--prompts", latin], "is not UTF-8 text"),
        (["calibrate", here, "--prompts", prompts], "is no pipeline"),
        (["calibrate", missing, "--prompts", prompts], "is no pipeline"),
        (["analyze", PIPELINE, "--prompts", prompts, "--calibration", plan], "plan.json: not valid JSON"),
        (["quantize", PIPELINE, "--plan", plan], "plan.json: not valid JSON"),
        (["quantize", PIPELINE, "--plan", missing], "missing: cannot be read"),
        (["quantize", PIPELINE, "--plan", scores], "expected 'mixdq-plan'"),
        (["generate", PIPELINE, "--prompts", missing, "--out", here / "x"], "missing: cannot be read"),
        (["allocate", missing, "--weight-bits", "4"], "missing: cannot be read"),
        (["allocate", scores, "--weight-bits", "0.5", "--out", here / "p"], "weight_bits"),
        (["allocate", scores, "--weight-bits", "4", "--protect", "nope", "--out", here / "p"], "'nope'"),
        (["allocate", scores, "--weight-bits", "content=4", "--out", here / "p"], "quality"),
        (["import", "plan", "--weight", missing], "missing: cannot be read"),
        (["report", here / "empty"], "nothing to report"),
        (["report", missing], "is no folder"),
    ]
    for arguments, words in cases:
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert err.startswith("mixdq: error: ") and words in err, (arguments, err)
    assert not (here / "p").exists() and not (here / "x").exists()


def test_a_result_that_cannot_be_written_is_one_line(capsys, tmp_path, scores):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "allocate", scores, "--weight-bits", "4", "--out", tmp_path / "file" / "plan.json")
    assert code == 2 and err.count("\n") == 1 and "file" in err


def test_where_a_result_goes_is_checked_before_the_work(capsys, tmp_path, prompts, monkeypatch):
    """Before a model is read, for files and for folders."""
    monkeypatch.setattr("mixdq_ao.app.inputs.load_pipeline", None)
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("")
    folder.mkdir()
    link, fifo = tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(file)
    os.mkfifo(fifo)
    texts = ("--prompts", prompts)
    cases = [
        (("calibrate", PIPELINE, *texts, "--out", file / "deep" / "c.json"), f"{file} is no folder"),
        (("calibrate", PIPELINE, *texts, "--out", folder), f"--out is {folder}, a folder; expected the name of a file"),
        (("analyze", PIPELINE, *texts, "--out", file / "s.json"), f"{file} is no folder"),
        (("analyze", PIPELINE, *texts, "--out", folder), f"--out is {folder}, a folder; expected the name of a file"),
        (("analyze", PIPELINE, *texts, "--store", file, "--out", link), f"--store and --out are both {link};"),
        (("analyze", PIPELINE, *texts, "--store", "sensitivity.json"), "--store and --out are both sensitivity.json"),
        (("calibrate", PIPELINE, *texts, "--out", fifo), "cannot be written: it is a pipe, device or socket"),
        (("analyze", PIPELINE, *texts, "--out", fifo), "cannot be written: it is a pipe, device or socket"),
        (("quantize", PIPELINE, "--plan", file, "--out", fifo), "cannot be written: it is a pipe, device or socket"),
        (("generate", PIPELINE, *texts, "--out", file), f"{file} is no folder"),
        (("quantize", PIPELINE, "--plan", file, "--out", file / "deep"), f"{file} is no folder"),
        (("demo", "--out", file / "deep"), f"{file} is no folder"),
    ]
    for arguments, words in cases:
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, (arguments, err)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, out, err = run(capsys, "calibrate", PIPELINE, *texts, "--out", folder / "c.json")
    assert code == 2 and f"{folder} is not writable" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "p", "--prompt", "t", "--calibration", "c"], "--calibration fills in the ranges of a plan; give"),
        (["evaluate", "run", "p", "--prompts", "t", "--calibration", "c"], "--calibration fills in the ranges"),
        (["compile", "p", "--calibration", "c", "--out", "m.pt2"], "--calibration fills in the ranges"),
        (["generate", "p", "--prompt", "t", "--storage", "own"], "--storage says how a schedule's levels are held"),
        (["generate", "p", "--prompt", "t", "--plan", "f", "--keep-full"], "--keep-full says how a schedule's levels"),
        (["recover", "p", "--plan", "f", "--prompts", "t", "--rank", "4"], "--rank is of --train low_rank"),
    ],
)
def test_options_that_need_others(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("a circle")
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_calibrate_smooths_and_rotates(capsys, tmp_path, prompts):
    out = tmp_path / "calibration.json"
    texts = ("--prompts", prompts, "--out", out)
    code, _, err = run(capsys, "calibrate", PIPELINE, *texts, "--smoothing", 1.5)
    assert code == 2 and "smoothing is 1.5, expected 0 to 1" in err and not out.exists()
    code, shown, err = run(capsys, "calibrate", PIPELINE, *texts, "--smoothing", 0.5, "--rotation", "--json")
    layers = Calibration.load(out).layers.values()
    folded = sum(layer.rotation is not None or layer.smoothing is not None for layer in layers)
    assert code == 0 and 0 < folded < len(layers)
    assert json.loads(shown)["layers_folded"] == folded and f"{folded} smoothed or rotated" in err


def test_a_device_that_is_not_here_is_one_line(capsys, tmp_path, prompts):
    for device in ("warp", "meta", "meta:x", *(() if torch.cuda.is_available() else ("cuda",))):
        code, _, err = run(capsys, "calibrate", PIPELINE, "--prompts", prompts, "--device", device)
        assert code == 2 and err.count("\n") == 1 and f"device {device!r} cannot be used here" in err


def test_a_variant_that_is_no_name_is_one_line(capsys, prompts):
    code, _, err = run(capsys, "calibrate", PIPELINE, "--prompts", prompts, "--variant", "(")
    assert code == 2 and err.count("\n") == 1 and "cannot be loaded as a diffusers pipeline" in err


def test_traceback_only_when_asked(capsys, tmp_path):
    code, _, err = run(capsys, "report", tmp_path / "none", "--traceback")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("mixdq: error: ")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (RuntimeError("a defect\nof two lines"), 1, "unexpected RuntimeError: a defect of two lines (--traceback"),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, words):
    def fail(args):
        raise error

    monkeypatch.setattr("mixdq_ao.app.commands.report.run", fail)
    found, out, err = run(capsys, "report", "somewhere")
    assert found == code and out == "" and err.count("\n") == 1 and words in err


def test_a_closed_pipe_is_no_error(scores, tmp_path):
    command = [sys.executable, "-m", "mixdq_ao.app.cli", "allocate", str(scores), "--weight-bits", "4", "--json"]
    command += ["--out", str(tmp_path / "plan.json")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, cwd=PIPELINE.parents[2])
    os.close(write)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_allocate_writes_a_plan_and_json(capsys, scores, tmp_path):
    out = tmp_path / "deep" / "plan.json"
    options = ["--objective", "additive", "--protect", "conv_in", "--json"]
    code, text, err = run(capsys, "allocate", scores, "--weight-bits", "4", *options, "--out", out)
    found, plan = json.loads(text), Plan.load(out)
    assert code == 0 and found["status"] == "optimal" and found["weight_bytes"] > 0
    assert plan.layers["conv_in"].weight_bits == 16 and len(plan.layers) == 4
    assert str(out) in err.replace("\n", "")


def test_import_plan_and_sensitivity(capsys, tmp_path):
    weights, ssim, sqnr, ratio = (tmp_path / f"{n}.yaml" for n in ("weights", "ssim", "sqnr", "ratio"))
    weights.write_text("model.conv_in: 8\nmodel.mid_block.ff.net.2: 4\n")
    out = tmp_path / "plan.json"
    assert run(capsys, "import", "plan", "--weight", weights, "--protect", "conv_in", "--out", out)[0] == 0
    assert Plan.load(out).layers["mid_block.ff.net.2"] == LayerPlan(weight_bits=4)
    weights.write_text("model.conv_in: 8\n")
    _, _, err = run(capsys, "import", "plan", "--weight", weights, "--out", tmp_path / "one.json")
    assert err.rstrip().endswith("bits of 1 layer")
    sqnr.write_text("model.conv_in: [10.0, 20.0, 30.0]\nmodel.mid_block.ff.net.2: [15.0, 25.0, 35.0]\n")
    ssim.write_text("model.mid_block.ff.net.2: [0.8, 0.9, 0.99]\n")
    ratio.write_text("model.conv_in: 1.0\nmodel.mid_block.ff.net.2: 2.0\n")
    files = [f"--{k}-{m}={p}" for k in ("weight", "act") for m, p in (("ssim", ssim), ("sqnr", sqnr), ("ratio", ratio))]
    code, _, err = run(capsys, "import", "sensitivity", *files, "--out", tmp_path / "s.json")
    assert code == 0, err
    assert Sensitivity.load(tmp_path / "s.json").layers["mid_block.ff.net.2"].group == "content"


def test_quantize_and_generate(capsys, tmp_path, monkeypatch, bundled):
    from mixdq_ao.layers import find_layers

    model = bundled.pipe.unet
    path, foreign = tmp_path / "plan.json", tmp_path / "foreign.json"
    chosen = [n for n in find_layers(model) if n.startswith("mid_block")]
    layers = {n: LayerPlan(weight_bits=4, act_bits=8) for n in chosen}
    Plan(layers).with_calibration(bundled.calibration).save(path)
    Plan({"decoder.layer": LayerPlan(weight_bits=4)}).save(foreign)
    monkeypatch.setattr("mixdq_ao.app.commands.generate.load_pipeline", lambda *args, **kwargs: bundled.pipe)

    code, _, err = run(capsys, "quantize", PIPELINE, "--plan", foreign)
    assert code == 2 and err.count("\n") == 1 and "'decoder.layer'" in err
    code, out, _ = run(capsys, "quantize", PIPELINE, "--plan", path, "--json")
    found = json.loads(out)
    assert code == 0 and found["bytes_after"] < found["bytes_before"]
    assert found["layers_by_weight_bits"]["4"] == len(chosen)
    pictures = tmp_path / "pictures"
    ask = ["--prompt", "a Red/../circle", "--steps", "1", "--out", pictures, "--json"]
    code, out, err = run(capsys, "generate", PIPELINE, *ask)
    assert code == 0, err
    assert [p.name for p in pictures.iterdir()] == ["0000-a-red-circle.png"]
    found = json.loads(out)
    assert found["pictures"] == [str(pictures / "0000-a-red-circle.png")] and found["seconds"] > 0
    nothing = torch.full((1, 3, 8, 8), torch.nan)
    monkeypatch.setattr("mixdq_ao.models.pipelines.generate", lambda *args: iter([nothing]))
    code, _, err = run(capsys, "generate", PIPELINE, *ask)
    assert code == 2 and "picture 0 of the batch is not finite" in err


def test_calibrate_and_analyze_print_json(capsys, tmp_path, monkeypatch, prompts, bundled):
    for command in ("calibrate", "analyze"):
        monkeypatch.setattr(f"mixdq_ao.app.commands.{command}.load_pipeline", lambda *args, **kwargs: bundled.pipe)
    out = tmp_path / "calibration.json"
    code, text, _ = run(capsys, "calibrate", PIPELINE, "--prompts", prompts, "--out", out, "--json")
    found = json.loads(text)
    assert code == 0 and found["calibration"] == str(out) and found["prompts"] == 2
    assert found["layers"] > found["layers_with_bos_apart"] > 0
    found_size = Calibration.load(out).layers["conv_in"].act_size
    code, _, _ = run(capsys, "calibrate", PIPELINE, "--prompts", prompts, "--out", out, "--height", 32, "--width", 48)
    small = Calibration.load(out)
    assert code == 0 and (small.metadata["height"], small.metadata["width"]) == (32, 48)
    assert small.layers["conv_in"].act_size == found_size * 32 * 48 // 64**2
    options = ["--metric", "orthogonality", "--calibration", out, "--out", tmp_path / "o.json", "--json"]
    code, text, _ = run(capsys, "analyze", PIPELINE, "--prompts", prompts, *options)
    assert code == 0
    assert json.loads(text) == {"orthogonality": str(tmp_path / "o.json"), "layers": found["layers"], "prompts": 2}


def test_load_pipeline_says_what_is_wrong(tmp_path):
    from mixdq_ao.app.inputs import load_pipeline, looks_local
    from mixdq_ao.errors import MixDQError

    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(MixDQError, match="cannot be loaded as a diffusers pipeline"):
        load_pipeline(str(tmp_path))
    with pytest.raises(MixDQError, match="100000 denoising steps are more than DDIMScheduler takes: .*1000"):
        load_pipeline(str(PIPELINE), steps=[1, 100000])
    assert looks_local("./x") and looks_local("a/b/c") and looks_local("name") and not looks_local("org/model")


def test_a_denoiser_alone_is_no_pipeline(capsys, bundled, tmp_path):
    """It says what to do instead."""
    from mixdq_ao import mixdq_config, quantize_, save_quantized

    whole, packed, vae = (tmp_path / name for name in ("whole", "packed", "vae"))
    unet = bundled.pipe.unet
    unet.save_pretrained(whole)
    quantize_(unet, mixdq_config(Plan({"conv_in": LayerPlan(weight_bits=8)})))
    save_quantized(unet, packed)
    shutil.copytree(PIPELINE / "vae", vae)
    for path, words in (
        (packed, f"pipe.unet = mixdq_ao.load_quantized('{packed}') into it, and pipe.save_pretrained"),
        (whole, f"pipe.unet = diffusers.UNet2DConditionModel.from_pretrained('{whole}')"),
        (vae, "holds one model (AutoencoderKL), expected a directory with a model_index.json"),
    ):
        code, out, err = run(capsys, "generate", path, "--prompt", "x", "--out", tmp_path / "pictures")
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err
        assert ("holds a denoiser (UNet2DConditionModel) without its pipeline" in err) == (path != vae)


def test_files_of_a_variant_are_read(tmp_path):
    from mixdq_ao.app.inputs import load_pipeline

    shutil.copytree(PIPELINE, tmp_path / "half")
    for path in (tmp_path / "half").rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(MixDQError, match="cannot be loaded as a diffusers pipeline"):
        load_pipeline(str(tmp_path / "half"))
    assert find_layers(load_pipeline(str(tmp_path / "half"), variant="fp16").unet)


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


def test_doctor_in_words(capsys):
    from mixdq_ao.app.machine import advice

    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["versions"]["torch"] and set(found["int8 products"]) >= {"8-bit weights"}
    assert found["advice"][0].startswith("CPU: ") and found["advice"][1].startswith("GPU: ")
    routes = {f"{b}-bit weights": "onednn-int8" for b in (8, 4, 2)}
    fast = advice(found | {"int8 products": routes, "cpu": found["cpu"] | {"amx": False}})
    assert "int8 is faster" in fast[0] and "VNNI" in fast[0]
    for route, words in (("float32", "not faster than float32"), ("avx2", "faster than float32, though")):
        text = advice(found | {"int8 products": routes | {"8-bit weights": route}})[0]
        assert "neither VNNI nor AMX" in text and words in text
    assert "no oneDNN" in advice(found | {"int8 products": dict.fromkeys(routes, "float32")})[0]
    gpu = {"name": "Imaginary GPU", "int8 tensor cores": False}
    assert "no int8 tensor cores" in advice(found | {"gpu": gpu})[1]


def test_a_plan_that_quantizes_nothing_is_refused_before_anything_is_loaded(capfd, tmp_path):
    Plan({"conv_in": LayerPlan()}).save(tmp_path / "plan.json")
    code, _, err = run(capfd, "quantize", tmp_path / "nowhere", "--plan", tmp_path / "plan.json")
    assert code and "plan.json: quantizes no layer" in err


def test_weights_are_rounded_by_moments_of_their_inputs(capsys, tmp_path, monkeypatch, prompts, bundled):
    for command in ("moments", "analyze"):
        pipe = copy.deepcopy(bundled.pipe)
        monkeypatch.setattr(f"mixdq_ao.app.commands.{command}.load_pipeline", lambda *_, pipe=pipe, **__: pipe)
    bundled.calibration.save(calibration := tmp_path / "calibration.json")
    given = (PIPELINE, "--prompts", prompts, "--calibration", calibration)
    moments, scores, plan = (tmp_path / name for name in ("moments.safetensors", "scores.json", "plan.json"))
    code, text, _ = run(capsys, "moments", *given, "--out", moments, "--json")
    assert code == 0 and set(Moments.load(moments)) == set(bundled.calibration.layers)
    assert json.loads(text)["layers"] == len(bundled.calibration.layers)
    options = ("--roundings", "output compensated", "--moments", moments, "--method", "probe", "--probes", "1")
    assert run(capsys, "analyze", *given, *options, "--weight-bits", "4", "--act-bits", "8", "--out", scores)[0] == 0
    budget = ("--weight-bits", 4, "--act-bits", 8, "--weight-choices", 4, "--act-choices", 8)
    code, _, _ = run(capsys, "allocate", scores, *budget, "--calibration", calibration, "--out", plan)
    assert code == 0 and {layer.rounding for layer in Plan.load(plan).layers.values()} == {"compensated"}
    code, _, said = run(capsys, "analyze", *given, "--moments", moments)
    assert code == 2 and "--moments is for --roundings" in said
