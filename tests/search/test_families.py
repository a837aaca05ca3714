"""Models that return or use the text in other ways than SDXL: lists of samples, text nothing reads, several outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from mixdq_ao import Sampling, SensitivityError, allocate, analyze, calibrate
from mixdq_ao.errors import CalibrationError, MixDQError
from mixdq_ao.models.outputs import denoised, with_denoised
from mixdq_ao.models.pipelines import generate_all
from tests.search.test_zoo import PROMPTS, plain, with_bos
from tests.search.zoo import TOKENS, WIDTH, Entry, ToyPipeline


def qwen_image() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )


def qwen_inputs(latent: Tensor, text: Tensor) -> dict[str, Any]:
    shapes = [[(1, 4, 4)]] * len(latent)
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    common = {"encoder_hidden_states_mask": mask, "img_shapes": shapes}
    return {
        "hidden_states": latent,
        "encoder_hidden_states": text,
        "timestep": torch.full((len(latent),), 0.5),
    } | common


def z_image() -> nn.Module:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for p in model.parameters():  # some begin empty
            p.copy_(torch.randn_like(p) * 0.1)
    return model


def z_inputs(latent: Tensor, text: Tensor) -> dict[str, Any]:
    return {"x": list(latent), "t": torch.full((len(latent),), 0.5), "cap_feats": list(text)}


QWEN = Entry(qwen_image, (16, 16), qwen_inputs, "txt_in")
Z = Entry(z_image, (4, 1, 8, 8), z_inputs, "cap_embedder.1")


class ListPipeline(ToyPipeline):
    """Z-Image's transformer takes and returns a list with a tensor for each sample."""

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **kwargs: Any) -> SimpleNamespace:
        latent = torch.stack([torch.randn(*self.entry.latent, generator=g) for g in generator])
        text = torch.stack([self.text(int(p)) for p in prompt])
        output = torch.stack(self.transformer(**self.entry.inputs(latent, text), return_dict=False)[0])
        plane = output.flatten(1)[:, :64].unflatten(1, (1, 8, 8))
        return SimpleNamespace(images=plane.repeat(1, 3, 2, 2).sigmoid())


def agreement(pipe: Any) -> tuple[Any, Any]:
    """Sensitivities by one layer at a time and by probes."""
    calibration = calibrate(pipe, PROMPTS)
    common: dict[str, Any] = {"calibration": calibration, "weight_bits": (4, 8), "rule": lambda _: "quality"}
    exact = analyze(pipe, PROMPTS, method="one_at_a_time", **common)
    return exact, analyze(pipe, PROMPTS, method="probe", probes=32, **common)


@pytest.mark.parametrize("pipe", [ToyPipeline(QWEN, plain), ListPipeline(Z, plain)], ids=["Qwen-Image", "Z-Image"])
def test_probes_agree_with_one_layer_at_a_time(pipe):
    exact, probed = agreement(pipe)
    assert exact.layers.keys() == probed.layers.keys()
    for name, layer in exact.layers.items():
        for bits in (4, 8):
            error, estimate = layer.weight_errors[bits], probed.layers[name].weight_errors[bits]
            if error == 0:  # Qwen-Image's last block computes text that nothing reads
                assert estimate == 0, name
            else:
                assert 0.2 < estimate / error < 5, (name, bits, estimate, error)


def test_text_that_nothing_reads_costs_nothing():
    pipe = ToyPipeline(QWEN, plain)
    calibration = calibrate(pipe, PROMPTS)
    probed = analyze(pipe, PROMPTS, method="probe", probes=2, calibration=calibration, weight_bits=(2, 8))
    dead = {n for n, layer in probed.layers.items() if layer.weight_errors[2] == 0}
    query = {"transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"}
    assert dead == query | {n for n in probed.layers if "1.txt_mlp" in n}
    plan = allocate(probed, weight_bits=6, weight_choices=(2, 8), objective="additive").plan
    assert {plan.layers[n].weight_bits for n in dead} == {2}


