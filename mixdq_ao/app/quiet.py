"""Silences third-party start-up messages, in the command line only. Our own warnings and all errors stay.

Called before torch, torchao, diffusers and transformers are imported.
"""

from __future__ import annotations

import logging
import os
import warnings

# {logger: text of a notice} that an install without CUDA or torchvision prints on every start.
_NOISE = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "register_constant",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao`",
}
_VERBOSITY = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")
_OTHERS = r"(torch|torchao|diffusers|transformers|accelerate|huggingface_hub|importlib)(\.|$)"


class _Without(logging.Filter):
    """Drops records that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def silence() -> None:
    """Hides known notices of other packages and their loading bars; a verbosity set by the user takes precedence."""
    for name, text in _NOISE.items():
        logging.getLogger(name).addFilter(_Without(text))
    for variable in _VERBOSITY:
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=_OTHERS)


def silence_loading_bars() -> None:
    """Disables the progress bars of diffusers and transformers while they load weights."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
