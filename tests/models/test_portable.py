"""torch.export and ahead-of-time packages of quantized modules, run by a process without this library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import _inductor as inductor
from torch import nn
from torch.torch_version import TorchVersion

from mixdq_ao import CheckpointError, Plan, calibrate, mixdq_config, quantize_
from mixdq_ao.models import portable
from mixdq_ao.models.portable import captured_call, export, package


class Small(nn.Module):
    """A convolution, a linear layer and a BOS-like one, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, 2, 1)
        self.wide = nn.Conv2d(7, 5, 1)
        self.out = nn.Linear(5, 6)
        self.other = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y = self.wide(torch.nn.functional.silu(self.conv(x))).flatten(2).transpose(1, 2)
        return self.other(torch.nn.functional.gelu(self.out(y))) * scale


BITS = {"conv": (8, 8), "wide": (4, 8), "out": (2, 16), "other": (4, 16)}


@pytest.fixture
def small():
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(2, 3, 9, 9)
    calibration = calibrate(model, run=lambda: model(x))
    plan = Plan.uniform(model, 8, 8)
    layers = {
        n: replace(v, weight_bits=BITS[n][0], act_bits=BITS[n][1], symmetric=None) for n, v in plan.layers.items()
    }
    quantize_(model, mixdq_config(plan.with_layers(layers).with_calibration(calibration)))
    with torch.no_grad():
        return model, x, model(x)


@pytest.mark.parametrize("plain", [False, True])
def test_exported_graphs_give_the_same(small, plain, tmp_path):
    model, x, expected = small
    program = export(model, {"x": x}, plain=plain)
    ours = [n.target for n in program.graph.nodes if "inductor_kernels" in str(n.target)]
    assert len(ours) == (0 if plain else 4)
    held = {t.dtype for t in program.state_dict.values()}
    assert torch.int8 in held and torch.uint8 in held  # packed integers, not their floating-point values
    error = (program.module()(x=x) - expected).abs().max()
    assert error <= 2e-6 * expected.abs().max()
    torch.export.save(program, tmp_path / "m.pt2")
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x=x), program.module()(x=x))


def test_export_leaves_the_model_alone(small):
    model, x, expected = small
    weight = model.conv.weight
    export(model, {"x": x}, plain=True)
    assert model.conv.weight is weight and torch.equal(model(x), expected)


def test_shapes_may_be_dynamic(small):
    model, x, _ = small
    auto = torch.export.Dim.AUTO
    program = export(model, {"x": x}, plain=True, dynamic_shapes={"x": {0: auto, 2: auto, 3: auto}})
    for shape in ((3, 3, 9, 9), (4, 3, 12, 12)):
        other = torch.randn(shape)
        with torch.no_grad():
            expected = model(other)
        assert (program.module()(x=other) - expected).abs().max() <= 2e-6 * expected.abs().max()


RUN = """
import importlib, sys, torch
ours = sys.argv[3:]  # what a process is told to import first; on a path without the rest of us
for name in ours:
    importlib.import_module(name)
compiled = torch._inductor.aoti_load_package(sys.argv[1])
x, expected = torch.load(sys.argv[2])
y = compiled(x=x)
imported = {"mixdq_ao", "inductor_kernels", "torchao", "diffusers"} & set(sys.modules)
assert imported == set(ours), imported
assert (y - expected).abs().max() <= 2e-6 * expected.abs().max(), (y - expected).abs().max()
print("the same")
"""


def in_another_process(code: str, path: Path, data: object, *imports: str) -> None:
    """Runs ``code`` on a package and its arguments, in a process that can import only ``imports`` of our packages."""
    torch.save(data, path.with_suffix(".data"))
    for name in imports:
        (path.parent / name).symlink_to(Path(import_module(name).__file__ or "").parent)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    arguments = [sys.executable, "-c", code, str(path), str(path.with_suffix(".data")), *imports]
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=path.parent, env=environment)
    assert run.returncode == 0 and run.stdout == "the same\n", run.stderr[-2000:]


@pytest.mark.parametrize("use, imports", [("auto", ()), ("ours", ("inductor_kernels",))])
def test_a_package_runs_in_a_process_without_us(small, tmp_path, use, imports):
    """With our CPU kernels the process imports inductor_kernels, but not mixdq_ao."""
    model, x, expected = small
    path = tmp_path / "small.pt2"
    if imports and TorchVersion(torch.__version__) < "2.13":
        with pytest.raises(CheckpointError, match="expected torch 2.13 or newer"):
            package(model, {"x": x}, path, use=use)
        return
    with inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # the same code sooner
        assert package(model, {"x": x}, path, use=use) is bool(imports)
    in_another_process(RUN, path, (x, expected), *imports)


