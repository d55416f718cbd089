"""A1111's parameters text: written, parsed, kept in pictures and turned into options.

The chunks have the forms that the named programs write; their contents are made up.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager
from sd_parsers.extractors import _jpeg_usercomment

from clock import seconds_of
from nativesd.errors import SourceError, UsageError
from nativesd.pictures.embedded import read_texts, user_comment_exif
from nativesd.pictures.infotext import (
    Infotext,
    parse_infotext,
    parse_unit,
    schedule_named,
    shown_schedule,
    write_infotext,
    write_unit,
)
from nativesd.pictures.programs.a1111 import generation_options
from nativesd.pictures.programs.find import read_recipe
from nativesd.pictures.programs.parts import unit
from nativesd.pictures.result import Result
from nativesd.version import __version__


def text_of(path: Path) -> str:
    return read_texts(path).parameters


# ---- writing and parsing

# all of Unicode but surrogates, which no file can hold
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text('a1 \n\t:,"\\{}[]', max_size=40)
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9 /-]{0,10}[A-Za-z0-9]", fullmatch=True)


def kept(prompt: str) -> str:
    """What is left of a prompt: its lines without the blanks around them, from the first that has something on it."""
    lines = [line.strip() for line in prompt.split("\n")]
    while lines and not lines[0]:
        lines.pop(0)
    return "\n".join(lines)


@given(TEXTS, TEXTS, st.dictionaries(NAMES, TEXTS, min_size=3, max_size=6))
def test_what_is_written_is_parsed(prompt: str, negative: str, fields: dict[str, str]) -> None:
    lines = [line.strip() for line in f"{prompt}\n{negative}".split("\n")]
    assume(not any(line.startswith(("Negative prompt:", "Steps:")) for line in lines))
    info = parse_infotext(write_infotext(prompt, negative, fields))
    assert info == Infotext(kept(prompt), kept(negative), fields)


@given(st.text(max_size=300))
def test_anything_is_parsed(text: str) -> None:
    info = parse_infotext(text)
    assert len(info.prompt) + len(info.negative_prompt) <= len(text)


@given(st.text(alphabet='aB1 -/,:{}[]"\\\n', max_size=60))
def test_what_is_parsed_is_written(text: str) -> None:
    """Parsing is stable: what it found, written again, is found again."""
    info = parse_infotext(text)
    fields = {**info.fields, "Steps": "1", "Seed": "2", "Size": "8x8"}
    again = parse_infotext(write_infotext(info.prompt, info.negative_prompt, fields))
    assert again == Infotext(kept(info.prompt), kept(info.negative_prompt), fields)


def test_the_text_is_a1111s() -> None:
    fields = {"Steps": 20, "Sampler": "Euler a", "VAE": None, "Lora hashes": "a: 12, b: 34"}
    assert write_infotext("a cat\non a mat", "dog,\nfog", fields) == (
        "a cat\non a mat\n"
        "Negative prompt: dog,\nfog\n"
        'Steps: 20, Sampler: Euler a, Lora hashes: "a: 12, b: 34"'
    )  # fmt: skip
    assert write_infotext("", "", {"Steps": 1}) == "Steps: 1"


def test_a_line_of_fewer_than_three_pairs_without_steps_belongs_to_the_prompts() -> None:
    assert parse_infotext("a cat\nSize: 20x3, Seed: 1") == Infotext("a cat\nSize: 20x3, Seed: 1", "", {})
    negative = parse_infotext("a cat\nNegative prompt: dog\nSize: 20x3, Seed: 1")
    assert negative == Infotext("a cat", "dog\nSize: 20x3, Seed: 1", {})
    assert parse_infotext("a cat\nSteps: 20, Seed: 1") == Infotext("a cat", "", {"Steps": "20", "Seed": "1"})
    assert parse_infotext("a cat\nSteps: up the hill") == Infotext("a cat\nSteps: up the hill", "", {})


def test_the_fields_begin_at_the_last_line_that_starts_with_steps() -> None:
    info = parse_infotext("ten Steps: 5, Seed: 2, Size: 1x1\nSteps: 3\nSteps: 20, Seed: 1, Size: 8x8")
    assert info.prompt == "ten Steps: 5, Seed: 2, Size: 1x1\nSteps: 3"
    assert info.fields == {"Steps": "20", "Seed": "1", "Size": "8x8"}


def test_what_follows_the_fields_belongs_to_them() -> None:
    """sd-dynamic-prompts' templates, quoted values over lines, and fields on a line each."""
    info = parse_infotext(
        "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Seed: 1, Size: 8x8\n"
        "Template: {a|b} cat, style: __s__\nmore of it\nNegative Template: dog, Seed: 7"
    )
    assert (info.prompt, info.negative_prompt) == ("a cat", "dog")
    assert info.fields == {
        "Steps": "20", "Sampler": "Euler a", "Seed": "1", "Size": "8x8",
        "Template": "{a|b} cat, style: __s__\nmore of it", "Negative Template": "dog, Seed: 7",
    }  # fmt: skip
    info = parse_infotext('a cat\nSteps: 20, ADetailer prompt: "a face,\nlit: well", Seed: 1\nSize: 8x8,\nModel: m')
    assert info.prompt == "a cat"
    assert info.fields == {
        "Steps": "20", "ADetailer prompt": "a face,\nlit: well", "Seed": "1", "Size": "8x8", "Model": "m",
    }  # fmt: skip


