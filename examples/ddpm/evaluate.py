"""Measures how well the DDPM draws, by number of steps: `python -m examples.ddpm.evaluate`."""

import argparse
import random
from pathlib import Path

from torch import Tensor

from examples.ddpm.data import pictures
from examples.ddpm.subject import PIPELINE, draw, features, likeness, load_pipeline, load_scorer
from examples.shapes.pictures import save_grid
from mixdq_ao.search.metrics import frechet_distance


def main() -> None:
    """Prints the likeness and the Fréchet distance to drawn pictures; can also write a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--grid", type=Path, help="write a PNG of the first 64 pictures at the last number of steps")
    options = parser.parse_args()
    pipe, scorer, rng = load_pipeline(path=options.pipeline), load_scorer(), random.Random(0)
    real, other = (pictures(options.pictures, rng) for _ in range(2))
    print("| pictures | likeness, dB | Fréchet distance to drawn ones |\n|---|---|---|")

    def show(name: str, images: Tensor) -> None:
        distance = frechet_distance(features(scorer, images), features(scorer, real))
        print(f"| {name} | {likeness(images).mean():.2f} | {distance:.2f} |", flush=True)

    show("other drawn ones", other)
    for steps in options.steps:
        show(f"{steps} steps", draw(pipe, range(options.pictures), steps=steps))
    if options.grid:
        images = draw(pipe, range(64), steps=options.steps[-1])
        save_grid(images.repeat_interleave(2, 2).repeat_interleave(2, 3), [""] * 16, options.grid)


if __name__ == "__main__":
    main()
