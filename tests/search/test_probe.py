"""Random probes: exact on linear models, the ranking of one layer at a time elsewhere, and nothing left behind."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from mixdq_ao import MixDQError, Sampling, SensitivityError, analyze, calibrate
from mixdq_ao.quantize.config import MixDQLayerConfig, fake_quantizer
from mixdq_ao.quantize.fake import with_fake_quantizer
from mixdq_ao.search import probe as probe_module
from mixdq_ao.search.evaluation import Evaluation
from mixdq_ao.search.probe_baseline import gradient_scores
from mixdq_ao.search.probe_delta import LayerDeltas, deltas_of
from mixdq_ao.search.probe_stats import rank_correlation
from mixdq_ao.search.store import Store
from mixdq_ao.search.trial import Trials
from tests.conftest import small_unet, text_rows, unet_inputs
from tests.default_dtype import default_dtype

PROMPTS = ["one", "two", "three"]


class Linear(nn.Module):
    """Three linear maps in a row; ``spare`` is called, but ``detached`` keeps its gradient away."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.third = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 6)
        self.spare, self.detached = nn.Linear(6, 6), detached

    def forward(self, sample: Tensor, timestep: int = 0) -> tuple[Tensor]:
        y = self.third(self.second(self.first(sample)))
        return (y + self.spare(sample).detach(),) if self.detached else (y,)


class Toy:
    """A pipeline around Linear: every step takes half of the model's output off; pictures are linear in the latents."""

    def __init__(self, detached: bool = False) -> None:
        self.unet = Linear(detached)
        torch.manual_seed(4)
        self.decoder = torch.randn(6, 3 * 4 * 4) / 4

    @torch.no_grad()
    def __call__(
        self, prompt: list[str], num_inference_steps: int, generator: list[torch.Generator], output_type: str, **_: Any
    ) -> SimpleNamespace:
        x = torch.stack([torch.randn(5, 6, generator=g) for g in generator])
        for step in range(num_inference_steps):
            x = x - 0.5 * self.unet(x, timestep=step)[0]
        pictures = 0.5 + (x.mean(1) @ self.decoder).view(-1, 3, 4, 4) / 10
        return SimpleNamespace(images=x if output_type == "latent" else pictures)


class Small:
    """A pipeline of one call of the small UNet with fixed inputs."""

    def __init__(self) -> None:
        self.unet = small_unet()
        torch.manual_seed(4)
        self.inputs = unet_inputs(3)

    def __call__(self, output_type: str, **_: Any) -> SimpleNamespace:
        y = self.unet(**self.inputs)[0]
        return SimpleNamespace(images=y if output_type == "latent" else y[:, :3].sigmoid())


def quality(name: str):
    return "quality"


def content(name: str):
    return "content"


@pytest.fixture(scope="module")
def small():
    pipe = Small()
    return pipe, calibrate(pipe.unet, run=lambda: pipe.unet(**pipe.inputs))


def measured(pipe: Any, prompts: list[str], calibration: Any, choices: list[Evaluation]) -> np.ndarray:
    """Error powers of one layer at a time."""
    trials = Trials(pipe, prompts, Sampling())
    embedding = torch.tensor(calibration.bos_embedding)
    with torch.no_grad():
        results = [trials.measure(c.name, c.layer(calibration), embedding, images=False) for c in choices]
    return np.array([r["error"] for r in results])


def test_exact_on_a_linear_model():
    """Quantizing one layer of a linear model is what its first-order term says: every estimate is within its error."""
    pipe = Toy()
    calibration = calibrate(pipe, PROMPTS)
    options: dict[str, Any] = {"calibration": calibration, "weight_bits": (2, 4), "act_bits": (4,), "batch_size": 2}
    exact = analyze(pipe, PROMPTS, rule=quality, **options)
    estimate = analyze(pipe, PROMPTS, method="probe", probes=300, rule=quality, **options)
    assert list(estimate.layers) == list(exact.layers) == ["first", "second", "third"]
    for name, layer in exact.layers.items():
        for kind in ("weight", "act"):
            for bits, value in layer.errors(kind).items():
                deviation = estimate.layers[name].errors(kind)[bits] - value
                standard = estimate.metadata["standard_errors"][name][kind][str(bits)]
                assert abs(deviation) < 3.5 * standard, (name, kind, bits)
                assert 0 < standard < 0.1 * value
                assert estimate.layers[name].scores(kind)[bits] == pytest.approx(layer.scores(kind)[bits], abs=1.0)
        assert estimate.layers[name].weight_bytes == layer.weight_bytes
        assert (estimate.layers[name].weight_size, estimate.layers[name].act_size) == (
            layer.weight_size,
            layer.act_size,
        )


