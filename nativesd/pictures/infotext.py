"""The text in which A1111's web UI, and many tools after it, keep what a picture was made with.

    a prompt
    over lines
    Negative prompt: another
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, ...

The rules are those of A1111's modules/infotext_utils.py (writing and parsing), modules/processing.py
(`create_infotext`: the fields) and modules/images.py (where pictures keep the text).
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from nativesd.errors import SourceError, UsageError

Maker = Literal["nativesd", "a1111", "comfyui", "other"]
"""Whose conventions hold for what a text does not say; "other" is a program whose conventions are not known."""


@dataclass(frozen=True)
class Infotext:
    """A parsed text. `fields` are the pairs of its last line under the names that stand there, all as texts."""

    prompt: str
    negative_prompt: str
    fields: Mapping[str, str]


# ---- writing and parsing

_NEGATIVE = "Negative prompt:"
_TO_BE_QUOTED = re.compile(r'[,:"\r\n]|^\s|\s$')
_QUOTED = re.compile(r'"(?:\\.|[^\\"])+"(?=,|$)')
_NAME_END = re.compile(r"[\w \-/]*")


def write_infotext(prompt: str, negative: str, fields: Mapping[str, object]) -> str:
    """The text of a prompt, a negative prompt and fields; a field that is None is left out.

    A value with a comma, a colon or a line break is quoted as JSON, as A1111 does; so is one with a quote or with
    blanks around it, which its parser would lose. What `parse_infotext` cannot give back: blanks around a line of a
    prompt, blank lines before it, a line of it that begins with "Negative prompt:", and fewer than three fields.
    """
    pairs = ", ".join(f"{name}: {_quote(str(value))}" for name, value in fields.items() if value is not None)
    negative_lines = f"{_NEGATIVE} {negative}\n" if negative else ""
    return f"{prompt}\n{negative_lines}{pairs}".strip()


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if _TO_BE_QUOTED.search(value) else value


def parse_infotext(text: str) -> Infotext:
    """The parts of a text; never fails.

    The last line is fields if it has three pairs at least, else it belongs to the prompts. Beyond A1111's rules, a
    value may be a bare JSON list or object, as "Hashes" and "Civitai resources" are.
    """
    lines = text.strip().split("\n")
    pairs = _pairs(lines[-1])
    if len(pairs) >= 3:
        lines.pop()
    else:
        pairs = []
    prompts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            negative = True
            line = line.removeprefix(_NEGATIVE).strip()
        if line or prompts[negative]:
            prompts[negative].append(line)
    return Infotext("\n".join(prompts[False]), "\n".join(prompts[True]), dict(pairs))


def _pairs(line: str) -> list[tuple[str, str]]:
    """The `name: value` pairs of a line, in time linear in its length."""
    pairs = []
    start = 0
    while (colon := line.find(":", start)) >= 0:
        name = _name_before(line, start, colon)
        if len(name) < 2:
            start = colon + 1
            continue
        value, start = _value_at(line, colon + 1)
        pairs.append((name, value))
    return pairs


def _name_before(line: str, start: int, colon: int) -> str:
    """The longest name that ends at the colon: word characters, blanks, - and /, the first a word character."""
    match = _NAME_END.match(line[start:colon][::-1])
    return (match[0] if match else "")[::-1].lstrip(" -/")


def _value_at(line: str, start: int) -> tuple[str, int]:
    """The value that begins after a colon, and where the next pair may begin."""
    while start < len(line) and line[start].isspace():
        start += 1
    if quoted := _QUOTED.match(line, start):
        try:
            return str(json.loads(quoted[0])), quoted.end() + 1
        except ValueError:
            return quoted[0], quoted.end() + 1
    if line.startswith(("{", "["), start):
        try:
            _, end = json.JSONDecoder().raw_decode(line, start)
        except (ValueError, RecursionError):
            end = -1
        if end == len(line) or line.startswith(",", end):
            return line[start:end], end + 1
    end = line.find(",", start)
    if end < 0:
        end = len(line)
    return line[start:end], end + 1


# ---- in pictures

_USER_COMMENT, _UNDEFINED, _LONG = 0x9286, 7, 4  # EXIF 2.3: the tag, and TIFF's field types
_UNICODE, _ASCII, _UNKNOWN = b"UNICODE\0", b"ASCII\0\0\0", bytes(8)
_UNREADABLE = (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error, zlib.error)
"""What Pillow raises for a broken picture."""


def user_comment_exif(text: str) -> bytes:
    """EXIF whose only field is a UserComment, in UTF-16, big-endian like the whole: piexif's form, which A1111 writes.

    The layout is TIFF 6.0's: a directory that points to the EXIF directory, which points to the text.
    """
    comment = _UNICODE + text.encode("utf-16-be")
    exif_at = 8 + 18  # after the header and a directory of one entry
    header = struct.pack(">2sHI", b"MM", 42, 8)
    directory = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, _LONG, 1, exif_at, 0)
    exif = struct.pack(">HHHIII", 1, _USER_COMMENT, _UNDEFINED, len(comment), exif_at + 18, 0)
    return b"Exif\0\0" + header + directory + exif + comment


def read_infotext(path: str | Path) -> str:
    """The text that a picture keeps: PNG's "parameters" chunk, else the EXIF UserComment (JPEG, WebP, PNG).

    Raises SourceError for a file that is no picture, and for one without such a text.
    """
    try:
        with Image.open(path) as image:
            texts = _png_texts(image)
            exif = image.getexif()
            comment = exif.get_ifd(ExifTags.IFD.Exif).get(_USER_COMMENT)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise SourceError(f"{path} cannot be read as a picture: {error}") from error
    graphs = [texts.get("prompt", ""), texts.get("workflow", "")]
    workflow = any(map(_is_json, graphs)) or any(map(_is_workflow, exif.values()))
    text = texts.get("parameters", "")
    if not text and isinstance(comment, str | bytes):
        text = comment if isinstance(comment, str) else _decode_user_comment(comment, path)
    if text and not _is_json(text):
        return text
    if workflow or (text and '"class_type"' in text):
        raise SourceError(
            f"{path} holds a ComfyUI workflow and no parameters text: workflow graphs are not read, "
            f"save the picture with a node that writes A1111's parameters"
        )
    if text:
        raise SourceError(f"{path} holds its parameters as JSON, which is not read: only A1111's text form is")
    raise SourceError(
        f'{path} holds no generation parameters: there is neither a PNG text chunk "parameters" nor an EXIF UserComment'
    )


def _png_texts(image: Image.Image) -> dict[str, str]:
    """The text chunks of a PNG; those after the pixels only where none is before them."""
    if not isinstance(image, PngImageFile):
        return {}
    texts = image.info if "parameters" in image.info else image.text
    return {str(name): str(text) for name, text in texts.items() if isinstance(text, str)}


def _is_workflow(value: object) -> bool:
    """Whether an EXIF value is one of those in which ComfyUI keeps a graph in WebP (comfy_extras/nodes_images.py)."""
    return isinstance(value, str) and value.startswith(("prompt:", "workflow:"))


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith("{"):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _decode_user_comment(comment: bytes, path: str | Path) -> str:
    """A UserComment's text. UTF-16 may be in either order, as the writers do not agree: its blanks and digits tell."""
    code, payload = comment[:8], comment[8:]
    if code not in (_UNICODE, _ASCII, _UNKNOWN):
        payload = comment
    zeros_first, zeros_last = payload[::2].count(0), payload[1::2].count(0)
    if payload.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif code == _UNICODE and zeros_first + zeros_last:
        encoding = "utf-16-be" if zeros_first >= zeros_last else "utf-16-le"
    else:
        encoding = "utf-8"
    try:
        return payload.decode(encoding).strip("\0")
    except UnicodeDecodeError:
        raise SourceError(f"{path}: its EXIF UserComment is not text in {encoding}") from None


