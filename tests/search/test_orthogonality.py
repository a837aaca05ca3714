"""Network orthogonality: correlations as the definitions give them, no features kept, files, named errors."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixdq_ao import MixDQError, Orthogonality, SensitivityError, orthogonality
from mixdq_ao.layers import find_layers
from mixdq_ao.search import orthogonality_gram
from mixdq_ao.search.orthogonality import sampled_steps
from mixdq_ao.search.orthogonality_gram import Correlator

from ..conftest import unet_inputs


class Net(nn.Module):
    """Layers of odd shapes, one that runs twice, one whose output is the same for every sample, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.proj, self.twice = nn.Conv2d(3, 5, 3, stride=2), nn.Linear(5, 7), nn.Linear(7, 7)
        self.time, self.unused = nn.Linear(1, 7), nn.Linear(1, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        y = self.proj(self.conv(sample).flatten(2).transpose(1, 2))
        time = self.time(timestep.float().reshape(-1, 1).expand(len(sample), 1) / 100)
        return self.twice(torch.tanh(self.twice(y) + time[:, None] + timestep / 300 * y.square()))


def song(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of HSIC, equation 5 of Song et al. 2007, for linear kernels."""
    n = len(x)
    k, m = (f @ f.T * (1 - np.eye(n)) for f in (x, y))
    one = np.ones(n)
    means = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return (np.trace(k @ m) + means) / (n * (n - 3))


def biased(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC in feature space: the squared norm of the covariance of two sets of features."""
    return float(np.square((x - x.mean(0)).T @ (y - y.mean(0))).sum()) / (len(x) - 1) ** 2


def features(net: Net, sample: Tensor, timestep: float) -> dict[str, np.ndarray]:
    """float64 [n, d] of every layer, all its runs side by side."""
    seen: dict[str, list[Tensor]] = {}

    def see(name: str) -> Any:
        return lambda module, args, output: seen.setdefault(name, []).append(output.flatten(1))

    handles = [module.register_forward_hook(see(name)) for name, module in find_layers(net).items()]
    with torch.no_grad():
        net(sample, torch.tensor(timestep))
    for handle in handles:
        handle.remove()
    return {n: torch.cat(v, 1).double().numpy() for n, v in seen.items()}


@pytest.fixture
def net() -> SimpleNamespace:
    torch.manual_seed(3)
    model = Net()
    batches = [torch.randn(n, 3, 9, 8) for n in (6, 5)]
    times = (90.0, 40.0, 10.0)
    run = lambda: [model(x, torch.tensor(t)) for x in batches for t in times]  # noqa: E731
    return SimpleNamespace(model=model, batches=batches, times=times, run=run)


@pytest.mark.parametrize("columns", [7, 1 << 16])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_correlations_are_what_the_definition_gives(net, estimator, columns, monkeypatch):
    monkeypatch.setattr(orthogonality_gram, "COLUMNS", columns)
    found = orthogonality(net.model, run=net.run, estimator=estimator)
    assert found.names == ("conv", "proj", "twice", "time") and found.sampled == (0, 1, 2) and found.steps == 3
    hsic = biased if estimator == "biased" else song
    for place, time in enumerate(net.times):
        every = [features(net.model, x, time) for x in net.batches]
        for i, a in enumerate(found.names[:3]):
            for j, b in enumerate(found.names[:3]):
                pair, one, other = (
                    sum(len(f[p]) * hsic(f[p], f[q]) for f in every) for p, q in ((a, b), (a, a), (b, b))
                )
                assert found.matrices[place, i, j] == pytest.approx(pair / np.sqrt(one * other), abs=2e-6), (a, b, time)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_a_layer_that_never_varies_correlates_with_none(net, estimator):
    found = orthogonality(net.model, run=net.run, estimator=estimator)
    time = found.names.index("time")
    assert not found.matrices[:, time].any() and not found.gamma[:, time].any()
    assert found.importance()["time"] == pytest.approx(1.0) and max(found.importance().values()) <= 1.0 + 1e-12


def test_constant_layers_of_a_unet(unet):
    inputs = unet_inputs(6)
    found = orthogonality(unet, run=lambda: unet(**inputs))
    assert np.isfinite(found.matrices).all()
    constant = {n for n, row in zip(found.names, found.matrices[0], strict=True) if not row.any()}
    assert constant == {n for n in found.names if n.startswith("time_embedding")}


def test_equal_up_to_rotation_and_independent():
    x = torch.randn(8, 4)
    x -= x.mean(0)
    q = torch.linalg.qr(torch.cat([torch.ones(8, 1), x], 1)).Q[:, 1:]  # centred, orthonormal
    turned = torch.linalg.qr(torch.randn(2, 2)).Q
    hsic = orthogonality_gram.independence(
        torch.stack([orthogonality_gram.gram(f)[0] for f in (q[:, :2] + 5, 3 * q[:, :2] @ turned, q[:, 2:] - 7)]),
        "biased",
    )
    matrix = orthogonality_gram.correlations(hsic)
    torch.testing.assert_close(matrix, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]).double(), atol=1e-6, rtol=0)


