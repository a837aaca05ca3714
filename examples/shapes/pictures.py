"""A PNG of many pictures."""

from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

ACROSS, SCALE, TEXT = 4, 2, 52  # pictures in a row, their enlargement, pixels for a caption


def save_grid(images: Tensor, captions: list[str], path: Path) -> None:
    """Writes images [k * n, 3, 64, 64] in [0, 1], k versions of each of n captions, with the captions."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    versions, side = len(images) // len(captions), SCALE * images.shape[-1]
    rows = -(-len(captions) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (versions * side + 12), rows * (side + TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(captions):
        x, y = i % ACROSS * (versions * side + 12), i // ACROSS * (side + TEXT)
        draw.text((x + 2, y + 2), _wrap(text, versions * side // 6), fill="black", font_size=11)
        for v in range(versions):
            tile = Image.fromarray(pixels[v * len(captions) + i]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (x + v * side, y + TEXT - 4))
    sheet.save(path, optimize=True)


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