def test_bare_json_is_one_value() -> None:
    hashes = '{"model": "12ab", "lora:x, y": "34cd"}'
    resources = '[{"type":"checkpoint","air":"urn:air:sd1:checkpoint:civitai:1@2"}]'
    info = parse_infotext(f"a\nSteps: 1, Hashes: {hashes}, Civitai resources: {resources}, Seed: 3")
    assert info.fields == {"Steps": "1", "Hashes": hashes, "Civitai resources": resources, "Seed": "3"}


def test_what_only_looks_like_json_ends_at_the_comma() -> None:
    info = parse_infotext("Steps: 1, Style: [red, Seed: 3, Note: {} x, Size: 8x8")
    assert info.fields == {"Steps": "1", "Style": "[red", "Seed": "3", "Note": "{} x", "Size": "8x8"}


@pytest.mark.parametrize(
    "text", ["a" * 200_000, "ab: " * 50_000, "aa: [" * 40_000, 'aa: "' * 40_000, "aa: " + "[" * 90_000]
)
def test_no_text_takes_long(text: str) -> None:
    assert seconds_of(lambda: parse_infotext(text), 2) < 2


# ---- what programs write

A1111_1_10 = """masterpiece, (a lighthouse:1.2) at dusk, <lora:sea_v2:0.8>
BREAK rocks
Negative prompt: lowres, (worst quality:1.4)
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: vae-ft-mse.safetensors, \
Denoising strength: 0.4, Clip skip: 2, ENSD: 31337, Hires upscale: 1.5, Hires steps: 10, \
Hires upscaler: R-ESRGAN 4x+, Lora hashes: "sea_v2: 0123456789ab", TI hashes: "easy: 98fe", Version: v1.10.1"""

A1111_AUTOMATIC = """a cat
Steps: 20, Sampler: {sampler}, Schedule type: Automatic, CFG scale: 7, Seed: 1, Size: 512x512, \
Model hash: 12ab, Model: x, Version: v1.9.4"""

A1111_OLD = """a cat
Negative prompt: dog
Steps: 28, Sampler: DPM++ SDE Karras, CFG scale: 7.5, Seed: 42, Face restoration: CodeFormer, Size: 640x512, \
Model hash: 7460a6fa, Denoising strength: 0.7, First pass size: 0x0"""

FORGE = """a cat
Negative prompt: dog
Steps: 25, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 9, Size: 832x1216, Model hash: 1ad6, \
Model: illust, Denoising strength: 0.3, Clip skip: 2, RNG: CPU, Hashes: {"model": "1ad6"}, \
Hires Module 1: Use same choices, Hires CFG Scale: 7, Hires upscale: 2, Hires steps: 15, Hires upscaler: Latent, \
ADetailer model: face_yolov8n.pt, Version: f2.0.1v1.10.1-previous-659-gc055f2d4, Module 1: sdxl_vae"""

CIVITAI = """a cat
Negative prompt: dog
Steps: 30, Sampler: DPM++ 2M Karras, CFG scale: 5, Seed: 639466906728691, Size: 832x1216, Clip skip: 2, \
Created Date: 2025-01-02T03:04:05.6789012Z, \
Civitai resources: [{"type":"checkpoint","modelVersionId":128713,"modelName":"DreamShaper, XL"}], \
Civitai metadata: {"remixOfId":5}"""

