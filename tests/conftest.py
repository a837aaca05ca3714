"""Small random models and the bundled pipeline, built once for all tests."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.layouts import SDXL

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LONGEST = (  # modules of a minute and more
    "test_compiled_pipeline",
    "test_demo",
    "test_analyze",
    "test_distributed",
    "test_caches",
    "test_interpreter",
    "test_portable",
    "test_examples",
    "test_compiled",
    "test_recover_killed",
    "test_fsdp",
)
MOST_WORKERS = 4  # each holds torch, diffusers and a compiler: more would fill a laptop's memory


@pytest.hookimpl(optionalhook=True)  # a machine may have no pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    return min(os.cpu_count() or 1, MOST_WORKERS)


def pytest_configure() -> None:
    """One of several workers keeps to its share of the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no worker is left with it at the end. A module stays in one process,
    which builds its fixtures once."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


OUTLIER = 5


def small_unet(heads: tuple[int, int] = (1, 2)) -> UNet2DConditionModel:
    """SDXL's layout at toy size: cross attention, GEGLU, concatenated shortcuts, text_time conditioning."""
    from diffusers import UNet2DConditionModel  # tests of kernels do without

    torch.manual_seed(1)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=heads,
        use_linear_projection=True,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    with torch.no_grad():  # as training makes them: the outlier's channel meets small weights
        for name, parameter in model.named_parameters():
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
                parameter[:, OUTLIER] *= 0.01
    return model.eval()


def text_rows(batch: int, length: int = 7, bos: torch.Tensor | None = None) -> torch.Tensor:
    """[batch, length, 24] with an outlier BOS row first, as CLIP gives."""
    rows = torch.randn(batch, length, 24)
    rows[:, 0] = bos_row() if bos is None else bos
    return rows


def bos_row() -> torch.Tensor:
    row = torch.linspace(-1, 1, 24)
    row[OUTLIER] = 300.0
    return row


def unet_inputs(batch: int = 2) -> dict[str, object]:
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text_rows(batch),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 12),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(batch, -1),
        },
        "return_dict": False,
    }


@pytest.fixture(scope="session")
def sdxl() -> UNet2DConditionModel:
    """The full-size SDXL UNet on the meta device: names and shapes, no weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


@pytest.fixture(scope="session")
def _unet() -> UNet2DConditionModel:
    return small_unet()


@pytest.fixture
def unet(_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A fresh copy for each test; the same weights every time."""
    return copy.deepcopy(_unet)


@pytest.fixture(scope="session")
def calibration(_unet: UNet2DConditionModel):
    """Ranges of the small UNet over three random batches."""
    from mixdq_ao import calibrate

    def run() -> None:
        torch.manual_seed(2)
        for _ in range(3):
            _unet(**unet_inputs())

    return calibrate(_unet, run=run)


@pytest.fixture(scope="session")
def shapes():
    """The bundled pipeline's module: load_pipeline, prompts, load_scorer."""
    from mixdq_ao.app.subject import bundled

    return bundled()


@pytest.fixture(scope="session")
def _bundled(shapes):
    pipe = shapes.load_pipeline()
    texts = [p.text for p in shapes.prompts(8, seed=3)]
    from mixdq_ao import calibrate

    return SimpleNamespace(pipe=pipe, prompts=texts, calibration=calibrate(pipe, texts, steps=(1, 2)))


@pytest.fixture
def bundled(_bundled) -> SimpleNamespace:
    """The bundled pipeline with what tests change in place (UNet, text encoders) fresh, 8 prompts, a calibration."""
    pipe = copy.copy(_bundled.pipe)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        object.__setattr__(pipe, name, copy.deepcopy(getattr(_bundled.pipe, name)))
    return SimpleNamespace(pipe=pipe, prompts=_bundled.prompts, calibration=_bundled.calibration)