# ---- schedules by name

_SHOWN_SCHEDULES = {"normal": "Uniform", "sgm uniform": "SGM Uniform"}
_SCHEDULE_SPELLINGS = {"uniform": "normal", "sgmuniform": "sgm uniform"}


def shown_schedule(schedule: str) -> str:
    """A schedule as A1111 shows it, such as "Karras"; our "normal" is its "Uniform" (modules/sd_schedulers.py)."""
    return _SHOWN_SCHEDULES.get(schedule, schedule.title())


def schedule_named(shown: str) -> str:
    """Our name for a schedule in A1111's or ComfyUI's spelling; an unknown one in lower case."""
    name = re.sub(r"[\s_]+", " ", shown.strip().lower())
    return _SCHEDULE_SPELLINGS.get(name, name)


# ---- fields to options


def _integer(name: str, value: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", value):
        raise UsageError(f"{name}: {value!r} is not a whole number")
    return int(value)


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name}: {value!r} is not a number")
    return number


def _size(name: str, value: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value)
    if match is None:
        raise UsageError(f"{name}: {value!r} is not a size such as 512x768")
    return int(match[1]), int(match[2])


def _noise(name: str, value: str) -> str:
    noise = {"cpu": "cpu", "nv": "cuda", "gpu": "cuda"}.get(value.lower())
    if noise is None:
        raise UsageError(f"{name}: {value!r} is not a source of noise: CPU, GPU or NV")
    return noise


