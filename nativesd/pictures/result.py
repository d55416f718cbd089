"""Pictures with the parameters that made them, and how those are written into files."""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from nativesd.destination import fresh, hold
from nativesd.errors import SourceError, UsageError
from nativesd.pictures.embedded import user_comment_exif
from nativesd.pictures.infotext import (
    EMPHASIS,
    GUESS,
    IMAGE_MODULE,
    MASKED_CONTENT,
    ONLY_MASKED,
    SAMPLING_FIELDS,
    SDXL_FIELDS,
    SOFT_INPAINT,
    SOFT_INPAINT_FIELDS,
    UNIT,
    shown_schedule,
    write_infotext,
    write_unit,
)
from nativesd.version import __version__

QUALITY = 95
"""JPEG's and lossy WebP's. A1111's is 80, which leaves visible blocks; 95 is the highest that Pillow advises."""
WAIT = 10.0
"""Seconds for another process to finish the same picture file; the last one stays."""
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
"""Suffixes of models, which are spoken of without them."""
JPEG_EXIF_BYTES = 65533
"""What one JPEG segment holds beside its length (ITU-T T.81, B.1.1.4)."""


@dataclass(frozen=True, repr=False)
class Result:
    """`images`, their `seeds`, the call's `parameters`, and the `latents` (B, C, h, w) as the sampler left them.

    `each` has the parameters of every picture where prompts were painted one after the other, with pictures or LoRAs of
    their own; what these have not in common is then not among `parameters`.
    """

    images: list[Image.Image]
    seeds: list[int]
    parameters: dict[str, Any]
    latents: Tensor
    each: Sequence[dict[str, Any]] = ()

    def __repr__(self) -> str:
        count = len(self.images)
        seeds = f"seed {self.seeds[0]}" if count == 1 else f"seeds {self.seeds[0]}, ..."
        width, height = self.images[0].size
        return f"<Result: {count} {'picture' if count == 1 else 'pictures'} of {width}x{height}, {seeds}>"

    def _repr_html_(self) -> str:
        """For notebooks: the pictures side by side, each with its parameters as the text that hovers over it."""
        return "".join(self._shown(index) for index in range(len(self.images)))

    def _shown(self, index: int) -> str:
        data = BytesIO()
        self.images[index].save(data, format="PNG")
        text = escape(self.infotext(index), quote=True)
        return f'<img src="data:image/png;base64,{b64encode(data.getvalue()).decode()}" title="{text}">'

    def infotext(self, index: int = 0) -> str:
        """The parameters of picture `index` in the text form that A1111 writes and many tools read.

        Of `parameters` these are needed: prompt, negative_prompt, steps, sampler, schedule, guidance_scale, width,
        height, model. These are written where they are there and not None: model_hash, strength, clip_skip, guidance
        and savings (texts), emphasis, guidance_rescale, eta, noise ("cpu", ...), image_guidance_scale, mask_blur,
        literal, refiner (a name), refiner_at, vae (a name), mask_fill, only_masked, steps_as, soft_inpaint, sdxl,
        sampling and variation (the fields of a `SoftInpaint`, an `SDXL`, a `Sampling`, a `Variation`), tiling, tiles,
        regions (of a `Region`'s fields each), hires (`Hires.fields`), loras (names to scales), and control and
        image_prompts (names or files), with the scales of each in control_scales and image_prompt_scales, and what else
        they were asked for in control_settings and image_prompt_settings: they become A1111's units of ControlNet.
        """
        p = self.of(index)
        hires: Mapping[str, Any] = p.get("hires") or {}
        strength = hires.get("strength") if hires else p.get("strength")
        noise = p.get("noise")
        fields = {
            "Steps": p["steps"],
            "Sampler": p["sampler"],
            "Schedule type": shown_schedule(p["schedule"]),
            "CFG scale": _number(p["guidance_scale"]),
            "Seed": p["seed"],
            "Size": f"{p['width']}x{p['height']}",
            "Model hash": p.get("model_hash"),
            "Model": p["model"],
            "VAE": p.get("vae"),
            "Denoising strength": _number(strength),
            "Denoising steps as": p.get("steps_as"),
            "Clip skip": p.get("clip_skip"),
            "RNG": None if noise is None else {"cpu": "CPU", "cuda": "NV", "comfyui": "ComfyUI"}[noise],
            "Eta DDIM" if p["sampler"] == "DDIM" else "Eta": _number(p.get("eta")),
            **{SAMPLING_FIELDS[field]: _number(value) for field, value in (p.get("sampling") or {}).items()},
            "Guidance": p.get("guidance"),
            **_savings(p.get("savings") or ""),
            "CFG Rescale": _number(p.get("guidance_rescale")),
            "Image CFG scale": _number(p.get("image_guidance_scale")),
            **_sdxl(p.get("sdxl") or {}),
            **_variation(p.get("variation") or {}),
            "Regions": json.dumps(p["regions"], ensure_ascii=False) if p.get("regions") else None,
            "Tiling": None if p.get("tiling") is None else p["tiling"] == "xy" or p["tiling"],
            "Tiles": None if p.get("tiles") is None else "{} overlap {}".format(*p["tiles"]),
            "Mask blur": p.get("mask_blur"),
            "Masked content": MASKED_CONTENT.get(p.get("mask_fill", "")),
            "Inpaint area": None if p.get("only_masked") is None else ONLY_MASKED,
            "Masked area padding": p.get("only_masked"),
            SOFT_INPAINT: True if p.get("soft_inpaint") else None,
            **{SOFT_INPAINT_FIELDS[field]: _number(value) for field, value in (p.get("soft_inpaint") or {}).items()},
            **_batch(p),
            "Emphasis": EMPHASIS.get(p.get("emphasis", "")),
            "Literal prompt": p.get("literal"),
            "Refiner": p.get("refiner"),
            "Refiner switch at": _number(p.get("refiner_at")),
            "Hires upscale": _number(hires.get("upscale")),
            "Hires resize": f"{hires['width']}x{hires['height']}" if "width" in hires else None,
            "Hires steps": hires.get("steps"),
            "Hires upscaler": hires.get("upscaler"),
            "Hires sampler": hires.get("sampler"),
            "Hires schedule type": shown_schedule(hires["schedule"]) if "schedule" in hires else None,
            "Hires prompt": hires.get("prompt"),
            "Hires negative prompt": hires.get("negative_prompt"),
            "Hires CFG Scale": _number(hires.get("guidance_scale")),
            "LoRAs": _loras(p.get("loras") or {}),
            **_units(p),
            "Version": f"nativesd {__version__}",
        }
        return write_infotext(p["prompt"], p["negative_prompt"], fields)

    def of(self, index: int) -> dict[str, Any]:
        """The parameters of picture `index` alone, with its own prompt and seeds."""
        if self.each:
            return self.each[index]
        own = {name: self.parameters[name] for name in ("prompt", "negative_prompt")}
        own = {name: given if isinstance(given, str) else given[index] for name, given in own.items()}
        variation: Mapping[str, Any] = self.parameters.get("variation") or {}
        batched = self.parameters.get("noise") == "comfyui"  # it comes again with those before it
        if variation.get("seed") is not None and not batched:
            own["variation"] = {**variation, "seed": (variation["seed"] + index) % (1 << 64)}
        if batched:
            seed = self.seeds[index]
            own["batch"] = (self.seeds[:index].count(seed), self.seeds.count(seed))
        return {**self.parameters, **own, "seed": self.seeds[index]}

    def save(self, path: str | Path) -> list[Path]:
        """Write the pictures, several as -0, -1, ... before the suffix, and return the paths.

        The parameters travel along as A1111 keeps them: PNG files carry `infotext` in their `parameters` chunk, JPEG
        and WebP files in the EXIF UserComment; other formats carry nothing. JPEG and WebP are lossy, of quality 95. A
        file appears whole or not at all. Raises UsageError for a suffix that is no picture format, and for parameters
        that are too long for JPEG, SourceError where the file cannot be written.
        """
        path = Path(path)
        kind = check_target(path)
        paths = [path]
        if len(self.images) > 1:
            paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self.images))]
        for index, target in enumerate(paths):
            write_picture(self.images[index], target, **text_options(self.infotext(index), kind))
        return paths

    def encoded(self, index: int = 0, kind: str = "PNG", **options: Any) -> bytes:
        """Picture `index` as a file of a format of Pillow's, with its parameters inside as `save` keeps them.

        Further options are the format's, such as `compress_level` of a PNG. Raises UsageError for parameters that are
        too long for JPEG.
        """
        data = BytesIO()
        self.images[index].save(data, format=kind, **{**text_options(self.infotext(index), kind), **options})
        return data.getvalue()


