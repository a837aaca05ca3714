"""The untrained parts: the real diffusers and transformers classes, wired as in SDXL, but small."""

# diffusers' hints are tuples of one element, transformers' special tokens of any type
# pyright: reportArgumentType=false

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTHS = (96, 128)  # of the two text encoders; SDXL has 768 and 1280
DEPTHS = (3, 4)  # SDXL: 12 and 32
LATENT_SHAPE = (4, 16, 16)
TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)  # original size, crop corner, target size


def make_vae() -> AutoencoderKL:
    """64x64 pictures to [4, 16, 16] latents and back; more than 2 norm groups would wipe flat colours."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=64,
        force_upcast=False,
    )


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The two CLIP text encoders for `tokenizer`'s vocabulary; the UNet reads their states side by side."""
    first, second = (_text_config(tokenizer, width, depth) for width, depth in zip(WIDTHS, DEPTHS, strict=True))
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def _text_config(tokenizer: CLIPTokenizer, width: int, depth: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=WIDTHS[1],
        num_hidden_layers=depth,
        num_attention_heads=width // 32,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_unet() -> UNet2DConditionModel:
    """About four million parameters in 175 linear and convolution layers."""
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        block_out_channels=(48, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 3),
        use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=len(TIME_IDS) * 16 + WIDTHS[1],
    )


def make_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: one step starts from pure noise, as in training."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
