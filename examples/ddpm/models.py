"""The untrained parts: the classes of the unconditional DDPMs on LSUN and CIFAR-10, but smaller."""

# diffusers' hints are tuples of one element
# pyright: reportArgumentType=false

from diffusers import DDPMScheduler, UNet2DModel

from examples.ddpm.data import PIXELS


def make_unet() -> UNet2DModel:
    """A UNet with 0.70 M parameters in 77 linear and convolution layers, attention at widths of 8 and 4 pixels, and
    concatenated shortcuts in the up blocks."""
    return UNet2DModel(
        sample_size=PIXELS,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=4,
    )


def make_scheduler() -> DDPMScheduler:
    """The scheduler: 1000 training steps with the cosine schedule, v-prediction."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
