"""Pictures with the parameters that made them, and how those are written into files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from nativesd.errors import SourceError, UsageError
from nativesd.version import __version__


@dataclass(frozen=True)
class Result:
    """`images`, their `seeds`, the call's `parameters`, and the `latents` (B, C, h, w) as the sampler left them."""

    images: list[Image.Image]
    seeds: list[int]
    parameters: dict[str, Any]
    latents: Tensor

    def infotext(self, index: int = 0) -> str:
        """The parameters of picture `index` in the text form that A1111 writes and many tools read."""
        p = self.parameters
        lines = [p["prompt"] if isinstance(p["prompt"], str) else p["prompt"][index]]
        if p["negative_prompt"]:
            lines.append(f"Negative prompt: {p['negative_prompt']}")
        fields = {
            "Steps": p["steps"],
            "Sampler": p["sampler"],
            "Schedule type": p["schedule"].capitalize(),
            "CFG scale": f"{p['guidance_scale']:g}",
            "Seed": self.seeds[index],
            "Size": f"{p['width']}x{p['height']}",
            "Model": p["model"],
            "Version": f"nativesd {__version__}",
        }
        lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
        return "\n".join(lines)

    def save(self, path: str | Path) -> list[Path]:
        """Write the pictures, several as -0, -1, ... before the suffix, and return the paths.

        PNG files carry `infotext` in their `parameters` chunk. A file appears whole or not at all. Raises UsageError
        for a suffix that is no picture format, SourceError where the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in Image.registered_extensions():
            raise UsageError(f"{path}: {path.suffix or 'no suffix'} is not a picture format; use .png")
        paths = [path]
        if len(self.images) > 1:
            paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self.images))]
        for index, target in enumerate(paths):
            self._write(index, target)
        return paths

    def _write(self, index: int, target: Path) -> None:
        options: dict[str, Any] = {}
        if target.suffix.lower() == ".png":
            chunk = PngInfo()
            chunk.add_text("parameters", self.infotext(index))
            options["pnginfo"] = chunk
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=target.parent, suffix=target.suffix, delete=False) as file:
                temporary = file.name
                self.images[index].save(file, **options)
            os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is private, a picture is not
            os.replace(temporary, target)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
