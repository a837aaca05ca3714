"""Picture quality by established metrics, with confidence intervals: FID, CLIPScore, ImageReward, LPIPS, SSIM, PSNR.

    from mixdq_ao.evaluate import CLIPScore, Run, Settings, Shard, read_prompts
    run = Run(directory, settings, prompts, [CLIPScore.load()], load=lambda: pipe)
    run.work(Shard(1, 2), batch_size=8)   # on one machine; Shard(2, 2) on another
    run.figures()                         # {"clip": Figure(value, interval, ...)}

A run is a directory; finished work is not repeated. The command is ``mixdq evaluate``.
"""

from .bootstrap import Interval, interval
from .clip import CLIPScore
from .fid import FID
from .fidelity import PSNR, SSIM
from .frechet import Gaussian
from .imagereward import ImageReward
from .inception import Inception
from .lpips import LPIPS
from .metric import Batch, Figure, MeanMetric, Metric
from .prompts import Prompts, read_prompts
from .real import measure_real, real_files
from .results import Results
from .run import Run
from .settings import Settings, content_of
from .shard import Shard
from .table import differences, markdown, rows_of

__all__ = [
    "Batch",
    "CLIPScore",
    "FID",
    "Figure",
    "Gaussian",
    "ImageReward",
    "Inception",
    "Interval",
    "LPIPS",
    "MeanMetric",
    "Metric",
    "PSNR",
    "Prompts",
    "Results",
    "Run",
    "SSIM",
    "Settings",
    "Shard",
    "content_of",
    "differences",
    "interval",
    "markdown",
    "measure_real",
    "read_prompts",
    "real_files",
    "rows_of",
]
