"""ComfyUI nodes that draw with quantized pipelines. See README.md for how to install them.

Importing this needs neither ComfyUI nor torch: the nodes import what they use when they run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "mixdq"
KIND = "MIXDQ_PIPELINE"
LARGEST_SEED = 2**63 - 1


def folders() -> dict[str, Path]:
    """{name: directory} of the pipelines in ComfyUI's ``models/mixdq`` and in folders that its configuration adds."""
    import folder_paths  # pyright: ignore[reportMissingImports]  (ComfyUI's own module)

    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir, FOLDER)))
    places = [Path(place) for place in folder_paths.get_folder_paths(FOLDER)]
    found = (path for place in places if place.is_dir() for path in place.iterdir())
    return {path.name: path for path in sorted(found) if (path / "model_index.json").is_file()}


class LoadPipeline:
    """Loads a pipeline that ``mixdq quantize --out`` stored."""

    CATEGORY = "MixDQ"
    FUNCTION = "load"
    RETURN_TYPES = (KIND,)
    RETURN_NAMES = ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": (list(folders()),), "device": (["cuda", "cpu"],)}}

    def load(self, name: str, device: str) -> tuple[Any]:
        import torch

        from mixdq_ao import bos_aware
        from mixdq_ao.app.inputs import load_pipeline
        from mixdq_ao.models.bos_encoder import bos_embedding_of
        from mixdq_ao.models.pipelines import denoiser

        with torch.inference_mode(False):  # ComfyUI's own: tensors made in it cannot be used outside
            pipe = load_pipeline(str(folders()[name]), device=device)
            return (bos_aware(pipe) if bos_embedding_of(denoiser(pipe)) is not None else pipe,)


class Draw:
    """Draws pictures, [batch, height, width, 3] in [0, 1], as ComfyUI's IMAGE."""

    CATEGORY = "MixDQ"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        numbers = {
            "steps": ("INT", {"default": 4, "min": 1, "max": 50}),
            "guidance_scale": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 20.0}),
            "seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED}),
            "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
        }
        return {"required": {"pipeline": (KIND,), "prompt": ("STRING", {"multiline": True}), **numbers}}

    def draw(
        self, pipeline: Any, prompt: str, steps: int, guidance_scale: float, seed: int, batch_size: int
    ) -> tuple[Any]:
        from mixdq_ao.models.pipelines import Sampling, generate_all

        sampling = Sampling(steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size)
        return (generate_all(pipeline, [prompt] * batch_size, sampling).permute(0, 2, 3, 1).clamp(0, 1).contiguous(),)


NODE_CLASS_MAPPINGS = {"MixDQLoadPipeline": LoadPipeline, "MixDQDraw": Draw}
NODE_DISPLAY_NAME_MAPPINGS = {"MixDQLoadPipeline": "MixDQ: load pipeline", "MixDQDraw": "MixDQ: draw"}
