"""Second moments: what a direct computation gives, shared where layers read one tensor, and files that lie refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mixdq_ao import Calibration, CalibrationError, calibrate
from mixdq_ao.layers import find_layers
from mixdq_ao.search import moments as module_under_test
from mixdq_ao.search.moments import Moments, input_moments

from ..conftest import unet_inputs
from ..default_dtype import default_dtype


class Net(nn.Module):
    """Two linear layers that read one tensor, convolutions of odd geometry, and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 6)
        self.conv = nn.Conv2d(2, 3, (3, 2), stride=2, padding=1)
        self.wide = nn.Conv2d(3, 5, 2, dilation=2)
        self.groups = nn.Conv2d(2, 4, 1, groups=2)
        self.apart = False

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        y = self.out(self.q(x) + self.k(x.clone() if self.apart else x))
        return y.sum() + self.wide(self.conv(image)).sum() + self.groups(image).sum()


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return [(torch.randn(n, 3, 6) + 1, torch.randn(n, 2, 7, 9)) for n in (2, 1)]


@pytest.fixture
def net() -> SimpleNamespace:
    torch.manual_seed(1)
    model, inputs = Net(), batches()
    run = lambda: [model(*x) for x in inputs]  # noqa: E731
    return SimpleNamespace(model=model, inputs=inputs, run=run, calibration=calibrate(model, run=run))


def collected(net: SimpleNamespace, **options: Any) -> Moments:
    return input_moments(net.model, run=net.run, calibration=net.calibration, **options)


