"""A text encoder that vouches for its BOS row: what a quantized model precomputed for it must stay true."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..compat import uncompiled
from ..errors import TextEncoderError
from ..mixin import mix_in
from ..quantize.bos import bos_mask
from ..quantize.tensor import MixDQTensor
from .pipelines import denoiser, text_encoders


class CheckedStates(tuple[Tensor, ...]):
    """The hidden states of an encoder; the one a pipeline takes is checked when it is taken (so a clip skip that
    takes another layer than the calibrated one is refused)."""

    encoder: BOSAwareTextEncoder

    def __getitem__(self, index: Any) -> Any:
        state = super().__getitem__(index)
        if isinstance(index, int):
            self.encoder.check(state, f"hidden state {index} of {len(self)}")
        return state


class BOSAwareTextEncoder(nn.Module):
    """Mixed into the encoder's own class by ``wrap``; weights, config, saving and devices stay the encoder's.

    Every output that ends up in the denoiser's text embedding must begin with the calibrated BOS row. An output that
    does not is refused: quantized ``to_k``/``to_v`` layers would otherwise clip its first row to the small range of the
    others and give a wrong picture without a word.
    """

    bos_row: Tensor
    bos_from_last: bool

    @staticmethod
    def wrap(encoder: nn.Module, row: Tensor, bos_token_id: int | None = None, name: str = "text encoder") -> nn.Module:
        """``encoder`` with the check built in, in place.

        Args:
            encoder: a transformers CLIP text model.
            row: [hidden_size], its part of the calibrated BOS embedding.
            bos_token_id: the tokenizer's; the encoder config's when None (older CLIP configs hold a wrong one).
            name: for errors.

        Raises:
            TextEncoderError: no layer of this encoder puts ``row`` first.
        """
        return BOSAwareTextEncoder._mixed_in(encoder, row, BOSAwareTextEncoder.place(encoder, row, bos_token_id, name))

    @staticmethod
    def _mixed_in(encoder: nn.Module, row: Tensor, found: str) -> nn.Module:
        if not isinstance(encoder, BOSAwareTextEncoder):
            mix_in(encoder, BOSAwareTextEncoder, name=type(encoder).__name__)
        uncompiled(encoder).register_buffer("bos_row", row, persistent=False)
        encoder.bos_from_last = found == "last"  # type: ignore[assignment]
        return encoder

    @staticmethod
    def place(encoder: nn.Module, row: Tensor, bos_token_id: int | None, name: str) -> str:
        """Which of the encoder's outputs begins with ``row``: "hidden" or "last". Raises TextEncoderError: none."""
        found = _matching_state(encoder, row, bos_token_id)
        if found is None:
            raise TextEncoderError(
                f"{name} ({type(encoder).__name__}): no hidden state begins with the calibrated BOS embedding (largest "
                f"value {row.abs().max():.4g}); the plan was calibrated with another encoder, calibrate again with "
                "this one"
            )
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Not ``forward``, for which offloading puts one of its own into the encoder."""
        output = super().__call__(*args, **kwargs)
        if self.bos_from_last and getattr(output, "last_hidden_state", None) is not None:
            self.check(output.last_hidden_state, "the last hidden state")
        elif getattr(output, "hidden_states", None) is not None:
            states = CheckedStates(output.hidden_states)
            states.encoder = self
            output.hidden_states = states
        return output

    def check(self, state: Tensor, what: str) -> None:
        """Raises TextEncoderError unless row 0 of every sequence of ``state`` [B, T, D] is the calibrated row."""
        if not bool(bos_mask(state[:, 0], self.bos_row.to(state.device)).all()):
            raise TextEncoderError(
                f"{type(self).__name__}: {what} does not begin with the calibrated BOS embedding; use the clip_skip "
                "the plan was calibrated with, or calibrate again with this one"
            )


@torch.no_grad()
def _matching_state(encoder: nn.Module, row: Tensor, bos_token_id: int | None) -> str | None:
    """Where ``row`` stands in the encoder's outputs: "hidden", "last", or None. BOS sees no other token (causal)."""
    config: Any = encoder.config
    bos = config.bos_token_id if bos_token_id is None else bos_token_id
    ids = torch.tensor([[bos, config.eos_token_id]], device=_device(encoder))
    # the module's own call: without the check of an encoder that has it already
    output = nn.Module.__call__(_to_call(uncompiled(encoder)), ids, output_hidden_states=True)
    matches = lambda state: state.shape[-1] == row.numel() and bool(bos_mask(state[0, 0], row.to(state.device)).all())  # noqa: E731
    if any(matches(state) for state in output.hidden_states):
        return "hidden"
    last = getattr(output, "last_hidden_state", None)
    return "last" if last is not None and matches(last) else None


def _device(encoder: nn.Module) -> Any:
    """Where the encoder computes. accelerate's offloading keeps weights elsewhere."""
    hooks = (getattr(module, "_hf_hook", None) for module in encoder.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), next(encoder.parameters()).device)


def _to_call(encoder: nn.Module) -> nn.Module:
    """A copy of the same tensors: transformers puts hooks into a model at its first call, with which it cannot be
    pickled. An offloaded one is called itself, whose hooks move its own tensors."""
    if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in encoder.modules()):
        return encoder
    return copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})


def bos_embedding_of(model: nn.Module) -> Tensor | None:
    """The BOS embedding a quantized model was given, or None."""
    for parameter in model.parameters():
        if isinstance(parameter, MixDQTensor) and parameter.bos_embedding is not None:
            return parameter.bos_embedding
    for module in model.modules():
        embedding = getattr(module, "bos_embedding", None)
        if isinstance(embedding, Tensor):
            return embedding
    return None


def bos_aware(pipe: Any) -> Any:
    """Makes the text encoders of a pipeline with a BOS-aware quantized denoiser check their BOS row. Returns ``pipe``.

    Raises:
        TextEncoderError: the denoiser holds no BOS embedding or is offloaded sequentially, or an encoder's first row
            is not the calibrated one.
    """
    embedding = bos_embedding_of(denoiser(pipe))
    if embedding is None:
        raise TextEncoderError(
            f"{type(denoiser(pipe)).__name__} holds no BOS embedding; "
            "quantize it first with a plan calibrated with BOS rows"
        )
    if embedding.is_meta:
        raise TextEncoderError(
            f"{type(denoiser(pipe)).__name__} is offloaded, its BOS embedding elsewhere until it is called; "
            "bos_aware(pipe) first, offload then"
        )
    encoders = text_encoders(pipe)
    widths = {n: int(cast(Any, e).config.hidden_size) for n, e in encoders.items()}
    if sum(widths.values()) != embedding.numel():
        raise TextEncoderError(
            f"text encoders are {widths} wide, together not the {embedding.numel()} of the BOS embedding"
        )
    places = []
    for (name, encoder), row in zip(encoders.items(), embedding.split(list(widths.values())), strict=True):
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
        bos = getattr(tokenizer, "bos_token_id", None)
        places.append((encoder, row.clone(), BOSAwareTextEncoder.place(encoder, row, bos, name)))
    for place in places:  # all of them are found before the first encoder is changed
        BOSAwareTextEncoder._mixed_in(*place)
    return pipe