COMFYUI_FUSED = """a cat
Negative prompt: dog
Steps: 20, Sampler: dpmpp_2m_karras, CFG Scale: 8.0, Seed: 1099633777240739, Size: 512x768, Model hash: 12ab34cd56, \
Model: dreamshaper_8, Version: ComfyUI"""

COMFYUI_SPLIT = """a cat
Negative prompt: dog
Steps: 20, Sampler: euler_ancestral, Scheduler: karras, CFG scale: 8, Seed: 5, Size: 512x512, \
Denoising strength: 1.0, Model hash: 12ab, Model: x, Hashes: {"model": "12ab", "lora:y": "34"}"""

SD_NEXT = """a cat
Steps: 20, Size: 512x512, Sampler: DPM++ 2M, Seed: 1, CFG scale: 6, App: SD.Next, Version: 8ea22ef, Model: x"""

OURS = """a cat
Steps: 20, Sampler: Euler, Schedule type: Automatic, CFG scale: 7, Seed: 1, Size: 512x512, Model: tiny, \
Version: nativesd 0.1"""

PROGRAMS: dict[str, tuple[str, dict[str, object], list[str]]] = {
    "A1111 1.10": (
        A1111_1_10,
        {
            "steps": 25, "sampler": "DPM++ 2M", "schedule": "karras", "guidance_scale": 6.5, "seed": 1234567890,
            "width": 512, "height": 768, "clip_skip": 2, "noise": "cuda", "model": "v1-5-pruned-emaonly",
            "hires": {"upscale": 1.5, "steps": 10, "upscaler": "R-ESRGAN 4x+", "strength": 0.4},
            "variation": {"ensd": 31337},
        },
        ["VAE"],
    ),
    "A1111 2022": (
        A1111_OLD,
        {
            "steps": 28, "sampler": "DPM++ SDE Karras", "guidance_scale": 7.5, "seed": 42, "width": 640, "height": 512,
            "noise": "cuda", "model": "of hash 7460a6fa",
        },
        ["Face restoration", "First pass size", "Denoising strength"],
    ),
    "Forge": (
        FORGE,
        {
            "steps": 25, "sampler": "Euler a", "schedule": "normal", "guidance_scale": 7.0, "seed": 9, "width": 832,
            "height": 1216, "clip_skip": 2, "noise": "cpu", "model": "illust",
            "hires": {
                "upscale": 2.0, "steps": 15, "upscaler": "Latent", "guidance_scale": 7.0, "strength": 0.3,
            },
        },
        ["ADetailer model", "Module 1"],
    ),
    "Civitai's generator": (
        CIVITAI,
        {
            "steps": 30, "sampler": "DPM++ 2M Karras", "guidance_scale": 5.0, "seed": 639466906728691, "width": 832,
            "height": 1216, "clip_skip": 2, "noise": "comfyui", "emphasis": "comfyui",
            "model": "DreamShaper, XL",
        },
        [],
    ),
    "ComfyUI, fused": (
        COMFYUI_FUSED,
        {
            "steps": 20, "sampler": "dpmpp_2m_karras", "guidance_scale": 8.0, "seed": 1099633777240739, "width": 512,
            "height": 768, "noise": "comfyui", "emphasis": "comfyui", "model": "dreamshaper_8",
        },
        [],
    ),
    "ComfyUI, split": (
        COMFYUI_SPLIT,
        {
            "steps": 20, "sampler": "euler_ancestral", "schedule": "karras", "guidance_scale": 8.0, "seed": 5,
            "width": 512, "height": 512, "noise": "comfyui", "emphasis": "comfyui", "model": "x",
        },
        [],
    ),
    "SD.Next": (
        SD_NEXT,
        {
            "steps": 20, "sampler": "DPM++ 2M", "guidance_scale": 6.0, "seed": 1, "width": 512, "height": 512,
            "model": "x",
        },
        [],
    ),
    "ours": (
        OURS,
        {
            "steps": 20, "sampler": "Euler", "schedule": "automatic", "guidance_scale": 7.0, "seed": 1, "width": 512,
            "height": 512, "noise": "cpu", "model": "tiny",
        },
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_options_of_what_programs_write(program: str) -> None:
    text, options, unheeded = PROGRAMS[program]
    info = parse_infotext(text)
    assert info.prompt == text.partition("\nNegative prompt:")[0].partition("\nSteps:")[0]
    found, left = generation_options(info)
    assert found == options
    assert left == unheeded
    types = {name: type(value) for name, value in found.items()}
    assert types == {name: type(value) for name, value in options.items()}


# modules/sd_samplers_kdiffusion.py, sd_samplers_timesteps.py and sd_samplers_lcm.py of A1111 1.10
@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("DPM++ 2M", "karras"),
        ("DPM++ SDE", "karras"),
        ("DPM++ 2S a", "karras"),
        ("DPM2", "karras"),
        ("DPM2 a", "karras"),
        ("Restart", "karras"),
        ("DPM++ 2M SDE", "exponential"),
        ("DPM++ 2M SDE Heun", "exponential"),
        ("DPM++ 3M SDE", "exponential"),
        ("Euler a", "normal"),
        ("Euler", "normal"),
        ("LMS", "normal"),
        ("Heun", "normal"),
        ("DPM fast", "normal"),
        ("DPM adaptive", "normal"),
        ("DDIM", "automatic"),
        ("PLMS", "automatic"),
        ("UniPC", "automatic"),
        ("LCM", "automatic"),
        ("DPM++ 2M Karras", None),
    ],
)
def test_automatic_is_what_a1111_means_by_it(sampler: str, schedule: str | None) -> None:
    options, _ = generation_options(parse_infotext(A1111_AUTOMATIC.format(sampler=sampler)))
    assert options.get("schedule") == schedule
    assert options["sampler"] == sampler


