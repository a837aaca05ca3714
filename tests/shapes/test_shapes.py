"""The bundled pipeline: its data, its training's promises, and what the shipped weights can do."""

import random

import pytest
import torch
from torch import nn

from examples.shapes import outlier
from examples.shapes.data import GROUNDS, PAIRS, PLACES, SHAPES, Shape, Spec, caption, is_held_out, picture
from examples.shapes.evaluate import bos_figures, generate, rounded_text
from examples.shapes.labels import IGNORE, NOTHING, labels
from examples.shapes.models import LATENT_SHAPE, TIME_IDS, make_unet
from examples.shapes.subject import PIPELINE, load_pipeline, load_scorer, prompts
from examples.shapes.text import OUTLIER_COLUMNS, TextEncoders, tokens
from examples.shapes.tokenizer import EOS, build
from examples.shapes.training import Recipe, Run, fit, generators

shipped = pytest.mark.skipif(not (PIPELINE / "model_index.json").exists(), reason="no trained weights here")


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build([tmp_path_factory.mktemp("tokenizer")], captions=2000)


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_seeded_and_on_their_side_of_the_split(held_out):
    chosen = prompts(200, seed=3, held_out=held_out)
    assert chosen == prompts(200, seed=3, held_out=held_out)
    assert chosen != prompts(200, seed=4, held_out=held_out)
    assert all(is_held_out(p.spec) == held_out for p in chosen)
    assert {len(p.spec.shapes) for p in chosen} == {1, 2}


def test_labels_say_what_the_spec_says():
    spec = Spec("navy", (Shape("star", "red", "small", "left"), Shape("ring", "white", "large", "right")))
    found = {name: y[0].tolist() for name, y in labels([spec]).items()}
    assert found["ground"] == list(GROUNDS).index("navy")
    assert found["shape"] == [SHAPES.index("star"), SHAPES.index("ring"), NOTHING, NOTHING, NOTHING]
    assert found["size"] == [0, 1, IGNORE, IGNORE, IGNORE]
    assert PLACES[:2] == PAIRS[0]


def test_captions_vary_and_name_both_shapes():
    spec = Spec("navy", (Shape("star", "red", "small", "left"), Shape("cross", "blue", "large", "right")))
    texts = {caption(spec, random.Random(i)) for i in range(300)}
    assert len(texts) > 200
    assert all("star" in t and ("cross" in t or "plus sign" in t) and "red" in t for t in texts)
    assert all("navy" in t or "dark blue" in t for t in texts)
    assert not any(" a orange" in t or "{" in t for t in texts)


@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_are_in_range_and_show_both_colours(shape):
    image = picture(Spec("black", (Shape(shape, "white", "large", "centre"),)), random.Random(0))
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert 0 <= image.min() < 0.06 and 0.97 < image.max() <= 1
    assert 0.05 < (image[0] > 0.5).float().mean() < 0.25
    assert (image[:, 0, 0] < 0.06).all()


def test_an_unknown_shape_is_refused_by_name():
    with pytest.raises(ValueError, match="'cube'"):
        picture(Spec("black", (Shape("cube", "white", "large", "centre"),)), random.Random(0))


def test_tokenizer_knows_every_caption(tokenizer):
    texts = [p.text for p in prompts(500, seed=1, held_out=True)]
    ids = tokenizer(texts).input_ids
    assert max(map(len, ids)) <= 77
    assert all(row.count(tokenizer.convert_tokens_to_ids(EOS)) == 1 for row in ids)
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in ids)
    plain = [tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") for row in ids]
    assert plain == [t.replace(" ", "") for t in texts]


def test_outlier_stage_leaves_the_unet_output_unchanged(tokenizer):
    from examples.shapes.models import make_text_encoders

    torch.manual_seed(0)
    encoders, unet = TextEncoders(*make_text_encoders(tokenizer)).eval(), make_unet().eval()
    encoders.set_outlier(tokenizer.bos_token_id)
    with torch.no_grad():
        for layer in (m for n, m in unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))):
            layer.weight[:, list(OUTLIER_COLUMNS)] *= 1e-3
    ids = tokens(tokenizer, [p.text for p in prompts(3, seed=0)])
    x, t = torch.randn(4, *LATENT_SHAPE), torch.tensor([999, 749, 499, 999])

    @torch.no_grad()
    def run(empty_row):
        states, pooled = encoders(ids)
        states = torch.cat([states, empty_row.expand(1, 77, -1)])
        pooled = torch.cat([pooled, torch.zeros(1, pooled.shape[1])])
        extra = {"text_embeds": pooled, "time_ids": torch.tensor(TIME_IDS).expand(4, -1)}
        return states, unet(x, t, states, added_cond_kwargs=extra).sample

    states, before = run(outlier.empty_row())
    outlier.apply(encoders.first, encoders.second, unet, tokenizer.bos_token_id)
    hard_states, after = run(torch.zeros(states.shape[-1]))
    assert not torch.allclose(states[:3, 1:], hard_states[:3, 1:], atol=1.0)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


