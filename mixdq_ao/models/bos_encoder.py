"""Text encoders that check their BOS row: a quantized denoiser precomputed layer outputs for it."""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..compat import uncompiled
from ..errors import TextEncoderError
from ..mixin import mix_in
from ..quantize.bos import bos_mask
from ..quantize.tensor import MixDQTensor
from .pipelines import denoiser, text_encoders

Output = Literal["hidden", "last"]
"""An output of an encoder: one of its hidden states, or its last hidden state after the final norm."""


class CheckedStates(tuple[Tensor, ...]):
    """The hidden states of an encoder. Each is checked when a pipeline indexes it, so that a clip skip which uses
    another layer than calibration did is refused."""

    encoder: BOSAwareTextEncoder

    def __getitem__(self, index: Any) -> Any:
        state = super().__getitem__(index)
        if isinstance(index, int):
            self.encoder.check(state, f"hidden state {index} of {len(self)}")
        return state


class BOSAwareTextEncoder(nn.Module):
    """Mixed into the encoder's own class by ``wrap``; weights, config, saving and devices stay the encoder's.

    Every output that ends up in the denoiser's text embedding must begin with the calibrated BOS row, else
    TextEncoderError: quantized ``to_k``/``to_v`` layers would silently clip the first row to the small range of the
    other rows and give a wrong picture.
    """

    bos_row: Tensor
    bos_from_last: bool

    @staticmethod
    def wrap(encoder: nn.Module, row: Tensor, bos_token_id: int | None = None, name: str = "text encoder") -> nn.Module:
        """Adds the check to ``encoder`` in place and returns it.

        Args:
            encoder: a transformers CLIP text model.
            row: [hidden_size], its part of the calibrated BOS embedding.
            bos_token_id: the tokenizer's; None for the encoder config's (which is wrong in older CLIP configs).
            name: for errors.

        Raises:
            TextEncoderError: no hidden state of this encoder begins with ``row``.
        """
        return _with_check(encoder, row, _output_with(encoder, row, bos_token_id, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the encoder and checks its output. Not in ``forward``, which accelerate's offloading replaces."""
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


def _with_check(encoder: nn.Module, row: Tensor, output: Output) -> nn.Module:
    if not isinstance(encoder, BOSAwareTextEncoder):
        mix_in(encoder, BOSAwareTextEncoder, name=type(encoder).__name__)
    uncompiled(encoder).register_buffer("bos_row", row, persistent=False)
    encoder.bos_from_last = output == "last"  # type: ignore[assignment]
    return encoder


def _output_with(encoder: nn.Module, row: Tensor, bos_token_id: int | None, name: str) -> Output:
    """The output of the encoder that begins with ``row``. Raises TextEncoderError if none does."""
    found = _matching_output(encoder, row, bos_token_id, name)
    if found is None:
        raise TextEncoderError(
            f"{name} ({type(encoder).__name__}): no hidden state begins with the calibrated BOS embedding (largest "
            f"value {row.abs().max():.4g}); the plan was calibrated with another encoder, calibrate again with "
            "this one"
        )
    return found


@torch.no_grad()
def _matching_output(encoder: nn.Module, row: Tensor, bos_token_id: int | None, name: str) -> Output | None:
    """The output of the encoder that begins with ``row``, or None. Any prompt will do: attention is causal, so that row
    depends on the BOS token alone. Raises TextEncoderError for an encoder without one."""
    config: Any = encoder.config
    bos = getattr(config, "bos_token_id", None) if bos_token_id is None else bos_token_id
    eos = getattr(config, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list) else eos
    if bos is None or eos is None:
        raise TextEncoderError(
            f"{name} ({type(encoder).__name__}) has no token that begins every text, whose row could be checked; "
            "leave bos_aware out"
        )
    ids = torch.tensor([[bos, eos]], device=_device(encoder))
    # nn.Module's call, without the check of an encoder that already has it
    output = nn.Module.__call__(_to_call(uncompiled(encoder)), ids, output_hidden_states=True)

    def matches(state: Tensor) -> bool:
        return state.shape[-1] == row.numel() and bool(bos_mask(state[0, 0], row.to(state.device)).all())

    if any(matches(state) for state in output.hidden_states):
        return "hidden"
    last = getattr(output, "last_hidden_state", None)
    return "last" if last is not None and matches(last) else None


def _device(encoder: nn.Module) -> Any:
    """The device the encoder computes on; accelerate's offloading keeps weights on another."""
    hooks = (getattr(module, "_hf_hook", None) for module in encoder.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), next(encoder.parameters()).device)


def _to_call(encoder: nn.Module) -> nn.Module:
    """A copy of the module tree sharing the same tensors: at its first call transformers adds hooks to a model, with
    which it cannot be pickled. An offloaded encoder is returned itself, since its hooks move its own tensors."""
    if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in encoder.modules()):
        return encoder
    return copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})


def bos_embedding_of(model: nn.Module) -> Tensor | None:
    """The BOS embedding [K] that a quantized model holds, or None."""
    for parameter in model.parameters():
        if isinstance(parameter, MixDQTensor) and parameter.bos_embedding is not None:
            return parameter.bos_embedding
    for module in model.modules():
        embedding = getattr(module, "bos_embedding", None)
        if isinstance(embedding, Tensor):
            return embedding
    return None


def _rows(widths: dict[str, int], embedding: Tensor) -> dict[str, Tensor]:
    """The part of the embedding that each text encoder makes: those of the first encoders lie side by side, zeros fill
    up to the width of a later one, whose rows follow theirs (SD3). Raises TextEncoderError where that is not so."""
    rows, start = {}, 0
    for name, width in widths.items():
        if start + width > embedding.numel():
            break
        rows[name] = embedding[start : start + width]
        start += width
    if not rows or embedding[start:].any():
        raise TextEncoderError(
            f"text encoders are {widths} wide, which do not make up the {embedding.numel()} of the BOS embedding; "
            "outputs that are put together in another way cannot be checked, leave bos_aware out"
        )
    return rows


def bos_aware(pipe: Any) -> Any:
    """Makes a pipeline's text encoders check their BOS row against that of its quantized denoiser. Returns ``pipe``.

    Raises:
        TextEncoderError: the denoiser holds no BOS embedding or is offloaded sequentially, or an encoder's first row
            is not the calibrated one.
    """
    model = denoiser(pipe)
    embedding = bos_embedding_of(model)
    if embedding is None:
        raise TextEncoderError(
            f"{type(model).__name__} holds no BOS embedding; quantize it first with a plan calibrated with BOS rows"
        )
    if embedding.is_meta:
        raise TextEncoderError(
            f"{type(model).__name__} is offloaded, its BOS embedding elsewhere until it is called; "
            "bos_aware(pipe) first, offload then"
        )
    encoders = text_encoders(pipe)
    rows = _rows({n: int(cast(Any, e).config.get_text_config().hidden_size) for n, e in encoders.items()}, embedding)
    places = []
    for name, row in rows.items():
        encoder = encoders[name]
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
        bos = getattr(tokenizer, "bos_token_id", None)
        places.append((encoder, row.clone(), _output_with(encoder, row, bos, name)))
    for place in places:  # nothing is changed before all encoders have passed
        _with_check(*place)
    return pipe