@pytest.mark.parametrize(
    ("sampler", "version", "schedule"),
    [
        ("DPM++ 2M", "v1.6.0", "normal"),  # the Karras one was a sampler of its own
        ("DDIM", "v1.6.0", "automatic"),
        ("LMS Karras", "v1.6.0", None),
        ("DPM++ 2M SDE Exponential", "v1.6.0", None),
        ("dpmpp_2m", "ComfyUI", "normal"),  # which nodes leave out
        ("ddim", "ComfyUI", "normal"),
        ("uni_pc_sgm_uniform", "ComfyUI", None),
        ("euler_ddim_uniform", "ComfyUI", None),
        ("Euler a", "ComfyUI", "normal"),
        ("Euler", "nativesd 0.1", None),
        ("Euler", "Fooocus v2.5.0", None),
    ],
)
def test_a_schedule_that_is_not_named(sampler: str, version: str, schedule: str | None) -> None:
    fields = {"Steps": "20", "Sampler": sampler, "Seed": "1", "Version": version}
    options, _ = generation_options(Infotext("", "", fields))
    assert options.get("schedule") == schedule


@pytest.mark.parametrize(
    ("fields", "noise"),
    [
        ({"Version": "v1.10.1"}, "cuda"),
        ({"Version": "v1.10.1", "RNG": "CPU"}, "cpu"),
        ({"Version": "v1.10.1", "RNG": "NV"}, "cuda"),
        ({"Version": "v1.10.1", "RNG": "cuda"}, "cuda"),
        ({"Version": "1.6.0", "Civitai resources": "[]"}, "cuda"),
        ({"Version": "f2.0.1v1.10.1-previous-659-gc055f2d4"}, "cuda"),
        ({"Version": "c5934fb6e3"}, "cuda"),
        ({"Version": "ComfyUI"}, "comfyui"),
        ({"Version": "Fooocus v2.5.0"}, None),
        ({"Version": "8ea22ef", "App": "SD.Next", "RNG": "CPU"}, "cpu"),
        ({"Version": "nativesd 0.1"}, "cpu"),
        ({"Version": "nativesd 0.1", "RNG": "NV"}, "cuda"),
        ({}, "cuda"),
    ],
)
def test_whose_noise(fields: dict[str, str], noise: str | None) -> None:
    options, unheeded = generation_options(Infotext("", "", {"Sampler": "Euler a", "Model": "m", **fields}))
    assert options.get("noise") == noise
    assert unheeded == []


