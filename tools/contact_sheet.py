"""Everyday pictures of the embedded model on one sheet, to be looked at.

    python tools/contact_sheet.py sheet.png

Rows: image-to-image at strength 0.1, 0.5 and 0.9 behind its input; the lower half repainted on ten backgrounds; the
colour word weighted 0, 0.5, 1, 1.5 and 2; outpainting and a second pass; edges of six drawings, each with the picture
that they and another prompt make; ten scenes that training never saw, in 20 steps, and in 4 with the LCM-LoRA and no
guidance; every sampler, with its own steps and Karras.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from PIL import Image

import nativesd
import tiny_scenes as scenes
from nativesd.sampling.table import SAMPLERS
from nativesd.shipped import LCM_LORA

GAP = 4
PROMPT = "a strawberry on a yellow background"


def rows() -> list[list[Image.Image]]:
    """The pictures, row by row."""
    pipe = nativesd.load(device="cpu")

    def one(prompt: str, **options: object) -> Image.Image:
        return pipe(prompt, **{"seed": 3, **options}).images[0]  # type: ignore[arg-type]

    first = one(PROMPT)
    mask = Image.new("L", first.size)
    mask.paste(255, (0, first.height // 2, *first.size))
    pairs = [(k, b) for k in range(len(scenes.subjects())) for b in range(len(scenes.BACKGROUNDS))]
    unseen = [scenes.caption(scenes.Scene(k, b)) for k, b in pairs if scenes.held_out(k, b)][::16]
    return [
        [first, *(one("a cactus on a blue background", image=first, strength=s) for s in (0.1, 0.5, 0.9))],
        [one(f"a strawberry on a {c} background", image=first, mask=mask) for c in scenes.BACKGROUNDS],
        [one(f"a strawberry on a (blue:{weight}) background") for weight in (0, 0.5, 1, 1.5, 2)],
        [one(PROMPT, image=first, outpaint=(0, 0, 32, 0)), one(PROMPT, hires=nativesd.Hires(1.5, strength=0.5))],
        [picture for subject in range(6) for picture in controlled(pipe, subject)],
        [one(prompt) for prompt in unseen],
        [one(prompt, loras=[LCM_LORA], sampler="LCM", steps=4, guidance_scale=1) for prompt in unseen],
        [one(PROMPT, sampler=sampler.name) for sampler in SAMPLERS],
        [one(PROMPT, sampler=sampler.name, schedule="karras") for sampler in SAMPLERS],
    ]


def controlled(pipe: nativesd.Pipeline, subject: int) -> tuple[Image.Image, Image.Image]:
    """The edges of a drawing, and the picture that they and a prompt for a strawberry make."""
    large, small = (scenes.artworks(round(side * pipe.config.size)) for side in (scenes.LARGE, scenes.SMALL))
    drawing = scenes.render(scenes.Scene(7 * subject + 2, 3), pipe.config.size, large, small)
    edges = nativesd.canny(Image.fromarray((drawing * 255).round().astype("uint8")))
    return edges, pipe(PROMPT, control=[nativesd.Control("tiny", edges)], seed=3).images[0]


def sheet(pictures: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures on white, one below the other."""
    width = max(sum(picture.width + GAP for picture in row) for row in pictures)
    heights = [max(picture.height for picture in row) + GAP for row in pictures]
    out = Image.new("RGB", (width, sum(heights)), "white")
    y = 0
    for row, height in zip(pictures, heights, strict=True):
        x = 0
        for picture in row:
            out.paste(picture, (x, y))
            x += picture.width + GAP
        y += height
    return out


def main() -> None:
    """Write the sheet to the path on the command line."""
    sheet(rows()).save(sys.argv[1])


if __name__ == "__main__":
    main()