class Experts(nn.Module):
    """HiDream's experts run without gradients; what they give is used all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        x = self.first(sample)
        with torch.no_grad():
            routed = self.expert(x)
        return (self.last(x + routed),)


class Cut(Experts):
    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        x = self.first(sample)
        return (self.last(x + self.expert(x).detach()),)


@pytest.mark.parametrize("kind, says", [(Experts, "'expert': the model calls it without gradients"), (Cut, "expert")])
def test_layers_out_of_a_gradients_reach_are_not_taken_for_dead(kind, says):
    entry = Entry(kind, (16, 4), lambda x, t: {"sample": x, "encoder_hidden_states": t}, "")
    pipe = ToyPipeline(entry, plain)
    calibration = calibrate(pipe, PROMPTS)
    with pytest.raises(SensitivityError, match=says):
        analyze(pipe, PROMPTS, method="probe", probes=1, calibration=calibration, rule=lambda _: "quality")


class InPlace(Experts):
    """As HiDream's, whose experts' outputs are weighted in place."""

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        x = self.first(sample)
        return (self.last(x + self.expert(x).mul_(0.5)),)


def test_outputs_changed_in_place_are_computed_again():
    entry = Entry(InPlace, (16, 4), lambda x, t: {"sample": x, "encoder_hidden_states": t}, "")
    pipe = ToyPipeline(entry, plain)
    common: dict[str, Any] = {"calibration": calibrate(pipe, PROMPTS), "weight_bits": (4,), "act_bits": ()}
    common |= {"method": "one_at_a_time", "rule": lambda _: "quality"}
    replayed, whole = (analyze(pipe, PROMPTS, replay=replay, **common) for replay in (True, False))
    assert replayed.layers == whole.layers


class Sound(nn.Module):
    """As LTX-2: a large output and a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.sound = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.picture(sample), self.sound(sample[:, :2])


def test_every_output_is_judged():
    entry = Entry(Sound, (16, 4), lambda x, t: {"sample": x, "encoder_hidden_states": t}, "")
    exact, probed = agreement(ToyPipeline(entry, plain))
    for found in (exact, probed):
        small, large = (found.layers[n].weight_errors[4] for n in ("sound", "picture"))
        assert 0.1 < small / large < 10


@pytest.mark.parametrize(
    "output",
    [
        torch.randn(2, 3, 4),
        (torch.randn(2, 3, 4),),
        (torch.randn(2, 3, 4), None, torch.ones(2, dtype=torch.int64)),
        (torch.randn(2, 3, 4), torch.randn(2, 5)),
        ([torch.randn(3, 4), torch.randn(3, 4)], {}),
        diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=torch.randn(2, 3, 4)),
        diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=[torch.randn(3, 4), torch.randn(3, 4)]),
    ],
    ids=lambda output: type(output).__name__,
)
def test_outputs_are_taken_apart_and_put_together(output):
    value = denoised(output)
    assert value.shape[0] == 2
    again = with_denoised(output, 2 * value)
    assert type(again) is type(output)
    assert torch.allclose(denoised(again), 2 * value)
    if isinstance(output, tuple):
        assert [type(item) for item in again] == [type(item) for item in output]


def test_the_mean_error_of_each_output_counts_alike():
    large, small = torch.randn(2, 100), torch.randn(2, 10)
    value = denoised((large, small))
    assert torch.equal(value[:, :100], large)
    assert value[:, 100:].square().sum() == pytest.approx(small.square().sum().item() * 10, rel=1e-5)


def test_an_output_without_numbers():
    with pytest.raises(MixDQError, match="without a floating-point tensor"):
        denoised((None,))


