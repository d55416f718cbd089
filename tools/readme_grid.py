"""The README's picture: a grid that the embedded model paints, every picture above its prompt.

    python tools/readme_grid.py [docs/pictures/grid.png]

Small pictures are enlarged to at least 160 pixels a side, smoothly.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import nativesd
from contact_sheet import sheet

PROMPTS = (
    "a strawberry on a yellow background", "a snail on a pink background", "a sailboat on a blue background",
    "a cactus on a white background", "a fox on a green background", "a small cactus on the left on a pink background",
    "a pineapple on a red background", "a small rocket at the top on a black background",
)  # fmt: skip
SEED = 3
COLUMNS = 4
SIDE = 160
LINE = 14  # of the captions, in pixels


def captioned(picture: Image.Image, prompt: str) -> Image.Image:
    """A picture with its prompt below."""
    side = max(SIDE, picture.width)
    out = Image.new("RGB", (side, side + 3 * LINE), "white")
    out.paste(picture.resize((side, side), Image.Resampling.LANCZOS))
    draw = ImageDraw.Draw(out)
    for number, line in enumerate(textwrap.wrap(prompt, 28)):
        draw.text((2, side + 2 + number * LINE), line, fill="black", font=ImageFont.load_default(11))
    return out


def main() -> None:
    """Paint the grid and write it."""
    result = nativesd.load(device="cpu")(PROMPTS, seed=SEED)
    pictures = [captioned(picture, prompt) for picture, prompt in zip(result.images, PROMPTS, strict=True)]
    rows = [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "pictures" / "grid.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(path, optimize=True)


if __name__ == "__main__":
    main()
