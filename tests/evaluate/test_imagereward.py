"""ImageReward's network against BLIP's layers written out in float64, from weights under their published names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import Batch, ImageReward
from mixdq_ao.evaluate.blip import MLP, RENAMED, RewardModel, Shape, load_reward, renamed
from mixdq_ao.evaluate.imagereward import MEAN, STD

from .conftest import pictures

SHAPE = Shape(
    image=16,
    patch=8,
    vision_width=12,
    vision_layers=2,
    vision_heads=3,
    text_width=8,
    text_layers=2,
    text_heads=2,
    text_inner=16,
    vocabulary=50,
)
State = dict[str, Tensor]


def published() -> State:
    """Random weights under the names of ImageReward.pt, which also holds tensors that the reward has no use for."""
    torch.manual_seed(0)
    s, state = SHAPE, {}

    def linear(name: str, i: int, o: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(o, i) * i**-0.5, torch.randn(o) * 0.3

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width)

    v, w, t = "blip.visual_encoder", s.vision_width, s.text_width
    state[f"{v}.cls_token"] = torch.randn(1, 1, w)
    state[f"{v}.pos_embed"] = torch.randn(1, (s.image // s.patch) ** 2 + 1, w)
    state[f"{v}.patch_embed.proj.weight"] = torch.randn(w, 3, s.patch, s.patch) * 0.1
    state[f"{v}.patch_embed.proj.bias"] = torch.randn(w)
    for i in range(s.vision_layers):
        for name, o in (("attn.qkv", 3 * w), ("attn.proj", w), ("mlp.fc1", 4 * w)):
            linear(f"{v}.blocks.{i}.{name}", w, o)
        linear(f"{v}.blocks.{i}.mlp.fc2", 4 * w, w)
        norm(f"{v}.blocks.{i}.norm1", w)
        norm(f"{v}.blocks.{i}.norm2", w)
    norm(f"{v}.norm", w)
    e = "blip.text_encoder"
    state[f"{e}.embeddings.word_embeddings.weight"] = torch.randn(s.vocabulary, t)
    state[f"{e}.embeddings.position_embeddings.weight"] = torch.randn(512, t)
    state[f"{e}.embeddings.position_ids"] = torch.arange(512)[None]
    norm(f"{e}.embeddings.LayerNorm", t)
    for i in range(s.text_layers):
        for kind, source in (("attention", t), ("crossattention", w)):
            linear(f"{e}.encoder.layer.{i}.{kind}.self.query", t, t)
            linear(f"{e}.encoder.layer.{i}.{kind}.self.key", source, t)
            linear(f"{e}.encoder.layer.{i}.{kind}.self.value", source, t)
            linear(f"{e}.encoder.layer.{i}.{kind}.output.dense", t, t)
            norm(f"{e}.encoder.layer.{i}.{kind}.output.LayerNorm", t)
        linear(f"{e}.encoder.layer.{i}.intermediate.dense", t, s.text_inner)
        linear(f"{e}.encoder.layer.{i}.output.dense", s.text_inner, t)
        norm(f"{e}.encoder.layer.{i}.output.LayerNorm", t)
    for number, i, o in zip((0, 2, 4, 6, 7), (t, *MLP), MLP, strict=False):
        linear(f"mlp.layers.{number}", i, o)
    state["blip.vision_proj.weight"] = torch.randn(4, w)
    return state


def direct(state: State, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The published network, by its formulas."""
    p = {name: tensor.double() for name, tensor in state.items()}
    s, v, e = SHAPE, "blip.visual_encoder", "blip.text_encoder"

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, value: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
        q, k, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, value))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if seen is not None:
            scores = scores.masked_fill(seen[:, None, None] == 0, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    x = functional.conv2d(pixels, p[f"{v}.patch_embed.proj.weight"], p[f"{v}.patch_embed.proj.bias"], s.patch)
    x = torch.cat([p[f"{v}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + p[f"{v}.pos_embed"]
    for i in range(s.vision_layers):
        block = f"{v}.blocks.{i}"
        q, k, value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, value, s.vision_heads))
        inner = functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", inner)
    picture = norm(f"{v}.norm", x, 1e-6)

    words = p[f"{e}.embeddings.word_embeddings.weight"][ids]
    y = norm(
        f"{e}.embeddings.LayerNorm", words + p[f"{e}.embeddings.position_embeddings.weight"][: ids.shape[1]], 1e-12
    )
    for i in range(s.text_layers):
        layer = f"{e}.encoder.layer.{i}"
        for kind, source, seen in (("attention", y, mask), ("crossattention", picture, None)):
            source = y if kind == "attention" else source
            q, k, value = (
                linear(f"{layer}.{kind}.self.{n}", z) for n, z in (("query", y), ("key", source), ("value", source))
            )
            out = linear(f"{layer}.{kind}.output.dense", attend(q, k, value, s.text_heads, seen))
            y = norm(f"{layer}.{kind}.output.LayerNorm", out + y, 1e-12)
        inner = functional.gelu(linear(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + y, 1e-12)
    z = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        z = linear(f"mlp.layers.{number}", z)
    return z[:, 0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "imagereward.safetensors"
    save_file(published(), path)
    return path


class Words:
    """Stands in for BERT's tokenizer: a number for each word."""

    def __call__(self, texts, *, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        ids, mask = torch.zeros(len(texts), max_length, dtype=torch.long), torch.zeros(len(texts), max_length).long()
        for i, text in enumerate(texts):
            words = [len(w) % 50 for w in text.split()][:max_length]
            ids[i, : len(words)], mask[i, : len(words)] = torch.tensor(words), 1
        return Both(input_ids=ids, attention_mask=mask)


class Both(dict):
    def to(self, device):
        return self


def test_rewards_against_the_layers_written_out(weights):
    metric = ImageReward(load_reward(weights, SHAPE), Words())
    images, prompts = pictures(3, side=16), ["a bb ccc", "dddd " * 50, "e ffffff"]
    found = metric.update(Batch(images=images, prompts=prompts))[:, 0]
    texts = Words()(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).double().view(3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).double().view(3, 1, 1)
    raw = direct(published(), (images.double() / 255 - mean) / std, texts["input_ids"], texts["attention_mask"])
    expected = (raw - MEAN) / STD
    assert found == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-4)
    assert expected.std() > 0.01  # pictures and prompts matter
    assert metric.compute().value == pytest.approx(found.mean())


def test_every_weight_of_the_full_size_has_a_published_name():
    """And no two the same: names of the real network, mapped there and counted."""
    with torch.device("meta"):
        model = RewardModel()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(447e6, rel=0.01)  # 446 M + the reward
    names = renamed({name: torch.zeros(0) for name in published()})
    assert {n.split(".")[0] for n in names} == {"vision", "text", "reward", "blip"}
    assert len(names) == len(published()) and len(RENAMED) == 10
    assert {k for k in model.state_dict() if ".2." not in k and ".layers." not in k and ".layer." not in k} <= set(
        names
    )


def test_wrong_files_are_named(weights, tmp_path):
    with pytest.raises(MixDQError, match=r"ImageReward\.pt: .* safetensors only; convert it once: python -c"):
        load_reward(tmp_path / "ImageReward.pt", SHAPE)
    with pytest.raises(MixDQError, match="cannot be read"):
        load_reward(tmp_path / "none.safetensors", SHAPE)
    state = published()
    cut = tmp_path / "cut.safetensors"
    save_file({k: v for k, v in state.items() if "mlp.layers.4" not in k}, cut)
    with pytest.raises(MixDQError, match=r"cut\.safetensors: has no tensor for 'reward\.4\."):
        load_reward(cut, SHAPE)
    save_file(state | {"mlp.layers.7.bias": torch.zeros(2)}, cut)
    with pytest.raises(MixDQError, match=r"'reward\.7\.bias' is \(2,\), expected \(1,\)"):
        load_reward(cut, SHAPE)
