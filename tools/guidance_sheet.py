"""Paints docs/pictures/guidance.png with the embedded model: guidance, samplers, prompts, regions and tiling, labelled.

python tools/guidance_sheet.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

import nativesd
from nativesd import APG, PAG, SEG, DynamicThreshold, FreeU, Interval, Region

SHEET = Path(__file__).parent.parent / "docs" / "pictures" / "guidance.png"
SIDE, LABEL, COLUMNS = 96, 14, 6
DEEP = ("mid", "up.2", "up.1")
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
FOX = "a fox on a blue background"
CELLS: list[tuple[str, str, dict[str, Any]]] = [
    ("PAG 0", FOX, {"guidance": PAG(0, DEEP)}),
    ("PAG 3", FOX, {"guidance": PAG(3, DEEP)}),
    ("SEG 3", FOX, {"guidance": SEG(3, DEEP)}),
    ("FreeU", FOX, {"guidance": FreeU(1.1, 1.2, 0.9, 0.6)}),
    ("interval to 0.6", FOX, {"guidance": Interval(0, 0.6)}),
    ("Euler CFG++", FOX, {"sampler": "Euler CFG++", "guidance_scale": 7}),
    ("scale 9", FOX, {"guidance_scale": 9}),
    ("9, APG", FOX, {"guidance_scale": 9, "guidance": APG()}),
    ("9, threshold 4", FOX, {"guidance_scale": 9, "guidance": DynamicThreshold(4)}),
    ("[fox:penguin:0.3]", "a [fox:penguin:0.3] on a blue background", {}),
    ("AND", "a fox on a blue background AND a penguin on a blue background", {}),
    ("tiling", "a strawberry on a yellow background", {"tiling": "xy"}),
    ("two regions", "on a blue background", {"width": 128, "seed": 5, "regions": [
        Region("a strawberry", LEFT), Region("a lemon", RIGHT)]}),
    ("two regions", "on a yellow background", {"width": 128, "regions": [
        Region("a fox", LEFT), Region("a penguin", RIGHT)]}),
    ("tiling, twice", "a strawberry on a yellow background", {"tiling": "xy", "repeat": 2}),
]  # fmt: skip


def main() -> None:
    """Paint all cells and write the sheet."""
    pipe = nativesd.load()
    cells = []
    for label, prompt, given in CELLS:
        options = {"seed": 3, "steps": 12, "sampler": "Euler", **given}
        times = options.pop("repeat", 1)
        picture = pipe(prompt, **options).images[0]
        columns = times * picture.width // picture.height
        cell = Image.new("RGB", (columns * SIDE, SIDE + LABEL), "white")
        enlarged = picture.resize((picture.width * SIDE // picture.height, SIDE), Image.Resampling.NEAREST)
        for number in range(times):
            cell.paste(enlarged, (number * SIDE, 0))
        ImageDraw.Draw(cell).text((2, SIDE + 1), label, fill="black")
        cells.append(cell)
    rows = [cells[:COLUMNS], cells[COLUMNS : 2 * COLUMNS], cells[2 * COLUMNS :]]
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 4), len(rows) * (SIDE + LABEL + 4)), "white")
    for y, row in enumerate(rows):
        x = 0
        for cell in row:
            sheet.paste(cell, (x, y * (SIDE + LABEL + 4)))
            x += cell.width + 4
    sheet.save(SHEET, optimize=True)
    print(SHEET)


if __name__ == "__main__":
    main()