def test_only_sampled_steps_are_looked_at(net):
    every = orthogonality(net.model, run=net.run)
    one = orthogonality(net.model, run=net.run, steps=3, timesteps=1)
    assert one.sampled == (1,) and np.array_equal(one.matrices, every.matrices[[1]])
    assert np.array_equal(every.subset([2, 0]).matrices, every.matrices[[0, 2]])
    assert not np.array_equal(every.matrices[0], every.matrices[1])


@pytest.mark.parametrize(
    ("steps", "timesteps", "expected"),
    [
        (1, 1, (0,)),
        (8, 4, (1, 3, 5, 7)),
        (8, 1, (4,)),
        (8, None, tuple(range(8))),
        (100, 3, (16, 50, 83)),
        (8, (7, 0), (0, 7)),
    ],
)
def test_sampling_is_uniform(steps, timesteps, expected):
    assert sampled_steps(steps, timesteps) == expected


def test_nothing_of_the_features_is_kept(net):
    watcher = Correlator(net.model, "biased", None)
    with watcher.watch():
        net.run()
    layers = len(watcher.names)
    assert all(v.shape == (layers, layers) for v in watcher.sums.values()) and len(watcher.sums) == 3
    assert watcher.call is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.model.modules())


def test_a_pipeline_ends_after_the_last_sampled_step(bundled):
    calls: list[float] = []
    bundled.pipe.unet.register_forward_pre_hook(lambda m, a: calls.append(float(a[1])))
    found = orthogonality(bundled.pipe, bundled.prompts[:5], steps=4, timesteps=[1], batch_size=3)
    assert found.metadata["batches"] == [3, 2] and found.sampled == (1,) and found.steps == 4
    assert len(calls) == 2 * 3  # the third call ends each batch before it is computed
    assert len(found.layers) == 175 and found.layers["conv_in"].act_size == 4 * 16 * 16
    again = orthogonality(bundled.pipe, bundled.prompts[:5], steps=4, timesteps=[1], batch_size=3)
    assert np.array_equal(found.matrices, again.matrices)


def test_importance_is_the_published_formula(net):
    found = orthogonality(net.model, run=net.run)
    others = [[m[i, [j for j in range(4) if j != i]].sum() for i in range(4)] for m in found.matrices]
    weights = np.exp(1.5 * np.array([0, 0.5, 1]))
    expected = (weights / weights.sum()) @ np.exp(-0.7 * np.array(others))
    assert list(found.importance(beta=0.7, decay=1.5).values()) == pytest.approx(expected.tolist())
    assert found.step_importance() == pytest.approx(found.step_importance(1 / 3))
    assert found.step_weights(0.0) == pytest.approx([1 / 3] * 3)
    picture = np.array(found.aggregated(0.0))
    assert picture == pytest.approx(found.matrices.mean(0), abs=1e-6) and picture.shape == (4, 4)
    for beta in (0, -1.0, float("inf"), True, 1e4, 10**400):
        with pytest.raises(SensitivityError, match="beta is"):
            found.importance(beta=beta)
    for decay in (float("nan"), 10**400):
        with pytest.raises(SensitivityError, match="decay is"):
            found.importance(decay=decay)