def text_options(text: str, kind: str) -> dict[str, Any]:
    """What Pillow is told beside a format, for files that carry parameters. Raises UsageError for too long a text."""
    if kind == "PNG":
        chunk = PngInfo()
        chunk.add_text("parameters", text)  # iTXt where the text is not Latin-1
        return {"pnginfo": chunk}
    if kind in ("JPEG", "WEBP"):
        exif = user_comment_exif(text)
        if kind == "JPEG" and len(exif) > JPEG_EXIF_BYTES:
            raise UsageError("the parameters do not fit into a JPEG, which holds 64 kB of them: save as .png")
        return {"exif": exif, "quality": QUALITY}
    return {}


def _sdxl(given: Mapping[str, Any]) -> dict[str, object]:
    """The fields of an `SDXL`, under names of our own: other programs write none."""
    return {
        name: f"{value[0]}x{value[1]}" if isinstance(value, tuple) else value
        for name, value in ((SDXL_FIELDS[field], value) for field, value in given.items())
    }


def _savings(text: str) -> dict[str, object]:
    """A1111's field of token merging where that is all, else the records' text."""
    merging = re.fullmatch(r"tome(?::ratio=([0-9.]+))?", text)
    return {"Token merging ratio": merging[1] or "0.5"} if merging else {"Savings": text or None}