@pytest.mark.parametrize("steps", [1, 3])
def test_pictures_see_a_layer_changed_in_all_steps(steps):
    pipe = Toy()
    calibration = calibrate(pipe, PROMPTS, steps=steps)
    sampling = Sampling(steps=steps)
    estimate = analyze(
        pipe, PROMPTS, method="probe", probes=100, calibration=calibration, steps=steps, act_bits=(), rule=content
    )
    trials = Trials(pipe, PROMPTS, sampling, replay=False)
    reference = trials.batches[0].reference.images
    assert reference is not None
    for name in ("first", "third"):
        with trials._changed(name, Evaluation(name, "weight", 8).layer(calibration), None):
            images = trials._run(PROMPTS, trials.batches[0].sampling, True).images
        assert images is not None
        measured = (images - reference).double().square().mean().item()
        figure = estimate.metadata["picture_errors"][name]["weight"]["8"]
        standard = estimate.metadata["picture_standard_errors"][name]["weight"]["8"]
        assert abs(figure - measured) < 3.5 * standard + 0.02 * measured
        assert estimate.layers[name].weight_scores[8] == pytest.approx(-10 * math.log10(figure))


@pytest.mark.parametrize(("kind", "bits"), [("weight", 4), ("act", 8)])
def test_rank_of_one_at_a_time_on_the_small_unet(small, kind, bits):
    pipe, calibration = small
    widths = {"weight_bits": (4,), "act_bits": ()} if kind == "weight" else {"weight_bits": (), "act_bits": (8,)}
    result = analyze(pipe, PROMPTS, method="probe", probes=16, calibration=calibration, rule=quality, **widths)
    choices = [Evaluation(n, kind, bits) for n in list(result.layers)[::2]]
    one = measured(pipe, PROMPTS, calibration, choices)
    estimate = np.array([result.layers[c.name].errors(kind)[bits] for c in choices])
    assert len(one) > 30 and spearmanr(one, estimate).statistic >= 0.95
    assert 0.8 < np.median(estimate / one) < 1.25


def test_rank_of_one_at_a_time_on_the_bundled_pipeline(bundled):
    prompts, calibration = bundled.prompts[:4], bundled.calibration
    result = analyze(
        bundled.pipe, prompts, method="probe", probes=4, calibration=calibration, weight_bits=(4,), act_bits=()
    )
    assert len(result.layers) == 175 and result.metadata["content_score"] == "psnr"
    assert all(0 < v.weight_scores[4] <= 120 for v in result.layers.values())
    choices = [Evaluation(n, "weight", 4) for n in list(result.layers)[::9]]
    one = measured(bundled.pipe, prompts, calibration, choices)
    assert spearmanr(one, [result.layers[c.name].weight_errors[4] for c in choices]).statistic >= 0.95


@pytest.mark.parametrize(
    "name",
    [
        "conv_in",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "up_blocks.0.resnets.0.conv_shortcut",
    ],
)
def test_deltas_are_what_fake_mode_changes(unet, calibration, name):
    module, embedding = unet.get_submodule(name), torch.tensor(calibration.bos_embedding)
    inputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, a, o: inputs.append(a[0].detach()))
    unet(**unet_inputs(2))
    handle.remove()
    choices = [Evaluation(name, k, b) for k, b in (("weight", 2), ("weight", 8), ("act", 4), ("act", 8))]
    stack = LayerDeltas(module, choices, calibration, embedding).stack(inputs[0], 2)
    for choice, delta in zip(choices, stack.unbind(1), strict=True):
        plan = choice.layer(calibration)
        assert (plan.split is not None) == name.endswith("shortcut")
        config = MixDQLayerConfig(plan, "fake", embedding if plan.bos else None, name)
        with torch.no_grad():
            changed = with_fake_quantizer(copy.deepcopy(module), fake_quantizer(config))(inputs[0])
            expected = (changed - module(inputs[0])).flatten(1)
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_another_default_type_changes_nothing(small):
    pipe, calibration = small
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    shared: dict[str, Any] = {"calibration": calibration, "weight_bits": (4,), "act_bits": (), "rule": quality}
    found = analyze(pipe, PROMPTS, **shared)
    with default_dtype(torch.bfloat16):
        assert analyze(pipe, PROMPTS, **shared).layers[name] == found.layers[name]
        bos = deltas_of(pipe.unet, calibration, (4,), ())[name].bos
    assert bos is not None and torch.equal(bos, torch.tensor(calibration.bos_embedding))


def test_bos_rows_are_not_counted(unet, calibration):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    choices = [Evaluation(name, "weight", 4), Evaluation(name, "act", 8)]
    deltas = LayerDeltas(unet.get_submodule(name), choices, calibration, torch.tensor(calibration.bos_embedding))
    stack = deltas.stack(text_rows(2), 2).reshape(2, 2, 7, -1)
    assert stack[:, :, 0].abs().max() == 0
    assert (stack[:, :, 1:].abs().amax(-1) > 0).all()


def test_same_seed_same_result_whatever_the_memory(small):
    pipe, calibration = small
    options: dict[str, Any] = {"calibration": calibration, "method": "probe", "probes": 3, "weight_bits": (4,)}
    results = [analyze(pipe, PROMPTS, budget=b, **options).to_json() for b in (4 << 30, 4 << 30, 100_000, 0)]
    assert all(r == results[0] for r in results)
    assert analyze(pipe, PROMPTS, seed=1, **options).to_json()["layers"] != results[0]["layers"]