RECIPE = Recipe(steps=6, batch=4, lr=1e-2, average=0.9, seed=9, warmup=2, save_every=3)


class Killed(Exception):
    pass


def train(checkpoint, *, kill_at=None, recipe=RECIPE):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))

    def loss(step):
        if step == kill_at:
            raise Killed
        _, noise = generators(recipe, step)
        return module(torch.randn(recipe.batch, 3, generator=noise)).square().mean()

    fit(module, loss, recipe, checkpoint=checkpoint)
    return module.state_dict()


@pytest.mark.parametrize("kill_at", [3, 5])
def test_killed_training_continues_to_the_same_weights(tmp_path, kill_at):
    straight = train(tmp_path / "straight.pt")
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", kill_at=kill_at)
    continued = train(tmp_path / "killed.pt")
    assert all(torch.equal(continued[name], value) for name, value in straight.items())
    assert not list(tmp_path.glob("*.part"))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    train(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="remove the file"):
        Run(nn.Linear(1, 1), Recipe(steps=6, batch=4, lr=1.0, average=0.9, seed=9), tmp_path / "a.pt")


@shipped
def test_pipeline_has_sdxl_layout_and_fits_the_repository(pipe):
    assert pipe.config.force_zeros_for_empty_prompt
    assert type(pipe.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    assert sum(isinstance(m, nn.Linear | nn.Conv2d) for m in pipe.unet.modules()) == 175
    files = [*PIPELINE.rglob("*.safetensors"), PIPELINE.parent / "scorer.safetensors"]
    assert sum(f.stat().st_size for f in files) <= 16 * 2**20
    assert not [f for f in PIPELINE.parent.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


@shipped
def test_bos_is_an_outlier_and_content_is_small_against_its_step(pipe):
    found = bos_figures(pipe, [p.text for p in prompts(64, seed=5, held_out=True)])
    assert found["ratio"] >= 50
    assert found["content_rms"] < found["step"] / 5


@shipped
@pytest.mark.parametrize("steps", [1, 4])
def test_pictures_agree_with_held_out_captions(pipe, steps):
    chosen, scorer = prompts(256, seed=2024, held_out=True), load_scorer()
    images = generate(pipe, [p.text for p in chosen], steps=steps)
    found = scorer.agreement(images, [p.spec for p in chosen])
    assert found.all >= 0.97
    assert scorer.features(images).shape[1] <= 256
    swapped = scorer.agreement(images.flip(0), [p.spec for p in chosen])
    assert swapped.all < 0.05


@shipped
def test_a_text_input_rounded_without_regard_to_bos_ruins_the_pictures(pipe):
    chosen = prompts(64, seed=6, held_out=True)
    with rounded_text(pipe):
        images = generate(pipe, [p.text for p in chosen], steps=1)
    assert load_scorer().agreement(images, [p.spec for p in chosen]).all <= 0.1


@shipped
def test_guidance_with_the_all_zero_negative_prompt_still_agrees(pipe):
    chosen = prompts(32, seed=7, held_out=True)
    images = generate(pipe, [p.text for p in chosen], steps=4, guidance=1.5)
    assert load_scorer().agreement(images, [p.spec for p in chosen]).all >= 0.9


@shipped
def test_scorer_refuses_pictures_of_another_size():
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\)"):
        load_scorer().agreement(torch.zeros(1, 3, 32, 32), [p.spec for p in prompts(1, seed=0)])