def mean(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows.T @ rows / len(rows)


def assert_is(moment: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(moment.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("windows", [1, 4096])
def test_it_is_the_mean_of_outer_products(net, windows, monkeypatch):
    monkeypatch.setattr(module_under_test, "ROWS_AT_ONCE", windows)
    moments = collected(net)
    assert set(moments) == {"q", "k", "out", "conv", "wide"}
    assert_is(moments["q"], mean(torch.cat([x.flatten(0, 1) for x, _ in net.inputs])))
    unfolded = [F.unfold(image, (3, 2), 1, 1, 2).transpose(1, 2).flatten(0, 1) for _, image in net.inputs]
    assert_is(moments["conv"], mean(torch.cat(unfolded)))
    hidden = [F.unfold(net.model.conv(image), 2, 2).transpose(1, 2).flatten(0, 1) for _, image in net.inputs]
    assert_is(moments["wide"], mean(torch.cat(hidden).detach()))
    assert not any(m._forward_hooks for m in net.model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_type_changes_nothing(unet, calibration, dtype):
    inputs, names = unet_inputs(), ["conv_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]
    options = {"run": lambda: unet(**inputs), "calibration": calibration, "layers": names}
    found = input_moments(unet, **options)
    with default_dtype(dtype):
        again = input_moments(unet, **options)
    assert all(torch.equal(found[n], again[n]) for n in names)


def test_a_moment_tells_the_output_error(net):
    """d M d^T is the mean square of what a change d of a channel's weights does to the output, borders included."""
    moment = collected(net)["conv"]
    change = torch.randn_like(net.model.conv.weight)
    outputs = [F.conv2d(image, change, None, 2, 1).movedim(1, 0).flatten(1) for _, image in net.inputs]
    expected = torch.cat(outputs, 1).square().mean(1)
    rows = change.flatten(1)
    torch.testing.assert_close(((rows @ moment) * rows).sum(1), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_read_one_tensor_share_a_matrix(net):
    moments = collected(net)
    assert moments["q"] is moments["k"] and moments["q"] is not moments["out"]
    assert moments.bytes == 4 * (6 * 6 + 4 * 4 + 12 * 12 + 12 * 12)


def test_layers_that_share_only_sometimes_do_not_share(net):
    model, inputs = net.model, net.inputs

    def run() -> None:
        for i, x in enumerate(inputs):
            model.apart = i == 1
            model(*x)

    moments = input_moments(model, run=run, calibration=net.calibration)
    assert moments["q"] is not moments["k"] and torch.equal(moments["q"], moments["k"])

    def uneven() -> None:
        net.run()
        model.q(torch.ones(2, 6))

    moments = input_moments(model, run=uneven, calibration=net.calibration)
    assert not torch.equal(moments["q"], moments["k"])
    assert_is(moments["k"], mean(torch.cat([x.flatten(0, 1) for x, _ in inputs])))


def test_a_tensor_changed_in_place_is_another(net):
    def run() -> None:
        x = torch.ones(2, 6)
        net.model.q(x)
        x.mul_(3)
        net.model.k(x)

    moments = input_moments(net.model, run=run, calibration=net.calibration, layers=("q", "k"))
    torch.testing.assert_close(moments["k"], 9 * moments["q"])


def test_bos_rows_do_not_count(unet, calibration):
    inputs = unet_inputs(3)
    moments = input_moments(unet, run=lambda: unet(**inputs), calibration=calibration)
    assert set(moments) == set(find_layers(unet))
    rows = inputs["encoder_hidden_states"][:, 1:].flatten(0, 1)  # type: ignore[index]
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert_is(moments[name], mean(rows))
    assert moments[name] is moments[name.replace("to_k", "to_v")]


def test_layers_in_groups_are_the_same(net):
    whole = collected(net)
    for names in (("k",), ("conv", "out"), ["wide"]):
        part = collected(net, layers=names)
        assert list(part) == list(names) and all(torch.equal(part[n], whole[n]) for n in names)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (("nowhere",), "'nowhere', which is not a linear or convolution layer of Net"),
        (("groups",), "'groups', a convolution in groups"),
        ("conv", "expected names of layers"),
        ((), "none of the layers ran"),
    ],
)
def test_layers_that_cannot_be(net, layers, says):
    with pytest.raises(CalibrationError, match=says):
        collected(net, layers=layers)


def test_a_layer_without_calibration(net):
    layers = {n: v for n, v in net.calibration.layers.items() if n != "out"}
    calibration = Calibration(layers, net.calibration.ties)
    with pytest.raises(CalibrationError, match="'out', which is not a layer of the calibration"):
        input_moments(net.model, run=net.run, calibration=calibration, layers=("out",))
    assert "out" not in input_moments(net.model, run=net.run, calibration=calibration)


def test_inputs_that_are_not_finite(net):
    with pytest.raises(CalibrationError, match="layer 'q': its input holds NaN"):
        input_moments(
            net.model, run=lambda: net.model.q(torch.full((1, 6), torch.nan)), calibration=net.calibration, layers=["q"]
        )
    assert not net.model.q._forward_hooks


def test_a_pipeline(bundled):
    options: dict[str, Any] = {"calibration": bundled.calibration, "layers": ["conv_in", "conv_out"], "batch_size": 2}
    moments = input_moments(bundled.pipe, bundled.prompts[:3], steps=(1, 2), **options)
    assert moments["conv_in"].shape == (36, 36) and moments.metadata["steps"] == [1, 2]
    with pytest.raises(CalibrationError, match="expected a diffusers pipeline and prompts"):
        input_moments(bundled.pipe, **options)


def test_round_trip(net, tmp_path):
    moments = collected(net)
    moments.save(tmp_path / "deep" / "moments.safetensors")
    again = Moments.load(tmp_path / "deep" / "moments.safetensors")
    assert list(again) == list(moments) and all(torch.equal(again[n], moments[n]) for n in moments)
    assert again["q"] is again["k"] and again.metadata == moments.metadata
    assert again.fingerprint == moments.fingerprint != collected(net, layers=["q"]).fingerprint
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["moments.safetensors"]


def write(path: Path, tensors: dict[str, Tensor], **changes: str | None) -> None:
    """A file as ``save`` would write it, with changed metadata; None leaves a key out."""
    Moments(
        {n: t for n, t in tensors.items() if t.dtype == torch.float32 and t.dim() == 2 and len(t) == len(t[0])}
    ).save(path)
    from mixdq_ao.tensorfile import read_header

    metadata = {**read_header(path).metadata, "layers": json.dumps({n: n for n in tensors}), **changes}
    save_file(tensors, path, {n: v for n, v in metadata.items() if v is not None})


SQUARE = {"a": torch.eye(3), "b": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("tensors", "changes", "says"),
    [
        (SQUARE, {"format": "other"}, "format is 'other'"),
        (SQUARE, {"format": None}, "format is None"),
        (SQUARE, {"version": "9"}, "version '9'"),
        (SQUARE, {"layers": "{"}, "not valid JSON"),
        (SQUARE, {"layers": "[" * 100_000}, "not valid JSON"),
        (SQUARE, {"layers": "[]"}, "expected to be objects"),
        (SQUARE, {"metadata": "3"}, "expected to be objects"),
        (SQUARE, {"layers": '{"a": "a", "b": 3}'}, "layer 'b' has the matrix 3"),
        (SQUARE, {"layers": '{"a": "a", "b": "c"}'}, "layer 'b' has the matrix 'c'"),
        (SQUARE, {"layers": '{"a": "a"}'}, "'b' belongs to no layer"),
        (SQUARE, {"layers": '{"a": "b", "b": "a"}'}, "not those it was written with"),
        (SQUARE, {"fingerprint": None}, "not those it was written with"),
        ({"a": torch.ones(2, 3)}, {}, r"shape \[2, 3\], expected float32"),
        ({"a": torch.ones(2)}, {}, r"shape \[2\], expected float32"),
        ({"a": torch.ones(2, 2).half()}, {}, "float16"),
    ],
)
def test_files_that_lie(tmp_path, tensors, changes, says):
    path = tmp_path / "moments.safetensors"
    write(path, tensors, **changes)
    with pytest.raises(CalibrationError, match=says) as error:
        Moments.load(path)
    assert "moments.safetensors" in str(error.value)


def test_files_that_are_none(tmp_path, net):
    path = tmp_path / "moments.safetensors"
    collected(net).save(path)
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[:50], whole[:-4], b"\xff" * 64, b"version https://git-lfs"):
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match="moments.safetensors"):
            Moments.load(path)
    changed = bytearray(whole)
    changed[-4:] = b"\x00\x00\xc0\x7f"  # NaN in the last matrix' last element, on its diagonal
    path.write_bytes(bytes(changed))
    with pytest.raises(CalibrationError, match="not those it was written with"):
        Moments.load(path)
    with pytest.raises(CalibrationError, match="nothing"):
        Moments.load(tmp_path / "nothing")
    with pytest.raises(CalibrationError, match="cannot be written"):
        collected(net).save(path / "below")


def test_matrices_that_cannot_be():
    with pytest.raises(CalibrationError, match="layer 'a'.*float64"):
        Moments({"a": torch.eye(2).double()})
