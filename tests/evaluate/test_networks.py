"""Networks of the extra `evaluate`, with random weights: what the wrappers add to the packages."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import LPIPS, Batch, Inception
from mixdq_ao.evaluate.resize import stretch_to

from .conftest import pictures


def needed(name: str):
    try:
        return __import__(name, fromlist=["x"])
    except (ImportError, RuntimeError) as e:  # torchvision of another torch raises RuntimeError
        pytest.skip(f"{name} cannot be imported: {e}; pip install -e '.[evaluate]'")


@pytest.fixture
def network(monkeypatch):
    """torch-fidelity's Inception with random weights."""
    module = needed("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        return kind("inception", ["2048"])


def test_inception_is_given_the_pictures_as_they_are(network, tmp_path):
    path = tmp_path / "inception.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    images = pictures(2, side=40)
    plain, clean = (Inception.load(path, resize=resize) for resize in ("tensorflow", "clean"))
    found = plain(images)
    assert found.shape == (2, 2048) and found.std() > 0
    assert torch.equal(found, network(images)[0])
    assert torch.equal(clean(images), network(stretch_to(images, 299))[0]) and not torch.equal(found, clean(images))
    assert plain.identity != clean.identity and plain.identity.startswith("inception ")
    save_file({"fc.bias": torch.zeros(3)}, path)
    with pytest.raises(MixDQError, match=r"inception\.safetensors: holds another network than FID's Inception v3"):
        Inception.load(path)


def test_lpips_is_torchmetrics_of_pictures_in_minus_one_to_one(monkeypatch):
    needed("torchvision")
    lpips = needed("torchmetrics.functional.image.lpips")
    features = lpips._get_tv_model_features
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained=False: features(net, False))
    torch.manual_seed(0)
    metric = LPIPS.load("alex")
    images, reference = pictures(2, side=64), pictures(2, side=64, seed=1)
    reference[1] = images[1]
    found = metric.update(Batch(images=images, reference=reference))[:, 0]
    torch.manual_seed(0)
    pair = (images.float() / 127.5 - 1, reference.float() / 127.5 - 1)
    expected = lpips.learned_perceptual_image_patch_similarity(*pair, net_type="alex", reduction="none")
    assert found == pytest.approx(expected.detach().numpy(), rel=1e-5, abs=1e-7)
    assert found[0] > 0 and found[1] == 0