def test_options_of_the_rarer_fields() -> None:
    fields = {
        "eta": "0.5", "CFG Rescale φ": "0.7", "Hires resize": "0x1024", "Denoising strength": "0.25",
        "Variation seed": "7", "Variation seed strength": "0.1", "Tiling": "True", "NGMS": "2.5", "ENSD": "0",
        "ControlNet 0": "Module: canny, Model: c", "Refiner": "sdxl_refiner", "Refiner switch at": "0.8",
        "Sigma churn": "3", "User": "me", "Model hash": "12", "Token merging ratio": "0", "Hires sampler": "Heun",
    }  # fmt: skip
    options, unheeded = generation_options(Infotext("", "", fields))
    assert options == {
        "eta": 0.5,
        "guidance_rescale": 0.7,
        "hires": {"width": 0, "height": 1024, "sampler": "Heun", "strength": 0.25},
        "noise": "cuda",
        "refiner_at": 0.8,
        "variation": {"seed": 7, "strength": 0.1},
        "sampling": {"churn": 3.0},
        "tiling": "xy",
        "model": "of hash 12",
    }
    assert unheeded == [
        "NGMS", "ControlNet 0: pass it again: --control c PICTURE --control-preprocess canny",
        "Refiner sdxl_refiner: pass it with --refiner",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Module: ip-adapter_clip_sd15, Model: ip-adapter_sd15 [6a3f6166], Weight: 1, Resize Mode: Crop and Resize, "
         "Low Vram: False, Processor Res: 512, Guidance Start: 0, Guidance End: 1, Pixel Perfect: False, Control Mode: "
         "Balanced", "pass it again: --image-prompt ip-adapter_sd15 PICTURE"),
        ("Module: none, Model: tile [a371b31b], Weight: 0.5, Guidance Start: 0.23, Guidance End: 0.5, Control Mode: "
         "ControlNet is more important", "pass it again: --control tile PICTURE --control-scale 0.5 --control-start "
         "0.23 --control-end 0.5 --guess-mode"),
        ("Module: ip-adapter-auto, Model: faceid, Weight: 1, Layers: style and layout, Lora Scale: 0.5, Identity: "
         "True, Pictures: 2, Masks: 2", "pass it again: --image-prompt faceid PICTURE --image-prompt-layers "
         '"style and layout" --image-prompt-mask MASK (and in Python 2 pictures, 2 masks, lora_scale=0.5, the '
         "identity)"),
        ("Module: none, Model: None, Weight: 1", ""),
        ("nothing", ""),
    ],
)  # fmt: skip
def test_units_of_controlnet_are_told_as_options(text: str, words: str) -> None:
    assert unit(text) == words
    assert parse_unit(write_unit(parse_unit(text))) == parse_unit(text)


@pytest.mark.parametrize(
    ("fields", "guidance", "unread"),
    [
        ({"Skip Early CFG": "0.1"}, "interval:start=0.15", []),
        ({"Skip Early CFG": "0"}, None, []),
        ({"Guidance": "pag:scale=2.0 tcfg"}, "pag:scale=2.0 tcfg", []),
        ({"pag_enabled": "True", "pag_scale": "3", "pag_attenuation": "0.0", "pag_start": "0.0", "pag_end": "0.5"},
         "pag:scale=3,start=0.0,end=0.5", []),
        ({"pag_enabled": "True", "pag_scale": "3", "pag_attenuation": "0.5"}, "pag:scale=3", ["pag_attenuation"]),
        ({"freeu_enabled": "True", "freeu_b1": "1.1", "freeu_b2": "1.2", "freeu_s1": "0.9", "freeu_s2": "0.2",
          "freeu_start": "0.0", "freeu_end": "1.0"}, "freeu:b1=1.1,b2=1.2,s1=0.9,s2=0.2", []),
        ({"freeu_enabled": "False", "freeu_b1": "1.1"}, None, []),
        ({"dynthres_enabled": "True", "dynthres_mimic_scale": "7.0", "dynthres_threshold_percentile": "0.98",
          "dynthres_mimic_mode": "Half Cosine Up", "dynthres_cfg_mode": "Constant"},
         "threshold:mimic=7.0,percentile=0.98", ["dynthres_mimic_mode"]),
        ({"Dynamic thresholding enabled": "True", "Mimic scale": "6", "Threshold percentile": "99.5"},
         "threshold:mimic=6,percentile=0.995", []),
    ],
)  # fmt: skip
def test_guidance_of_other_programs(fields: dict[str, str], guidance: str | None, unread: list[str]) -> None:
    options, unheeded = generation_options(Infotext("", "", {"Steps": "20", "Model": "m", **fields}))
    assert options.get("guidance") == guidance
    assert unheeded == unread