def test_probes_are_added_until_the_ranking_is_settled(small):
    pipe, calibration = small
    options: dict[str, Any] = {"calibration": calibration, "method": "probe", "weight_bits": (4,), "rule": quality}
    few, many = (analyze(pipe, PROMPTS, precision=p, **options).metadata for p in (0.5, 0.99999))
    assert few["probes"] == 2 and many["probes"] == probe_module.MAX_PROBES
    assert min(many["settled"].values()) > min(few["settled"].values()) > 0.5


def test_an_interrupted_run_continues_with_the_same_result(tmp_path, monkeypatch):
    pipe = Toy()
    options: dict[str, Any] = {"method": "probe", "probes": 6, "rule": content, "steps": 2, "batch_size": 2}
    options["calibration"] = calibrate(pipe, PROMPTS)
    whole = analyze(pipe, PROMPTS, **options).to_json()
    put, count = Store.put, 0

    def failing(self, key, value):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        put(self, key, value)

    monkeypatch.setattr(Store, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        analyze(pipe, PROMPTS, store=tmp_path / "s", **options)
    assert (tmp_path / "s").read_bytes().count(b"\n") == 6
    count = -100
    assert analyze(pipe, PROMPTS, store=tmp_path / "s", **options).to_json() == whole
    assert count == -100 + 12 - 5
    with pytest.raises(SensitivityError, match="other settings"):
        analyze(pipe, PROMPTS, store=tmp_path / "s", **{**options, "seed": 1})


def test_nothing_is_left_behind_after_an_error(monkeypatch):
    pipe = Toy()
    calibration, calls = calibrate(pipe, PROMPTS), 0
    pipe.unet.second.weight.requires_grad_(False)
    stack = LayerDeltas.stack

    def failing(self, x, groups):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("stop")
        return stack(self, x, groups)

    monkeypatch.setattr(LayerDeltas, "stack", failing)
    for budget in (4 << 30, 0):  # fails in the second batch's forward pass, and in a backward pass
        calls = 0
        with pytest.raises(RuntimeError, match="stop"):
            analyze(pipe, PROMPTS, method="probe", calibration=calibration, budget=budget, rule=quality, batch_size=2)
        for module in pipe.unet.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
        trainable = {n for n, p in pipe.unet.named_parameters() if p.requires_grad}
        assert trainable == {n for n, _ in pipe.unet.named_parameters()} - {"second.weight"}
        assert all(p.grad is None for p in pipe.unet.parameters())


def test_a_layer_out_of_reach_is_named():
    pipe = Toy(detached=True)
    with pytest.raises(SensitivityError, match="layers spare: called, but no gradient"):
        analyze(pipe, PROMPTS, method="probe", rule=quality)


def test_pictures_without_gradients_are_refused(small):
    pipe = copy.copy(small[0])
    pipe.__class__ = type("Detached", (Small,), {"__call__": lambda s, **k: _detached(Small.__call__(s, **k))})
    with pytest.raises(SensitivityError, match="Detached: its pictures do not depend on the denoiser"):
        analyze(pipe, PROMPTS, method="probe", calibration=small[1])


def _detached(result: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(images=result.images.detach())


def test_bad_arguments(small):
    pipe, calibration = small
    for options, message in (
        ({"probes": 0}, "probes is 0"),
        ({"precision": 1.0}, "precision 1.0"),
        ({"weight_bits": (), "act_bits": ()}, "both empty"),
    ):
        with pytest.raises(MixDQError, match=message):
            analyze(pipe, PROMPTS, method="probe", calibration=calibration, **options)


def test_published_gradient_score_is_the_diagonal():
    """E sum (g dY)^2 = sum_j |J_j|^2 dY_j^2, which a linear model lets us write down."""
    pipe = Toy()
    calibration = calibrate(pipe, PROMPTS)
    scores = gradient_scores(pipe, PROMPTS, calibration, weight_bits=(4,), act_bits=(), probes=200)
    x = torch.stack([torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    deltas = LayerDeltas(pipe.unet.first, [Evaluation("first", "weight", 4)], calibration, None).stack(x, 3)
    jacobian = (pipe.unet.third.weight @ pipe.unet.second.weight).detach()
    expected = (deltas.reshape(-1, 24).square() @ jacobian.square().sum(0)).sum().item()
    assert scores["weight"]["first"][4] == pytest.approx(expected, rel=0.1)
    assert list(scores["weight"]) == ["first", "second", "third"] and not scores["act"]


def test_rank_correlation():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(a[:1], b[:1]) == 1.0


def test_equal_values_share_their_rank():
    a, b = [1.0, 2.0, 2.0, 3.0, 2.0], [0.0, 0.0, 5.0, 4.0, 5.0]
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    flat, rising = np.zeros(5), np.arange(5)
    assert rank_correlation(flat, rising) == rank_correlation(flat, -rising) == rank_correlation(rising, flat) == 0.0
    assert rank_correlation(flat, flat + 1) == 1.0
