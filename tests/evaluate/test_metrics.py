"""Metrics against their formulas in float64, by other roads than the library's."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import FID, LPIPS, PSNR, SSIM, Batch, CLIPScore, Gaussian
from mixdq_ao.evaluate.frechet import distance, influence
from mixdq_ao.evaluate.resize import clip_pixels, crop_to, from_pillow, stretch_to
from mixdq_ao.search.metrics import psnr, ssim

from .conftest import pictures


def features(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def direct_distance(a: np.ndarray, b: np.ndarray) -> float:
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 40, 3), (200, 300, 16), (30, 30, 1)])
def test_distance_against_the_formula_with_a_general_square_root(n, m, d):
    a, b = features(n, d, 0), features(m, d, 1)
    expected = ((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2) if d == 1 else direct_distance(a, b)
    assert distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(expected, rel=1e-9)
    assert distance(Gaussian.of(a), Gaussian.of(a)) == pytest.approx(0, abs=1e-9)


def test_influence_is_the_derivative_by_the_weight_of_a_picture():
    a, real = features(60, 4, 2), Gaussian.of(features(500, 4, 3))
    found = influence(a, real)
    assert found.mean() == pytest.approx(0, abs=1e-9)
    step = 1e-5
    for i in (0, 17, 59):
        values = []
        for share in (step, -step):  # the weighted mean and covariance, by definition
            weights = np.full(60, (1 - share) / 60)
            weights[i] += share
            mean = weights @ a
            covariance = (a - mean).T @ (weights[:, None] * (a - mean)) * 60 / 59
            values.append(distance(Gaussian(torch.tensor(mean), torch.tensor(covariance)), real))
        assert found[i] == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=2e-2 * abs(found).mean())


def test_fid_over_batches_is_that_of_all_and_has_no_interval_where_pictures_are_few():
    project = torch.randn(3 * 24 * 24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def look(images):
        return images.double().flatten(1) @ project / 1000

    images = pictures(40)
    metric = FID(look, Gaussian.of(features(100, 5, 4)))
    for batch in images.split(7):
        metric.update(Batch(images=batch))
    figure = metric.compute()
    rows = look(images).float().double().numpy()
    assert figure.value == pytest.approx(direct_distance(rows, features(100, 5, 4)), rel=1e-9)
    assert figure.count == 40 and figure.interval is not None and figure.interval.low < figure.value
    few = FID(look, Gaussian.of(features(100, 5, 4)))
    few.update(Batch(images=images[:5]))
    assert few.compute().interval is None and few.compute().value > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_clip_score_against_the_towers_written_out(clip, sign):
    images, prompts = pictures(3, side=32), ["a large red circle", "star", "a " * 200]
    model = copy.deepcopy(clip.model)
    with torch.no_grad():
        model.visual_projection.weight.mul_(sign)
    metric = CLIPScore(model, clip.tokenizer)
    found = metric.update(Batch(images=images, prompts=prompts))[:, 0]
    model = model.double()
    cosines = []
    for i, prompt in enumerate(prompts):  # one by one: padding and company must not matter
        ids = clip.tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt").input_ids
        mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).double().view(3, 1, 1)
        std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).double().view(3, 1, 1)
        pixels = (images[i].double() / 255 - mean) / std
        text = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0]
        image = model.visual_projection(model.vision_model(pixel_values=pixels[None]).pooler_output)[0]
        cosines.append((text @ image / (text.norm() * image.norm())).item())
    assert found == pytest.approx([100 * max(c, 0) for c in cosines], abs=1e-3)
    assert metric.compute().value == pytest.approx(found.mean())
    assert (min(cosines) > 0) is (sign < 0)  # so that one sign shows scores and the other where they end


def test_similarity_of_rounded_pictures():
    images, reference = pictures(4), pictures(4, seed=1)
    reference[1] = images[1]
    for metric, function in ((SSIM(), ssim), (PSNR(), psnr)):
        metric.update(Batch(images=images[:1], reference=reference[:1]))
        metric.update(Batch(images=images[1:], reference=reference[1:]))
        expected = function(images.double() / 255, reference.double() / 255)
        figure = metric.compute()
        assert figure.value == pytest.approx(expected.mean().item(), rel=1e-12)
        assert figure.linear == pytest.approx((expected - expected.mean()).numpy(), abs=1e-12)
    assert expected[1] == 100


def test_figures_say_what_they_are_against():
    """Whatever the batches: the mean and covariance of real pictures, or every picture of the reference."""
    real, shifted = (Gaussian.of(features(40, 3, 0) + shift) for shift in (0, 1))
    images, reference = pictures(4), pictures(4, seed=1)

    def against(metric, reference, size):
        for batch, other in zip(images.split(size), reference.split(size), strict=True):
            metric.update(Batch(images=batch, reference=other))
        return metric.compute().against

    def look(x):
        return x.float().mean((2, 3))

    found, other = (against(FID(look, given), reference, 2) for given in (real, shifted))
    assert found == {"real pictures": real.digest} != other
    whole = against(SSIM(), reference, 4)
    assert list(whole) == ["reference pictures"] and whole == against(SSIM(), reference, 1)
    assert whole != against(SSIM(), reference.flip(0), 4)


def test_lpips_by_any_distance():
    def mean_square(a, b):
        assert a.min() >= -1 and a.max() <= 1
        return (a - b).square().mean((1, 2, 3))

    metric = LPIPS(mean_square)
    images, reference = pictures(3), pictures(3, seed=1)
    metric.update(Batch(images=images, reference=reference))
    expected = ((images.double() - reference.double()) / 127.5).square().mean().item()
    assert metric.compute().value == pytest.approx(expected, rel=1e-6)


def test_what_a_metric_lacks_is_said(clip):
    for metric, word in ((SSIM(), "reference"), (CLIPScore(clip.model, clip.tokenizer), "prompts")):
        with pytest.raises(MixDQError, match=f"{metric.name} needs {word}"):
            metric.update(Batch(images=pictures(2)))
        with pytest.raises(MixDQError, match="has seen no picture"):
            metric.compute()
    with pytest.raises(MixDQError, match="needs prompts, one for each of 2 pictures; got 1"):
        CLIPScore(clip.model, clip.tokenizer).update(Batch(images=pictures(2), prompts=["a"]))
    real = Gaussian.of(features(10, 3, 0))
    with pytest.raises(MixDQError, match=r"features are \(2, 3, 24, 24\) for 2 pictures"):
        FID(lambda x: x.float(), real).update(Batch(images=pictures(2)))
    with pytest.raises(MixDQError, match="picture 1 of the batch is not finite"):
        FID(lambda x: torch.tensor([[1.0], [math.nan]]), real).update(Batch(images=pictures(2)))


def test_crop_and_stretch_are_pillows_and_keep_what_fits():
    image = pictures(1, side=32)[0]
    pixels = clip_pixels(image[None], 32)
    assert (
        pixels[0]
        .mul(torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1))
        .add(torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1))
        .mul(255)
        .round()
        .to(torch.uint8)
        .equal(image)
    )
    wide = Image.fromarray(np.zeros((20, 41, 3), np.uint8))
    wide.paste((255, 0, 0), (15, 0, 26, 20))
    assert crop_to(wide, 10).size == (10, 10)
    assert from_pillow(crop_to(wide, 10))[0, :, 4:6].min() == 255  # the middle stays the middle
    big = torch.full((1, 3, 40, 30), 77, dtype=torch.uint8)
    assert stretch_to(big, 13).shape == (1, 3, 13, 13) and stretch_to(big, 13).unique().tolist() == [77]


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_real_figures_are_read_back(tmp_path, kind):
    real = Gaussian.of(features(50, 4, 0))
    path = tmp_path / f"real.{kind}"
    if kind == "npz":
        np.savez(path, mu=real.mean.numpy(), sigma=real.covariance.numpy())
    else:
        real.save(path, "a network")
        with pytest.raises(MixDQError, match="was made by features 'a network', expected 'another'"):
            Gaussian.load(path, "another")
    found = Gaussian.load(path, "a network")
    assert torch.equal(found.mean, real.mean) and torch.equal(found.covariance, real.covariance)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(MixDQError, match="cannot be read"):
        Gaussian.load(path)


def test_a_pickle_in_an_npz_is_not_read(tmp_path):
    path = tmp_path / "real.npz"
    np.savez(path, mu=np.array([object()]), sigma=np.zeros((1, 1)))
    with pytest.raises(MixDQError, match="cannot be read"):
        Gaussian.load(path)
    np.savez(path, mu=np.zeros(2), sigma=np.zeros((3, 3)))
    with pytest.raises(MixDQError, match=r"mean is \(2,\) and covariance \(3, 3\)"):
        Gaussian.load(path)