def test_strength_without_hires_is_an_option() -> None:
    options, _ = generation_options(Infotext("", "", {"Denoising strength": "0.25", "Mask blur": "4"}))
    assert (options["strength"], options["steps_as"]) == (0.25, "a1111")
    assert "hires" not in options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Steps", "abc"),
        ("Steps", "20.5"),
        ("STEPS", "٣"),
        ("Seed", "1e3"),
        ("CFG scale", "seven"),
        ("CFG Scale", "nan"),
        ("Size", "512"),
        ("Size", "512x768x3"),
    ],
)
def test_what_no_picture_is_without_must_be_whole(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: {value!r} "):
        generation_options(Infotext("", "", {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Clip skip", "two"),
        ("Denoising strength", "inf"),
        ("Eta", "inf"),
        ("Hires steps", "many"),
        ("Hires resize", "big"),
        ("RNG", "dice"),
    ],
)
def test_another_broken_value_is_named_with_what_is_taken(name: str, value: str) -> None:
    options, unheeded = generation_options(Infotext("", "", {"Model": "m", name: value}))
    (line,) = unheeded
    assert line.startswith(f"{name}: {value!r} is not ")
    assert line.endswith("(taken: the default)")
    assert options.keys() <= {"model", "noise"}


def test_values_in_other_spellings() -> None:
    fields = {"Model": "m", "Clip skip": "2.0", "Size": "512 x 768", "Hires upscale": "4x-UltraSharp"}
    options, unheeded = generation_options(Infotext("", "", fields))
    assert (options["clip_skip"], options["width"], options["height"]) == (2, 512, 768)
    assert options["hires"] == {"upscaler": "4x-UltraSharp"}
    assert unheeded == []


def test_a_model_that_is_not_named_is_said() -> None:
    assert generation_options(Infotext("", "", {"Model hash": "12ab"}))[0]["model"] == "of hash 12ab"
    options, unheeded = generation_options(Infotext("", "", {"Seed": "1"}))
    assert "model" not in options
    assert unheeded == ["the model, which is not named (taken: the one that is asked for)"]


def test_an_empty_value_says_nothing() -> None:
    assert generation_options(Infotext("", "", {"Seed": "", "Model": "m", "Tiling": ""})) == (
        {"noise": "cuda", "model": "m"},
        [],
    )


@pytest.mark.parametrize(
    ("ours", "shown"),
    [
        ("automatic", "Automatic"),
        ("normal", "Uniform"),
        ("karras", "Karras"),
        ("exponential", "Exponential"),
        ("sgm uniform", "SGM Uniform"),
        ("simple", "Simple"),
        ("beta", "Beta"),
        ("align your steps", "Align Your Steps"),
        ("trailing", "Trailing"),
        ("leading", "Leading"),
        ("linspace", "Linspace"),
    ],
)
def test_schedules_are_shown_as_a1111_does(ours: str, shown: str) -> None:
    assert shown_schedule(ours) == shown
    assert schedule_named(shown) == ours


@pytest.mark.parametrize(
    ("spelling", "ours"),
    [("sgm_uniform", "sgm uniform"), ("SGMUniform", "sgm uniform"), ("normal", "normal"), ("Normal", "normal"),
     ("align_your_steps", "align your steps"), ("KL Optimal", "kl optimal")],
)  # fmt: skip
def test_schedules_in_other_spellings(spelling: str, ours: str) -> None:
    assert schedule_named(spelling) == ours


# ---- pictures

BASE: dict[str, Any] = {
    "prompt": "ein Bär, 熊 🐻",
    "negative_prompt": "fog,\nrain",
    "steps": 4,
    "sampler": "Euler a",
    "schedule": "sgm uniform",
    "guidance_scale": 7.5,
    "seed": 3,
    "width": 64,
    "height": 48,
    "model": "org/name",
}


def result(count: int = 1, **parameters: object) -> Result:
    images = [Image.new("RGB", (64, 48), (200, 30, 90)) for _ in range(count)]
    return Result(images, [3 + i for i in range(count)], {**BASE, **parameters}, torch.zeros(count, 4, 6, 8))


def fields_of(result: Result) -> Mapping[str, str]:
    return parse_infotext(result.infotext()).fields


def test_result_writes_a_field_for_each_parameter() -> None:
    assert fields_of(result()) == {
        "Steps": "4", "Sampler": "Euler a", "Schedule type": "SGM Uniform", "CFG scale": "7.5", "Seed": "3",
        "Size": "64x48", "Model": "org/name", "Version": f"nativesd {__version__}",
    }  # fmt: skip
    rich = result(
        strength=0.6, clip_skip=2, guidance_rescale=0.7, noise="cuda", eta=0.25, vae="mse, fine", schedule="normal",
        loras={"sea": (0.8, 0.8), "sky": (0.5, 0.25)}, guidance_scale=7.123456789, hires=None,
    )  # fmt: skip
    assert {name: value for name, value in fields_of(rich).items() if fields_of(result()).get(name) != value} == {
        "Schedule type": "Uniform", "CFG scale": "7.123456789", "VAE": "mse, fine", "Denoising strength": "0.6",
        "Clip skip": "2", "RNG": "NV", "Eta": "0.25", "CFG Rescale": "0.7",
        "LoRAs": "<lora:sea:0.8> <lora:sky:0.25:0.5>",
    }  # fmt: skip


def test_hires_has_the_strength() -> None:
    fields = fields_of(result(hires={"upscale": 2.0, "steps": 3, "upscaler": "Latent", "strength": 0.5}, strength=None))
    assert {name: fields[name] for name in fields if name.startswith(("Hires", "Denoising"))} == {
        "Denoising strength": "0.5", "Hires upscale": "2", "Hires steps": "3", "Hires upscaler": "Latent",
    }  # fmt: skip
    assert fields_of(result(hires={"width": 128, "height": 0}))["Hires resize"] == "128x0"


@pytest.mark.parametrize("sampler", ["DDIM", "Euler a"])
def test_our_pictures_give_their_own_options(sampler: str) -> None:
    parameters: dict[str, Any] = {
        "sampler": sampler, "strength": None, "clip_skip": 2, "guidance_rescale": 0.7, "noise": "cpu", "eta": 0.1,
        "schedule": "automatic", "guidance_scale": 0.1 + 0.2,
        "hires": {"upscale": 1.5, "steps": 3, "upscaler": "Latent", "strength": 1 / 3},
    }  # fmt: skip
    options, unheeded = generation_options(parse_infotext(result(**parameters).infotext()))
    same = ("steps", "sampler", "schedule", "guidance_scale", "seed", "width", "height", "clip_skip",
            "guidance_rescale", "noise", "eta", "hires", "model")  # fmt: skip
    assert ("Eta DDIM" if sampler == "DDIM" else "Eta") in fields_of(result(**parameters))
    assert options == {name: {**BASE, **parameters}[name] for name in same}
    assert unheeded == []


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_saved_pictures_are_read_by_us_and_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    made = result(2)
    paths = made.save(tmp_path / f"bear{suffix}")
    assert [path.name for path in paths] == [f"bear-0{suffix}", f"bear-1{suffix}"]
    for index, path in enumerate(paths):
        assert text_of(path) == made.infotext(index)
        monkeypatch.setattr(
            _jpeg_usercomment, "_image_id", None
        )  # it takes a new picture at an old address for the old
        parsed = ParserManager().parse(path)
        assert parsed is not None
        assert [prompt.value for prompt in parsed.prompts] == [BASE["prompt"]]
        assert [prompt.value for prompt in parsed.negative_prompts] == [BASE["negative_prompt"]]
        (sampler,) = parsed.samplers
        assert sampler.name == "Euler a"
        assert sampler.parameters["seed"] == str(3 + index)
        assert sampler.parameters["scheduler"] == "SGM Uniform"
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_pictures_are_close(tmp_path: Path, suffix: str) -> None:
    made = result()
    (path,) = made.save(tmp_path / f"plain{suffix}")
    with Image.open(path) as image:
        color = image.convert("RGB").getpixel((20, 20))
    assert isinstance(color, tuple)
    assert all(abs(a - b) <= 3 for a, b in zip(color, (200, 30, 90), strict=True))


def test_user_comment_has_its_type_in_exif() -> None:
    """EXIF wants type 7, undefined; Pillow would write bytes, and strict readers would complain."""
    exif = user_comment_exif("hé")
    assert exif[:6] == b"Exif\0\0"
    tiff = exif[6:]
    assert tiff[:8] == b"MM\0*\0\0\0\x08"
    entries, tag, kind, count, offset, following = struct.unpack(">HHHIII", tiff[26:44])
    assert (entries, tag, kind, following) == (1, 0x9286, 7, 0)
    assert tiff[offset : offset + count] == b"UNICODE\0\0h\0\xe9"
    assert len(tiff) == offset + count


def test_other_formats_carry_no_parameters(tmp_path: Path) -> None:
    (path,) = result().save(tmp_path / "plain.bmp")
    with pytest.raises(SourceError, match="holds no generation parameters"):
        read_recipe(path)


def test_a_format_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for name in ("picture.psd", "picture.txt", "picture"):
        with pytest.raises(UsageError, match="is not a picture format"):
            result().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_parameters_too_long_for_jpeg_are_refused(tmp_path: Path) -> None:
    long = result(prompt="word " * 8000)
    with pytest.raises(UsageError, match=r"save as \.png"):
        long.save(tmp_path / "long.jpg")
    assert list(tmp_path.iterdir()) == []
    fits = result(prompt="w" * 32_000)
    for path in (*long.save(tmp_path / "long.webp"), *long.save(tmp_path / "long.png")):
        assert parse_infotext(text_of(path)).prompt == ("word " * 8000).strip()
    assert len(text_of(fits.save(tmp_path / "fits.jpg")[0])) > 32_000


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    large = Result([Image.new("RGB", (17_000, 1))], [0], BASE, torch.zeros(1))
    with pytest.raises(SourceError, match=r"large\.webp cannot be written"):
        large.save(tmp_path / "large.webp")
    assert list(tmp_path.iterdir()) == []


TEXT = "a bear, 熊\nNegative prompt: fog\nSteps: 1, Sampler: Euler, Seed: 3, Size: 8x8"


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"),
        b"UNICODE\0" + TEXT.encode(),
        b"UNICODE\0" + TEXT.encode("utf-16-be") + b"\0\0",
        b"ASCII\0\0\0" + TEXT.encode(),
        bytes(8) + TEXT.encode(),
        TEXT.encode(),
        TEXT.encode("utf-16"),
    ],
    ids=["big", "little", "with order mark", "utf-8", "terminated", "ascii", "unknown", "bare", "bare utf-16"],
)
@pytest.mark.parametrize("picture_format", ["JPEG", "WEBP", "PNG"])
def test_user_comments_of_other_writers(tmp_path: Path, comment: bytes, picture_format: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    path = tmp_path / "picture"
    Image.new("RGB", (8, 8)).save(path, picture_format, exif=exif.tobytes())
    assert text_of(path) == TEXT


def png(path: Path, texts: dict[str, str]) -> Path:
    chunk = PngInfo()
    for name, text in texts.items():
        chunk.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunk)
    return path


