"""Layouts of UNets for benchmarks and tests: arguments of diffusers' UNet2DConditionModel."""

from __future__ import annotations

from typing import Any

SDXL: dict[str, Any] = {  # 2.57 billion weights, 794 layers
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
NARROW_SDXL = SDXL | {  # three tenths of its width: 233 million weights, 794 layers
    "sample_size": 32,
    "block_out_channels": (96, 192, 384),
    "attention_head_dim": (3, 6, 12),
    "cross_attention_dim": 640,
}
MID = SDXL | {  # its channels with fewer blocks: 284 million weights
    "sample_size": 64,
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
}
TINY = SDXL | {  # seconds to lower or compile
    "sample_size": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "norm_num_groups": 8,
}
