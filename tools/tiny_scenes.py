"""The pictures and captions of the embedded model: a subject, large or small, somewhere on a coloured background.

Shared by the training (tools/train_tiny.py) and by the test that asks whether the model paints what a prompt says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent / "tiny"
CELL = 64  # side of an artwork in the sheet

BACKGROUNDS = {
    "white": (245, 245, 245), "black": (20, 20, 20), "gray": (128, 128, 128), "red": (205, 40, 45),
    "orange": (245, 140, 30), "yellow": (250, 215, 60), "green": (45, 150, 70), "blue": (40, 90, 210),
    "purple": (125, 55, 165), "pink": (250, 150, 190),
}  # fmt: skip
PLACES = {"": (0.5, 0.5), "on the left": (0.0, 0.5), "on the right": (1.0, 0.5), "at the top": (0.5, 0.0),
          "at the bottom": (0.5, 1.0)}  # fmt: skip
LARGE, SMALL = 0.84, 0.5  # side of the subject, of the picture's
MARGIN = 0.03  # between a placed subject and the picture's edge


@dataclass(frozen=True)
class Scene:
    """One picture: indices into the subjects, BACKGROUNDS and PLACES; places other than the centre are small."""

    subject: int
    background: int
    small: bool = False
    place: int = 0


def subjects() -> list[str]:
    """The captions' nouns, in the order of the sheet."""
    names: list[str] = json.loads((HERE / "subjects.json").read_text())
    return names


def artworks(side: int) -> np.ndarray:
    """All subjects at `side` pixels, premultiplied RGBA in [0, 1]: (N, side, side, 4) float32."""
    sheet = Image.open(HERE / "subjects.png").convert("RGBA")
    columns = sheet.width // CELL
    out = []
    for k in range(len(subjects())):
        x, y = k % columns * CELL, k // columns * CELL
        cell = np.asarray(sheet.crop((x, y, x + CELL, y + CELL)), np.float32) / 255
        cell[..., :3] *= cell[..., 3:]
        planes = [Image.fromarray(cell[..., c]).resize((side, side), Image.Resampling.LANCZOS) for c in range(4)]
        scaled = np.stack([np.asarray(plane) for plane in planes], axis=-1).clip(0, 1)
        scaled[..., :3] = np.minimum(scaled[..., :3], scaled[..., 3:])  # Lanczos overshoots
        out.append(scaled)
    return np.stack(out)


def compose(art: np.ndarray, background: tuple[int, int, int], size: int, x: int, y: int) -> np.ndarray:
    """`art` (premultiplied RGBA) over a plain background, its corner at (x, y): (size, size, 3) float32 in [0, 1]."""
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = np.asarray(background, np.float32) / 255
    window = canvas[y : y + art.shape[0], x : x + art.shape[1]]
    window[:] = window * (1 - art[..., 3:]) + art[..., :3]
    return canvas


def render(scene: Scene, size: int, large: np.ndarray, small: np.ndarray) -> np.ndarray:
    """The picture of a scene; `large` and `small` are `artworks` at LARGE and SMALL of `size`."""
    art = (small if scene.small else large)[scene.subject]
    fx, fy = list(PLACES.values())[scene.place]
    margin = round(MARGIN * size)
    room = size - art.shape[0] - 2 * margin
    background = list(BACKGROUNDS.values())[scene.background]
    return compose(art, background, size, margin + round(fx * room), margin + round(fy * room))


def caption(scene: Scene, *, background: bool = True) -> str:
    """The scene in words, such as 'a small cactus on the left on a blue background'."""
    words = "small " + subjects()[scene.subject] if scene.small else subjects()[scene.subject]
    parts = ["an" if words[0] in "aeiou" else "a", words, list(PLACES)[scene.place]]
    if background:
        colour = list(BACKGROUNDS)[scene.background]
        parts += ["on", "an" if colour[0] in "aeiou" else "a", colour, "background"]
    return " ".join(part for part in parts if part)


def held_out(subject: int, background: int) -> bool:
    """Whether training never sees this pair: a tenth of them, one background for every subject."""
    return (subject * 7 + 3) % len(BACKGROUNDS) == background


def scenes() -> list[Scene]:
    """Every scene that training sees."""
    return [
        Scene(subject, background, small, place)
        for subject in range(len(subjects()))
        for background in range(len(BACKGROUNDS))
        if not held_out(subject, background)
        for small, place in [(False, 0)] + [(True, p) for p in range(len(PLACES))]
    ]