class Unnamed(nn.Module):
    """Its text projection has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.look_here, self.rest = nn.Linear(WIDTH, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return (self.rest(sample + self.look_here(encoder_hidden_states).mean(1, keepdim=True)),)


class Deaf(Unnamed):
    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return (self.rest(sample + self.look_here(2 * encoder_hidden_states).mean(1, keepdim=True)),)


def text_pipeline(kind: type[nn.Module], text: Any) -> ToyPipeline:
    return ToyPipeline(Entry(kind, (16, 4), lambda x, t: {"sample": x, "encoder_hidden_states": t}, ""), text)


def test_what_is_given_the_text_reads_it():
    found = calibrate(text_pipeline(Unnamed, with_bos), PROMPTS)
    assert found.bos_embedding == pytest.approx(with_bos(0)[0].tolist())
    assert {n for n, v in found.layers.items() if v.prompt_range is not None} == {"look_here"}


def test_text_that_no_known_layer_reads():
    pipe = text_pipeline(Deaf, with_bos)
    assert "no layer is known to read the text" in calibrate(pipe, PROMPTS).metadata["text_rows"]
    with pytest.raises(CalibrationError, match="bos=True, but no linear layer of Deaf is known to read the text"):
        calibrate(pipe, PROMPTS, bos=True)


def test_padding_is_no_row():
    def padded(i: int) -> Tensor:
        return torch.cat([plain(i)[:2], torch.zeros(TOKENS - 2, WIDTH)])

    note = calibrate(text_pipeline(Unnamed, padded), PROMPTS).metadata["text_rows"]
    assert "no row set apart: the highest peak" in note


def test_a_second_denoiser_is_named():
    """Wan 2.2 draws the last steps with another transformer."""
    pipe = text_pipeline(Unnamed, plain)
    pipe.transformer_2 = Unnamed()
    with pytest.warns(UserWarning, match=r"also denoises with transformer_2.*calibrate\(pipe.transformer_2, run="):
        calibrate(pipe, PROMPTS)


def test_text_given_by_place():
    class ByPlace(Unnamed):
        pass

    pipe = text_pipeline(ByPlace, with_bos)
    forward = pipe.transformer.__call__
    run = lambda: forward(torch.randn(3, 16, 4), torch.stack([with_bos(i) for i in range(3)]))  # noqa: E731
    assert calibrate(pipe.transformer, run=run).layers["look_here"].prompt_range is not None


def test_a_text_of_one_token():
    with pytest.raises(CalibrationError, match="has no rows besides the first"):
        calibrate(text_pipeline(Unnamed, lambda i: with_bos(0)[:1]), PROMPTS, bos=True)


def test_samples_of_different_shapes():
    with pytest.raises(MixDQError, match=r"samples of shapes \[\[2\], \[3\]\]"):
        denoised(([torch.ones(2), torch.ones(3)],))


class OneImage(ToyPipeline):
    """Kandinsky 5 calls its pictures ``image``."""

    def __call__(self, *args, **kwargs):
        return SimpleNamespace(image=super().__call__(*args, **kwargs).images)


def test_pictures_under_another_name():
    entry = Entry(Unnamed, (16, 4), lambda x, t: {"sample": x, "encoder_hidden_states": t}, "")
    drawn = generate_all(OneImage(entry, plain), PROMPTS, Sampling())
    assert torch.equal(drawn, generate_all(ToyPipeline(entry, plain), PROMPTS, Sampling()))


class Passing(ToyPipeline):
    def __call__(self, *args, **kwargs):
        self.guidance = kwargs["guidance_scale"]
        return super().__call__(*args, **kwargs)


def test_guidance_goes_through_a_call_of_any_arguments():
    pipe = Passing(Entry(Unnamed, (16, 4), lambda x, t: {"sample": x, "encoder_hidden_states": t}, ""), plain)
    generate_all(pipe, PROMPTS, Sampling(guidance_scale=3.0))
    assert pipe.guidance == 3.0


def test_errors_of_ours_are_not_taken_for_missing_pictures():
    class Optional(ToyPipeline):
        def __call__(self, prompt, generator, image=None, **kwargs):  # type: ignore[override]
            raise SensitivityError("layer 'a' is not in the calibration")

    pipe = Optional(Entry(Unnamed, (16, 4), lambda x, t: {"sample": x, "encoder_hidden_states": t}, ""), plain)
    with pytest.raises(SensitivityError, match="layer 'a' is not in the calibration"):
        generate_all(pipe, PROMPTS, Sampling())


class Unguided(ToyPipeline):
    def __call__(self, prompt, num_inference_steps, generator, output_type):  # type: ignore[override]
        return super().__call__(prompt, generator)


def test_a_pipeline_without_guidance():
    pipe = Unguided(Entry(Unnamed, (16, 4), lambda x, t: {"sample": x, "encoder_hidden_states": t}, ""), plain)
    assert generate_all(pipe, PROMPTS, Sampling()).shape[0] == 3
    with pytest.raises(MixDQError, match="guidance_scale is 2.0, expected 0: Unguided takes no guidance_scale"):
        generate_all(pipe, PROMPTS, Sampling(guidance_scale=2.0))