def _text(name: str, value: str) -> str:
    return value


def _truth(name: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise UsageError(f"{name}: {value!r} is neither True nor False")
    return value == "True"


_OPTIONS: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "steps": ("steps", _integer),
    "sampler": ("sampler", _text),
    "cfg scale": ("guidance_scale", _number),
    "seed": ("seed", _integer),
    "denoising strength": ("strength", _number),
    "clip skip": ("clip_skip", _integer),
    "cfg rescale": ("guidance_rescale", _number),
    "cfg rescale φ": ("guidance_rescale", _number),
    "guidance rescale": ("guidance_rescale", _number),
    "denoising steps as": ("steps_as", _text),
    "eta": ("eta", _number),
    "eta ddim": ("eta", _number),
    "rng": ("noise", _noise),
    "image cfg scale": ("image_guidance_scale", _number),
    "mask blur": ("mask_blur", _integer),
    "literal prompt": ("literal", _truth),
    "model": ("model", _text),
}
"""Fields, in lower case, that are one option."""

_HIRES: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "hires upscale": ("upscale", _number),
    "hires steps": ("steps", _integer),
    "hires upscaler": ("upscaler", _text),
    "hires sampler": ("sampler", _text),
    "hires schedule type": ("schedule", lambda _, value: schedule_named(value)),
    "hires prompt": ("prompt", _text),
    "hires negative prompt": ("negative_prompt", _text),
    "hires cfg scale": ("guidance_scale", _number),
}

_HARMLESS = frozenset(
    {
        "app", "aspect ratio", "batch pos", "batch size", "civitai metadata", "civitai resources", "created date",
        "hashes", "init image hash", "model hash", "negative template", "orientation", "template", "ti", "ti hashes",
        "user", "vae hash", "version",
    }
)  # fmt: skip
"""Fields that name things or tell circumstances, and do not change the picture."""

_NEUTRAL: dict[str, frozenset[str]] = {
    name: frozenset(values)
    for names, values in (
        (("ensd", "ngms", "token merging ratio", "token merging ratio hr", "variation seed strength"), ("0", "0.0")),
        (("schedule min sigma", "schedule max sigma", "schedule rho"), ("0", "0.0")),
        (("sigma churn", "sigma tmin", "sigma tmax", "skip early cfg"), ("0", "0.0")),
        (("sigma noise",), ("1", "1.0")),
        (("beta schedule alpha", "beta schedule beta"), ("0.6",)),
        (("tiling", "face restoration", "discard penultimate sigma", "sgm noise multiplier"), ("false", "none")),
        (("emphasis",), ("original",)),
        (("fp8 weight",), ("disable",)),
        (("vae encoder", "vae decoder"), ("full",)),
        (("vae", "refiner"), ("none", "automatic")),
        (("hires sampler",), ("use same sampler",)),
        (("hires schedule type",), ("use same scheduler",)),
        (("hires checkpoint",), ("use same checkpoint",)),
        (("hires module 1",), ("use same choices", "built-in")),
        (("denoise",), ("1", "1.0", "1.00")),
    )
    for name in names
}
"""Values of other fields, in lower case, that mean no change (defaults of A1111's and Forge's shared_options.py)."""