def calls_on_a_gpu(groups: int, summed: bool) -> str:
    """The list of calls in a package for a GPU, of a convolution for which there is no kernel of ours."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.extern_node_serializer import extern_node_json_serializer
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    from inductor_kernels import lowering, pretend

    assert lowering
    integers = [((2, 8, 8, 16), torch.int8), ((16, 3, 3, 16 // groups), torch.int8), ((16,), torch.int32)]

    def convolution(x, w, sums, scale, z):
        arguments = (x, w, None, sums if summed else None, scale, z, None, 8, [1, 1], [1, 1], [1, 1], groups)
        return torch.ops.inductor_kernels.conv2d(*arguments, torch.float32)

    with pretend.cuda(90), torch._subclasses.FakeTensorMode() as mode, torch.no_grad():
        kinds = [*integers, ((16,), torch.float32), ((), torch.int32)]
        fakes = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in kinds]
        traced = make_fx(convolution)(*fakes)
        graph = GraphLowering(traced, example_inputs=fakes, is_inference=True, cpp_wrapper=True, aot_mode=True)
        with (
            inductor.config.patch(cpp_wrapper=True), V.set_fake_mode(mode), V.set_graph_handler(graph),
            V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()),
        ):  # fmt: skip
            graph.run(*fakes)
            graph.codegen()
            return extern_node_json_serializer(V.extern_kernel_nodes)


def test_a_call_that_is_left_in_a_package_for_a_gpu_is_said(small, tmp_path, monkeypatch):
    """Only the list of calls is read; running the code would need a GPU."""
    pytest.importorskip("triton")
    model, x, _ = small
    other = '{"nodes": [{"node": {"target": "aten::sort"}}]}'

    def fake(program, package_path):
        with zipfile.ZipFile(package_path, "w") as file:
            file.writestr("m/data/aotinductor/model/a.wrapper.cpp", "// [inductor_kernels.conv2d]")
            file.writestr("m/data/aotinductor/model/a.wrapper.json", listed.pop())

    monkeypatch.setattr(inductor, "aoti_compile_and_package", fake)
    monkeypatch.setattr(portable, "_check_calls", lambda: None)
    for calls, needed in ((calls_on_a_gpu(2, True), True), (calls_on_a_gpu(1, False), True), (other, False)):
        listed = [calls]
        assert package(model, {"x": x}, tmp_path / "m.pt2", use="ours") is needed


def test_what_cannot_be_packaged_is_said(small, tmp_path):
    model, x, _ = small
    with pytest.raises(CheckpointError, match="ends in .pt2"):
        package(model, {"x": x}, tmp_path / "model.so")
    with pytest.raises(CheckpointError, match="no quantized layer"):
        package(Small(), {"x": x}, tmp_path / "m.pt2")
    with pytest.raises(CheckpointError, match="was not called"):
        captured_call(model, lambda: None)
    assert set(captured_call(model, lambda: model(x, scale=2.0))) == {"x", "scale"}


def test_the_command_checks_the_name_first(capsys):
    from mixdq_ao.app.cli import main

    assert main(["compile", "nowhere", "--out", "unet.so"]) == 2
    assert "ends in .pt2" in capsys.readouterr().err


def test_the_command_packages_what_the_pipeline_calls(_bundled, tmp_path, monkeypatch, capsys):
    """Everything except the compiler, which takes minutes."""
    from examples.shapes.subject import PIPELINE
    from mixdq_ao.app.cli import main

    plan = Plan.uniform(_bundled.pipe.unet, 8, 8).with_calibration(_bundled.calibration)
    plan.save(tmp_path / "plan.json")
    seen = {}

    def fake(model, kwargs, path, *, use):
        with torch.no_grad():
            seen.update(shape=model(**kwargs)[0].shape, use=use, bits=model.conv_in.weight.bits)
        path.write_bytes(b"package")
        return False

    monkeypatch.setattr("mixdq_ao.models.portable.package", fake)
    arguments = ["--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "a" / "u.pt2"), "--batch-size", "2"]
    assert main(["compile", str(PIPELINE), *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert seen == {"shape": (2, 4, 16, 16), "use": "auto", "bits": 8}
    assert found["bytes"] == 7 and not found["needs_inductor_kernels"] and "encoder_hidden_states" in found["inputs"]


@pytest.mark.slow
@pytest.mark.parametrize("use, imports", [("auto", ()), ("ours", ("inductor_kernels",))])
def test_a_whole_unet_in_a_process_without_us(_bundled, tmp_path, use, imports):
    import copy

    from mixdq_ao import Sampling
    from mixdq_ao.models.pipelines import generate_all

    pipe = copy.copy(_bundled.pipe)
    object.__setattr__(pipe, "unet", copy.deepcopy(pipe.unet))
    quantize_(pipe.unet, mixdq_config(Plan.uniform(pipe.unet, 8, 8).with_calibration(_bundled.calibration)))
    call = captured_call(pipe.unet, lambda: generate_all(pipe, _bundled.prompts[:1], Sampling(), "latent"))
    call = {name: value for name, value in call.items() if value is not None}
    package(pipe.unet, call, tmp_path / "unet.pt2", use=use)
    with torch.no_grad():
        expected = pipe.unet(**call)[0]
    code = RUN.replace("x, expected", "call, expected").replace("compiled(x=x)", "compiled(**call)[0]")
    code = code.replace("2e-6", "0.02")  # codes at a rounding border may differ by one
    in_another_process(code, tmp_path / "unet.pt2", (call, expected), *imports)