def _batch(parameters: Mapping[str, Any]) -> dict[str, object]:
    """A1111's fields of a picture's place among several, where its noise depends on that."""
    place, pictures = parameters.get("batch") or (0, 1)
    return {"Batch size": pictures, "Batch pos": place} if pictures > 1 else {}


def _variation(variation: Mapping[str, Any]) -> dict[str, object]:
    """A1111's fields of a variation."""
    strength, size = variation.get("strength"), variation.get("resize_from")
    return {
        "Variation seed": variation["seed"] if strength else None,
        "Variation seed strength": _number(strength) if strength else None,
        "Seed resize from": None if size is None else f"{size[0]}x{size[1]}",
        "ENSD": variation.get("ensd") or None,
    }


def picture_format(path: Path) -> str:
    """Pillow's name of the format that a file's suffix stands for. Raises UsageError for what it cannot write."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise UsageError(f"{path}: {path.suffix or 'no suffix'} is not a picture format; use .png")
    return kind


def write_picture(image: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture file, whole or not at all, with the `options` of its format; it replaces what is there.

    Raises UsageError for a suffix that is no picture format, SourceError where the file cannot be written.
    """
    kind = picture_format(path)
    with fresh(path, replace=True, parents=False, wait=WAIT) as temporary:
        try:
            image.save(temporary, format=kind, **options)
        except ValueError as error:  # a size that the format does not have
            raise SourceError(f"{path} cannot be written: {error}") from error


def check_target(path: Path) -> str:
    """The format of a picture file that is to be written, before there is a picture.

    Raises UsageError for a suffix that is no picture format, SourceError where the folder is missing or not writable.
    """
    kind = picture_format(path)
    try:
        if path.is_dir():
            raise SourceError(f"{path} cannot be written: it is a folder")
        if not path.parent.is_dir():
            raise SourceError(f"{path} cannot be written: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise SourceError(f"{path} cannot be written: the folder {path.parent} is not writable")
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise SourceError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    with suppress(UsageError), hold(path):  # the system's word on it; another process that writes there will be done
        return kind
    return kind


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


def _units(p: Mapping[str, Any]) -> dict[str, object]:
    """Controls and image prompts as A1111's ControlNet extension writes its units, and behind that what it has not."""
    units = []
    for kind, module in (("control", "none"), ("image_prompt", IMAGE_MODULE)):
        names = p.get("control" if kind == "control" else "image_prompts") or ()
        settings = p.get(f"{kind}_settings") or [{}] * len(names)
        for name, scale, own in zip(names, p.get(f"{kind}_scales") or (), settings, strict=True):
            more = {key: value for key, value in own.items() if key not in ("preprocess", "start", "end")}
            units.append({
                "Module": own.get("preprocess", module),
                "Model": Path(name).stem if Path(name).suffix in WEIGHTS else Path(name).name,
                "Weight": _number(scale),
                "Guidance Start": _number(own.get("start", 0.0)),
                "Guidance End": _number(own.get("end", 1.0)),
                "Control Mode": GUESS if kind == "control" and p.get("guess_mode") else None,
                **{key.replace("_", " ").title(): value for key, value in more.items()},
            })  # fmt: skip
    return {UNIT.format(number): write_unit(unit) for number, unit in enumerate(units)}