def generation_options(info: Infotext) -> tuple[dict[str, object], list[str]]:
    """The options that make the picture again, and the names of the fields that would change it but have no option.

    Options, each where the text says or implies it: steps, sampler, schedule, guidance_scale, seed, width, height,
    strength, clip_skip, guidance_rescale, eta, noise ("cpu" or "cuda"), literal, mask_blur, image_guidance_scale, hires
    and model (a name, not a path). `hires`
    is a dict with upscale or width and height (one of them may be 0: by the ratio), steps, upscaler and strength,
    which is what "Denoising strength" means beside it. Names of fields match in any case. A fused sampler such as
    "DPM++ 2M Karras" stays one name, without a schedule.

    What a text leaves out is its maker's default. A1111, and its forks: noise of the GPU; a schedule that is
    "Automatic" is the sampler's default there, and one that is not named at all is older than those defaults, so
    uniform. ComfyUI, whose samplers are spelt like "dpmpp_2m": noise of the CPU, and the normal schedule, which nodes
    do not write; Civitai's generator is taken for it. Pictures of this package: noise of the CPU. Other programs: as
    it stands there.

    Raises UsageError for a value that cannot be, naming its field.
    """
    fields = {name.lower(): (name, value.strip()) for name, value in info.fields.items()}
    options: dict[str, object] = {}
    hires: dict[str, object] = {}
    unheeded: list[str] = []
    schedule: str | None = None
    for key, (name, value) in fields.items():
        if not value or key in _HARMLESS or value.lower() in _NEUTRAL.get(key, ()):
            continue
        if key in _OPTIONS:
            option, convert = _OPTIONS[key]
            options[option] = convert(name, value)
        elif key in _HIRES:
            option, convert = _HIRES[key]
            hires[option] = convert(name, value)
        elif key == "size":
            options["width"], options["height"] = _size(name, value)
        elif key == "hires resize":
            hires["width"], hires["height"] = _size(name, value)
        elif key in ("schedule type", "scheduler"):
            schedule = schedule_named(value)
        else:
            unheeded.append(name)

    if "first pass size" in fields and "strength" in options:  # A1111's upscaling before "Hires" fields existed
        del options["strength"]
        unheeded.append(fields["denoising strength"][0])
    if hires:
        if "strength" in options:
            hires["strength"] = options.pop("strength")
        options["hires"] = hires
    maker = _maker({key: value for key, (_, value) in fields.items()})
    if maker == "comfyui" and options.get("strength") == 1:  # all noise, so no picture to start from
        del options["strength"]
    schedule = _meant_schedule(str(options.get("sampler", "")), schedule, maker)
    if schedule is not None:
        options["schedule"] = schedule
    if maker != "other":
        options.setdefault("noise", "cuda" if maker == "a1111" else "cpu")
    return options, unheeded


def _maker(fields: Mapping[str, str]) -> Maker:
    """Who wrote the fields (names in lower case), by the version's form and the sampler's spelling."""
    version = fields.get("version", "")
    civitai = not version and ("civitai resources" in fields or "civitai metadata" in fields)
    if version.startswith("nativesd"):
        return "nativesd"
    if "comfyui" in version.lower() or civitai or re.fullmatch(r"[a-z0-9_]+", fields.get("sampler", "")):
        return "comfyui"
    if "app" in fields or (version and not _A1111_VERSION.match(version)):
        return "other"
    return "a1111"


_A1111_VERSION = re.compile(r"(f|neo-?|v)?\d|[0-9a-f]{7,40}$")
"""A1111's such as v1.10.1, Forge's such as f2.0.1v1.10.1 or neo-2.2, and commits."""

# modules/sd_samplers_kdiffusion.py of A1111 1.9 and 1.10, the option "scheduler", names without blanks in lower case
_AUTOMATIC_IS = {
    **dict.fromkeys(("dpm++2m", "dpm++sde", "dpm++2sa", "dpm2", "dpm2a", "restart"), "karras"),
    **dict.fromkeys(("dpm++2msde", "dpm++2msdeheun", "dpm++3msde"), "exponential"),
    # timesteps of their own: modules/sd_samplers_timesteps.py, sd_samplers_lcm.py
    **dict.fromkeys(("ddim", "ddimcfg++", "plms", "unipc", "lcm"), "automatic"),
}
_FUSED = re.compile(
    r".[ _](karras|(poly)?exponential|((sgm|ddim)[ _]?)?uniform|simple|beta|normal"
    r"|linear[ _]quadratic|kl[ _]optimal|align[ _]your[ _]steps)$",
    re.IGNORECASE,
)


def _meant_schedule(sampler: str, schedule: str | None, maker: Maker) -> str | None:
    """The schedule that a sampler ran with; None where its own name says it, or nothing does."""
    own = _AUTOMATIC_IS.get(re.sub(r"\s+", "", sampler.lower()), "normal")
    match maker:
        case "a1111" | "comfyui" if schedule in (None, "automatic") and _FUSED.search(sampler):
            return None
        case "a1111" if schedule == "automatic":
            return own
        case "a1111" | "comfyui" if schedule is None and sampler:
            return own if own == "automatic" and not sampler.islower() else "normal"
        case _:
            return schedule
