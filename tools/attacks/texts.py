"""Kinds D and E: prompts, parameters, pictures, and the numbers of calls."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import nativesd
from attacks.values import NUMBERS, TEXTS, odd_file, spoiled, text
from nativesd.diffusion.control import Control
from nativesd.pictures.embedded import user_comment_exif
from nativesd.pictures.images import read_image
from nativesd.pictures.infotext import parse_infotext
from nativesd.pipeline.asked.arguments import CallOptions, check
from nativesd.pipeline.asked.hires import Hires
from nativesd.sampling.variation import Variation
from nativesd.text.prompt import parse_prompt, split_chunks
from nativesd.text.tokenizer import ClipTokenizer


@cache
def _tokenizer() -> ClipTokenizer:
    return ClipTokenizer(pad=0)


def prompt(rng: random.Random, folder: Path) -> None:
    """Prompts, parsed and made into tokens."""
    written = text(rng) * rng.choice((1, 1, 1, 20))
    split_chunks(parse_prompt(written), _tokenizer())


def infotext(rng: random.Random, folder: Path) -> None:
    """The parameters that pictures carry, and what is repeated of them."""
    written = text(rng) + "\n" + "".join(f"{rng.choice(TEXTS)}: {text(rng)[:200]}, " for _ in range(rng.randint(0, 9)))
    parse_infotext(written)
    (folder / "x.txt").write_text(written, encoding="utf-8", errors="surrogatepass")
    nativesd.options_from(folder / "x.txt")


def picture(rng: random.Random, folder: Path) -> None:
    """Files of pictures, whole, spoiled, huge, and with texts."""
    path = folder / f"x.{rng.choice(('png', 'jpg', 'webp', 'gif', 'tiff', 'bmp'))}"
    kind = rng.random()
    if kind < 0.1:
        odd_file(rng, path)
    elif kind < 0.2:
        path.write_bytes(_large(rng))
    elif kind < 0.25:
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n")
    else:
        data, info = io.BytesIO(), PngInfo()
        written = text(rng)[:3000].encode(errors="replace").decode()
        info.add_text(rng.choice(("parameters", "prompt", "workflow", "Comment", "x")), written)
        mode = rng.choice(("RGB", "L", "RGBA", "P", "1", "I;16")) if path.suffix == ".png" else "RGB"
        more: dict[str, Any] = {"pnginfo": info} if path.suffix == ".png" else {}
        if path.suffix in (".jpg", ".webp"):
            more["exif"] = user_comment_exif(written[:1000])
        made = Image.new(mode, (rng.randint(1, 40), rng.randint(1, 40)))
        made.save(data, {".jpg": "jpeg"}.get(path.suffix, path.suffix[1:]), **more)
        path.write_bytes(spoiled(rng, data.getvalue()) if rng.random() < 0.7 else data.getvalue())
    if rng.random() < 0.5:
        read_image(path)
    else:
        nativesd.options_from(path)


def _large(rng: random.Random) -> bytes:
    """A PNG that says to be large, and may even be."""
    width, height = (rng.choice((1, 7000, 13_000, 10**6, 2**31 - 1)) for _ in "12")
    packed = zlib.compress(bytes(min(height * (1 + width // 8), 30_000_000)))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    bomb = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(30_000_000))) if rng.random() < 0.3 else b""
    return b"\x89PNG\r\n\x1a\n" + start + bomb + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


NAMES = tuple(CallOptions.__annotations__)


def numbers(rng: random.Random, folder: Path) -> None:
    """A call's options, one to four of them of any value; checked as before anything is loaded."""
    options: dict[str, Any] = {name: rng.choice(NUMBERS) for name in rng.sample(NAMES, rng.randint(0, 3))}
    if rng.random() < 0.3:
        fields = rng.sample(("scale", "strength", "steps", "width", "height", "guidance_scale"), 2)
        options["hires"] = Hires(**({"scale": 2.0} | {name: rng.choice(NUMBERS) for name in fields}))
    if rng.random() < 0.2:
        options["control"] = Control("x", "x.png", scale=rng.choice(NUMBERS), end=rng.choice(NUMBERS))
    if rng.random() < 0.2:
        options["variation"] = Variation(strength=rng.choice(NUMBERS))
    if rng.random() < 0.2:
        options["loras"] = [("x", rng.choice(NUMBERS))]
    os.environ.pop("NATIVESD_MAX_PIXELS", None)
    check(rng.choice(("a cat", "a cat", "a cat", ["a", "b"], None, [], 3, text(rng))), options)  # type: ignore[arg-type]
