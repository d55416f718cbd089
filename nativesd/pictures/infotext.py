"""A1111's text, in which its web UI and many tools after it keep what a picture was made with: written and parsed.

    a prompt
    over lines
    Negative prompt: another
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, ...

The rules are those of A1111's modules/infotext_utils.py. What the fields mean is in `programs.a1111`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

SDXL_FIELDS = {
    "prompt_2": "Second prompt", "negative_prompt_2": "Second negative prompt", "original": "Original size",
    "crop": "Crop", "target": "Target size", "negative_original": "Negative original size",
    "negative_crop": "Negative crop", "negative_target": "Negative target size",
    "aesthetic_score": "Aesthetic score", "negative_aesthetic_score": "Negative aesthetic score",
}  # fmt: skip
"""What an `SDXL` is called in the text."""


@dataclass(frozen=True)
class Infotext:
    """A parsed text. `fields` are the pairs of its last line under the names that stand there, all as texts."""

    prompt: str
    negative_prompt: str
    fields: Mapping[str, str]


_NEGATIVE = "Negative prompt:"
_TO_BE_QUOTED = re.compile(r'[,:"\r\n]|^\s|\s$')
_QUOTED = re.compile(r'"(?:\\.|[^\\"])+"(?=,|\n|$)')
_VALUE_END = re.compile(r"[,\n]")
_NAME_END = re.compile(r"[\w \-/]*")


def write_infotext(prompt: str, negative: str, fields: Mapping[str, object]) -> str:
    """The text of a prompt, a negative prompt and fields; a field that is None is left out.

    A value with a comma, a colon or a line break is quoted as JSON, as A1111 does; so is one with a quote or with
    blanks around it, which its parser would lose. What `parse_infotext` cannot give back: blanks around a line of a
    prompt, blank lines before it, a line of it that begins with "Negative prompt:" or "Steps:", and fewer than three
    fields without steps.
    """
    pairs = ", ".join(f"{name}: {_quote(str(value))}" for name, value in fields.items() if value is not None)
    negative_lines = f"{_NEGATIVE} {negative}\n" if negative else ""
    return f"{prompt}\n{negative_lines}{pairs}".strip()


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if _TO_BE_QUOTED.search(value) else value


def parse_infotext(text: str) -> Infotext:
    """The parts of a text; never fails.

    The fields begin at the last line that starts with "Steps:" and a number, and all that follows belongs to them: the
    lines "Template:" and "Negative Template:" of sd-dynamic-prompts, and quoted values over several lines. Where there
    is no such line, the last is fields if it has three pairs at least, else it belongs to the prompts. Beyond A1111's
    rules, a value may be a bare JSON list or object, as "Hashes" and "Civitai resources" are.
    """
    lines = text.strip().split("\n")
    starts = [i for i, line in enumerate(lines) if _STEPS.match(line)]
    first = starts[-1] if starts else len(lines) - 1
    pairs = _fields("\n".join(lines[first:]))
    if starts or len(pairs) >= 3:
        lines = lines[:first]
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


_STEPS = re.compile(r"\s*Steps:\s*\d")
_TEMPLATE = re.compile(r"^(Negative Template|Template):", re.MULTILINE)


def _fields(text: str) -> list[tuple[str, str]]:
    """The pairs of the fields' lines; templates are prompts, and so their own lines to the end."""
    line, *templates = _TEMPLATE.split(text)
    pairs = _pairs(line)
    return pairs + [(name, value.strip()) for name, value in zip(templates[::2], templates[1::2], strict=True)]


def _pairs(line: str) -> list[tuple[str, str]]:
    """The `name: value` pairs of a text, in time linear in its length."""
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
            return str(json.loads(quoted[0], strict=False)), quoted.end() + 1
        except ValueError:
            return quoted[0], quoted.end() + 1
    if line.startswith(("{", "["), start):
        try:
            _, end = json.JSONDecoder().raw_decode(line, start)
        except (ValueError, RecursionError):
            end = len(line) + 1  # no end: not -1, which would be before a comma at the end
        if end == len(line) or line.startswith(",", end):
            return line[start:end], end + 1
    if end_match := _VALUE_END.search(line, start):
        return line[start : end_match.start()], end_match.end()
    return line[start:], len(line)


UNIT = "ControlNet {}"
"""What A1111's ControlNet extension calls its units in the text, counted from 0; IP-Adapters are such."""
IMAGE_MODULE = "ip-adapter-auto"
GUESS = "ControlNet is more important"
"""The extension's control mode of the same meaning as `guess_mode`."""


def write_unit(fields: Mapping[str, object]) -> str:
    """A unit's fields as that extension writes them (internal_controlnet/args.py, serialize): no value has a comma or a
    colon. A field that is None is left out."""
    shown = {name: re.sub(r"[,:]+", "_", str(value)) for name, value in fields.items() if value is not None}
    return ", ".join(f"{name}: {value}" for name, value in shown.items())


def parse_unit(text: str) -> dict[str, str]:
    """The fields of such a text."""
    pairs = (part.partition(":") for part in text.split(","))
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


ONLY_MASKED = "Only masked"
EMPHASIS = {
    "original": "Original", "no norm": "No norm", "ignore": "Ignore", "none": "None", "comfyui": "ComfyUI",
}  # fmt: skip
"""What A1111 calls how prompts weigh their words; the last is none of its own."""
MASKED_CONTENT = {"fill": "fill", "noise": "latent noise", "nothing": "latent nothing"}
"""The option `mask_fill` as A1111 writes it (modules/processing.py)."""
SOFT_INPAINT = "Soft inpainting enabled"
SOFT_INPAINT_FIELDS = {
    "mask_blend_power": "Soft inpainting schedule bias", "mask_blend_scale": "Soft inpainting preservation strength",
    "inpaint_detail_preservation": "Soft inpainting transition contrast boost",
    "composite_mask_influence": "Soft inpainting mask influence",
    "composite_difference_threshold": "Soft inpainting difference threshold",
    "composite_difference_contrast": "Soft inpainting difference contrast",
}  # fmt: skip
"""What A1111's extension calls the fields of a `SoftInpaint`."""
SAMPLING_FIELDS = {
    "churn": "Sigma churn", "churn_min": "Sigma tmin", "churn_max": "Sigma tmax", "noise": "Sigma noise",
    "sigma_min": "Schedule min sigma", "sigma_max": "Schedule max sigma", "rho": "Schedule rho",
}  # fmt: skip
"""What A1111 calls the fields of a `Sampling`."""
_SHOWN_SCHEDULES = {
    "normal": "Uniform", "sgm uniform": "SGM Uniform", "kl optimal": "KL Optimal", "ddim uniform": "DDIM",
}  # fmt: skip
_SCHEDULE_SPELLINGS = {"uniform": "normal", "sgmuniform": "sgm uniform"}


def shown_schedule(schedule: str) -> str:
    """A schedule as A1111 shows it, such as "Karras"; our "normal" is its "Uniform" (modules/sd_schedulers.py)."""
    return _SHOWN_SCHEDULES.get(schedule, schedule.title())


def schedule_named(shown: str) -> str:
    """Our name for a schedule in A1111's or ComfyUI's spelling; an unknown one in lower case."""
    name = re.sub(r"[\s_]+", " ", shown.strip().lower())
    return _SCHEDULE_SPELLINGS.get(name, name)