@pytest.mark.parametrize("text", ["café, 1 ÷ 2", "熊 🐻"])
def test_png_texts_in_both_encodings(tmp_path: Path, text: str) -> None:
    assert text_of(png(tmp_path / "a.png", {"parameters": text})) == text


def test_png_texts_after_the_pixels(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", {"parameters": "a cat"})
    data = path.read_bytes()
    text_at, pixels_at, end_at = (data.index(name) - 4 for name in (b"tEXt", b"IDAT", b"IEND"))
    assert text_at < pixels_at
    path.write_bytes(data[:text_at] + data[pixels_at:end_at] + data[text_at:pixels_at] + data[end_at:])
    assert text_of(path) == "a cat"


def test_what_is_no_picture_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.png does not exist"):
        text_of(tmp_path / "gone.png")
    with pytest.raises(SourceError, match="is a folder, not a picture"):
        text_of(tmp_path)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(SourceError, match="is not a picture that can be read"):
        text_of(tmp_path / "a.png")


def test_a_text_of_50_megabytes_is_refused(tmp_path: Path) -> None:
    """Which Pillow would read, and which killed the tokenizer."""
    info = PngInfo()
    info.add_text("parameters", "a, " * 17_000_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(SourceError, match=r"a\.png carries texts of 51000000 characters, over the 16777216"):
        text_of(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"a" * 17_000_000)
    with pytest.raises(SourceError, match=r"a\.txt has 17000000 bytes, more than"):
        text_of(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@given(data=st.data())
def test_broken_pictures_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = folder / f"whole{suffix}"
    if not whole.exists():
        result().save(whole)
    broken = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = folder / f"broken{suffix}"
    path.write_bytes(broken[: data.draw(st.integers(0, len(broken)))])
    with contextlib.suppress(SourceError):  # and no other error
        parse_infotext(text_of(path))


def test_brackets_that_are_no_json_before_a_comma_at_the_end() -> None:
    """Which were looked for from the end, and then read again from the beginning, without an end."""
    assert parse_infotext("Steps: 1, ab: {x, cd: [y,").fields == {"Steps": "1", "ab": "{x", "cd": "[y"}
