"""Pictures with the parameters that made them, and how those are written into files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from nativesd.errors import SourceError, UsageError
from nativesd.pictures.infotext import shown_schedule, user_comment_exif, write_infotext
from nativesd.version import __version__

QUALITY = 95
"""JPEG's and lossy WebP's. A1111's is 80, which leaves visible blocks; 95 is the highest that Pillow advises."""
JPEG_EXIF_BYTES = 65533
"""What one JPEG segment holds beside its length (ITU-T T.81, B.1.1.4)."""


@dataclass(frozen=True)
class Result:
    """`images`, their `seeds`, the call's `parameters`, and the `latents` (B, C, h, w) as the sampler left them."""

    images: list[Image.Image]
    seeds: list[int]
    parameters: dict[str, Any]
    latents: Tensor

    def infotext(self, index: int = 0) -> str:
        """The parameters of picture `index` in the text form that A1111 writes and many tools read.

        Of `parameters` these are needed: prompt, negative_prompt, steps, sampler, schedule, guidance_scale, width,
        height, model. These are written where they are there and not None: strength, clip_skip, guidance_rescale, eta,
        noise ("cpu" or "cuda"), image_guidance_scale, mask_blur, literal, refiner (a name), refiner_at, vae (a name),
        hires (upscale or width and height, steps, upscaler, strength) and loras (names to scales).
        """
        p = self.parameters
        hires: Mapping[str, Any] = p.get("hires") or {}
        strength = hires.get("strength") if hires else p.get("strength")
        noise = p.get("noise")
        fields = {
            "Steps": p["steps"],
            "Sampler": p["sampler"],
            "Schedule type": shown_schedule(p["schedule"]),
            "CFG scale": _number(p["guidance_scale"]),
            "Seed": self.seeds[index],
            "Size": f"{p['width']}x{p['height']}",
            "Model": p["model"],
            "VAE": p.get("vae"),
            "Denoising strength": _number(strength),
            "Clip skip": p.get("clip_skip"),
            "RNG": None if noise is None else {"cpu": "CPU", "cuda": "NV"}[noise],
            "Eta DDIM" if p["sampler"] == "DDIM" else "Eta": _number(p.get("eta")),
            "CFG Rescale": _number(p.get("guidance_rescale")),
            "Image CFG scale": _number(p.get("image_guidance_scale")),
            "Mask blur": p.get("mask_blur"),
            "Literal prompt": p.get("literal"),
            "Refiner": p.get("refiner"),
            "Refiner switch at": _number(p.get("refiner_at")),
            "Hires upscale": _number(hires.get("upscale")),
            "Hires resize": f"{hires['width']}x{hires['height']}" if "width" in hires else None,
            "Hires steps": hires.get("steps"),
            "Hires upscaler": hires.get("upscaler"),
            "LoRAs": _loras(p.get("loras") or {}),
            "Version": f"nativesd {__version__}",
        }
        prompt, negative = (
            p[name] if isinstance(p[name], str) else p[name][index] for name in ("prompt", "negative_prompt")
        )
        return write_infotext(prompt, negative, fields)

    def save(self, path: str | Path) -> list[Path]:
        """Write the pictures, several as -0, -1, ... before the suffix, and return the paths.

        The parameters travel along as A1111 keeps them: PNG files carry `infotext` in their `parameters` chunk, JPEG
        and WebP files in the EXIF UserComment; other formats carry nothing. JPEG and WebP are lossy, of quality 95. A
        file appears whole or not at all. Raises UsageError for a suffix that is no picture format, and for parameters
        that are too long for JPEG, SourceError where the file cannot be written.
        """
        path = Path(path)
        picture_format = Image.registered_extensions().get(path.suffix.lower())
        if picture_format not in Image.SAVE:
            raise UsageError(f"{path}: {path.suffix or 'no suffix'} is not a picture format; use .png")
        paths = [path]
        if len(self.images) > 1:
            paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self.images))]
        for index, target in enumerate(paths):
            self._write(index, target, picture_format)
        return paths

    def _options(self, index: int, picture_format: str) -> dict[str, Any]:
        """What Pillow is told beside the format."""
        if picture_format == "PNG":
            chunk = PngInfo()
            chunk.add_text("parameters", self.infotext(index))  # iTXt where the text is not Latin-1
            return {"pnginfo": chunk}
        if picture_format in ("JPEG", "WEBP"):
            exif = user_comment_exif(self.infotext(index))
            if picture_format == "JPEG" and len(exif) > JPEG_EXIF_BYTES:
                raise UsageError("the parameters do not fit into a JPEG, which holds 64 kB of them: save as .png")
            return {"exif": exif, "quality": QUALITY}
        return {}

    def _write(self, index: int, target: Path, picture_format: str) -> None:
        options = self._options(index, picture_format)
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=target.parent, suffix=target.suffix, delete=False) as file:
                temporary = file.name
                self.images[index].save(file, format=picture_format, **options)
            os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is private, a picture is not
            os.replace(temporary, target)
        except (OSError, ValueError) as error:  # ValueError: a size that the format does not have
            reason = getattr(error, "strerror", None) or error
            raise SourceError(f"{target} cannot be written: {reason}") from error
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):  # after the replacement it is not there
                    os.unlink(temporary)


def _number(value: float | None) -> str | None:
    """A number in the fewest digits that mean it: "7", "7.5", "0.30000000000000004"."""
    if value is None:
        return None
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _loras(loras: Mapping[str, tuple[float, float]]) -> str | None:
    """As A1111 writes them in a prompt: one scale for both, or the text encoders' and then the UNet's."""
    tags = [
        f"<lora:{name}:{_number(text)}{'' if text == unet else f':{_number(unet)}'}>"
        for name, (unet, text) in loras.items()
    ]
    return " ".join(tags) or None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