def test_files(net, tmp_path):
    found = orthogonality(net.model, run=net.run, estimator="unbiased")
    found.save(tmp_path / "o.json")
    read = Orthogonality.load(tmp_path / "o.json")
    assert read.to_json() == found.to_json() and np.array_equal(read.matrices, found.matrices)
    assert read.importance() == found.importance()
    document = json.loads((tmp_path / "o.json").read_text())
    triangle = document["matrices"][0]
    for change, says in [
        ({"estimator": "other"}, "estimator is 'other'"),
        ({"estimator": ["biased"]}, r"estimator is \['biased'\], expected one of biased, unbiased"),
        ({"steps": 2}, "0 to 1"),
        ({"steps": 0}, "steps is 0"),
        ({"sampled": [0, 0, 1]}, "expected different ones"),
        ({"sampled": [0, 1]}, r"matrices are \(3, 4, 4\)"),
        ({"matrices": [triangle[:-1]] * 3}, "matrix 0: expected a list of 10 numbers"),
        ({"matrices": [triangle[:-1] + ["1"]] * 3}, "matrix 0"),
        ({"matrices": [triangle[:-1] + [1.5]] * 3}, "outside -1 to 1"),
        ({"matrices": [triangle[:-1] + [10**400]] * 3}, "beyond float64"),
        ({"matrices": None}, "expected two lists"),
        ({"layers": {"a": {}}}, "layer 'a': missing field"),
        ({"metadata": []}, "metadata is list"),
        ({"extra": 1}, "unknown key 'extra'"),
    ]:
        (tmp_path / "b.json").write_text(json.dumps(document | change))
        with pytest.raises(SensitivityError, match=says) as error:
            Orthogonality.load(tmp_path / "b.json")
        assert "b.json" in str(error.value)
    del document["sampled"]
    (tmp_path / "b.json").write_text(json.dumps(document))
    with pytest.raises(SensitivityError, match="missing key 'sampled'"):
        Orthogonality.load(tmp_path / "b.json")


def test_bad_input(bundled, net):
    pipe, texts, model = bundled.pipe, bundled.prompts, net.model
    cases = [
        ({"prompts": texts, "timesteps": 0}, "timesteps is 0, expected 1 to 1"),
        ({"prompts": texts, "steps": 4, "timesteps": 5}, "timesteps is 5, expected 1 to 4"),
        ({"prompts": texts, "steps": 4, "timesteps": [4]}, "0 to 3"),
        ({"prompts": texts, "steps": 4, "timesteps": []}, "sampled steps are"),
        ({"prompts": texts, "steps": 0}, "steps is 0"),
        ({"prompts": texts[:1]}, "1 prompt in batches of at most 32 make one of 1, expected at least 2"),
        ({"prompts": texts[:5], "estimator": "unbiased", "batch_size": 4}, "make one of 2, expected at least 4"),
        ({"prompts": texts, "batch_size": 0}, "batch_size is 0"),
        ({"prompts": texts, "estimator": "both"}, "estimator is 'both'"),
        ({}, "expected a diffusers pipeline and prompts"),
    ]
    for options, says in cases:
        with pytest.raises(SensitivityError, match=says):
            orthogonality(pipe, **options)
    with pytest.raises(MixDQError, match="prompts is empty"):
        orthogonality(pipe, [])
    sample, time = net.batches[0], torch.tensor(1.0)
    bare = [
        ({"run": lambda: None}, "no linear or convolution layer ran"),
        ({"run": lambda: model(sample[:1], time)}, "called with 1 sample, expected at least 2"),
        ({"run": lambda: model(sample[:3], time), "estimator": "unbiased"}, "called with 3 samples"),
        ({"run": net.run, "steps": 4}, "step 3 is to be sampled, but only 3 came"),
        ({"run": net.run, "steps": 2}, "shown 3 different timesteps; give steps=3"),
        ({"run": net.run, "timesteps": 2}, "steps is None"),
        ({"run": lambda: model(torch.full_like(sample, float("nan")), time)}, "layer 'conv': its output at step 0"),
        ({"run": lambda: model(sample, torch.arange(6.0))}, "timestep differs between the samples"),
        ({}, "a module and run="),
    ]
    for options, says in bare:
        with pytest.raises(SensitivityError, match=says):
            orthogonality(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
