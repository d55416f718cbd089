"""What a call takes, and what it says of what it cannot take: one sentence that names the argument."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nativesd
from nativesd.errors import UsageError
from nativesd.loading.load import load
from nativesd.pipeline.asked import arguments
from nativesd.pipeline.asked.arguments import CallOptions, Checked, GenerateOptions, LoadOptions, check
from nativesd.pipeline.asked.hires import Hires

CONTROL = nativesd.Control("tiny", Image.new("RGB", (64, 64)))
STYLE = ("x.safetensors", 1.0, 1.0)


def read(prompt: Any = "a fox", **options: Any) -> Checked:
    return check(prompt, options)  # type: ignore[arg-type]


def named(value: object) -> str:
    """A case's name, the same in every process: without the places of objects in memory."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ({"prompt": None}, "prompts", [""]),
        ({"prompt": ["a", None]}, "prompts", ["a", ""]),
        ({"prompt": ("a", "b")}, "prompts", ["a", "b"]),
        ({"negative_prompt": None}, "negative_prompt", ("",)),
        ({"prompt": ["a", "b"], "negative_prompt": ["c", "d"]}, "negative_prompt", ["c", "d"]),
        ({"seed": np.int64(5)}, "seeds", [5]),
        ({"seed": torch.tensor(5), "num_images": 2}, "seeds", [5, 6]),
        ({"seed": [1, 2]}, "seeds", [1, 2]),
        ({"seed": np.array([3, 1]), "num_images": 2}, "seeds", [3, 1]),
        ({"prompt": ["a", "b"], "seed": [7, 8, 9, 4]}, "seeds", [7, 8, 9, 4]),
        ({"seed": "5"}, "seeds", [5]),
        ({"seed": str(2**64 - 1)}, "seeds", [2**64 - 1]),
        ({"steps": 2.0}, "steps", 2),
        ({"steps": np.float32(3)}, "steps", 3),
        ({"steps": None}, "steps", None),
        ({"width": np.int32(64)}, "width", 64),
        ({"guidance_scale": "7"}, "guidance_scale", 7.0),
        ({"guidance_scale": np.float32(0.5)}, "guidance_scale", 0.5),
        ({"refiner_at": None}, "refiner_at", 0.8),
        ({"control": CONTROL}, "control", [CONTROL]),
        ({"loras": "x.safetensors"}, "loras", [STYLE]),
        ({"loras": Path("x.safetensors")}, "loras", [STYLE]),
        ({"loras": ("x.safetensors", 0.5)}, "loras", [("x.safetensors", 0.5, 0.5)]),
        ({"loras": ("x.safetensors", "y.safetensors")}, "loras", [STYLE, ("y.safetensors", 1.0, 1.0)]),
        ({"loras": [["x.safetensors", "0.5", 1]]}, "loras", [("x.safetensors", 0.5, 1.0)]),
        ({"hires": 2}, "hires", nativesd.Hires(2.0)),
        ({"hires": nativesd.Hires("2", steps=3.0)}, "hires", nativesd.Hires(2.0, steps=3)),  # type: ignore[arg-type]
        ({"outpaint": [0, 1.0, np.int64(2), 3]}, "outpaint", (0, 1, 2, 3)),
        ({"literal": np.True_}, "literal", True),
        ({"guess_mode": 0}, "guess_mode", False),
    ],
    ids=named,
)
def test_what_plainly_means_something_is_taken(options: dict[str, Any], name: str, expected: object) -> None:
    assert getattr(read(**options), name) == expected
    assert type(getattr(read(**options), name)) is type(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": 5}, "prompt must be a text, or a list of texts, not 5"),
        ({"prompt": {"a": 1}}, "prompt must be a text"),
        ({"prompt": b"a"}, "prompt must be a text"),
        ({"prompt": ["a", 3]}, "prompt must be a text, or a list of texts, not 3"),
        ({"negative_prompt": 1}, "negative_prompt must be a text"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text"),
        ({"seed": "x"}, "seed must be a whole number, not 'x'"),
        ({"seed": -2}, "seeds must be between 0 and 2^64 - 1, or -1 for a random one, not -2"),
        ({"seed": 2**64}, "seeds must be between"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seeds must be between"),
        ({"seed": [1, 2], "num_images": 3}, "seed must be one number, or one for each of 3 pictures, not 2"),
        ({"seed": []}, "seed must be one number"),
        ({"seed": torch.Generator()}, "pass the one that the generator was seeded with"),
        ({"num_images": 0}, "num_images must be between 1 and 1000, not 0"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"steps": math.inf}, "steps must be a whole number, not inf"),
        ({"steps": 1000}, "steps must be between 1 and 999, not 1000"),
        ({"width": 0}, "width must be between 1 and 16384, not 0"),
        ({"height": [64]}, "height must be a whole number, not [64]"),
        ({"guidance_scale": "seven"}, "guidance_scale must be a number, not 'seven'"),
        ({"guidance_scale": -1}, "guidance_scale must be between 0 and 1000, not -1"),
        ({"guidance_scale": np.ones(2)}, "guidance_scale must be a number, not a ndarray"),
        ({"image_guidance_scale": math.inf}, "image_guidance_scale must be between 0 and 1000"),
        ({"strength": 1.5}, "strength must be between 0 and 1, not 1.5"),
        ({"eta": math.nan}, "eta must be between 0 and 1, not nan"),
        ({"sampler": torch.nn.Linear}, "sampler must be a name, not a type"),
        ({"noise": "gpu"}, "noise must be cpu or cuda or comfyui, not 'gpu'"),
        ({"resize": "stretch"}, "resize must be resize or crop or fill, not 'stretch'"),
        ({"image": 5}, "image must be a picture"),
        ({"mask_blur": -1}, "mask_blur must be between 0 and 1000, not -1"),
        ({"outpaint": (1, 2)}, "outpaint must be four numbers"),
        ({"outpaint": (1, 2, 3, -4)}, "outpaint must be between 0 and 16384, not -4"),
        ({"clip_skip": 0}, "clip_skip must be between 1 and 100, not 0"),
        ({"num_images": 10**6}, "num_images must be between 1 and 1000, not 1000000"),
        ({"seed": list(range(1001))}, "num_images must be between 1 and 1000, not 1001"),
        ({"width": 10**30}, "width must be between 1 and 16384"),
        ({"guidance_scale": 1e308}, "guidance_scale must be between 0 and 1000, not 1e+308"),
        ({"mask_blur": 10**22}, "mask_blur must be between 0 and 1000"),
        ({"hires": 10**6}, "hires must be above 0 and at most 16, not 1000000"),
        ({"hires": math.inf}, "hires must be above 0 and at most 16, not inf"),
        ({"hires": Hires(2, width=10**9)}, "hires.width must be between 1 and 16384"),
        ({"loras": [()]}, "loras must be files"),
        ({"loras": [("x", 1e38)]}, "a scale of loras must be between -1000 and 1000"),
        ({"hires": 0}, "hires must be above 0 and at most 16, not 0"),
        ({"hires": -2}, "hires must be above 0"),
        ({"hires": math.nan}, "hires must be above 0"),
        ({"hires": 1e9}, "hires must be above 0"),
        ({"hires": True}, "hires must be a number, not True"),
        ({"hires": nativesd.Hires(2, strength=3)}, "hires.strength must be above 0 and at most 1, not 3"),
        ({"hires": nativesd.Hires(2, steps=0)}, "hires.steps must be between 1 and 999, not 0"),
        ({"hires": nativesd.Hires(2, upscaler="best")}, "hires.upscaler must be latent, "),  # type: ignore[arg-type]
        ({"loras": 5}, "loras must be files"),
        ({"loras": [("x", 1, 2, 3)]}, "loras must be files"),
        ({"loras": {"x": 1}}, "loras must be files"),
        ({"loras": [("x", math.nan)]}, "a scale of loras must be between -1000 and 1000"),
        ({"control": "tiny"}, "control must be nativesd.Control(model, image)"),
        ({"control": nativesd.Control("tiny", "x.png", scale=math.inf)}, "the scale of a control must be"),
        ({"control": nativesd.Control("tiny", "x.png", end=2)}, "the end of a control must be between 0 and 1"),
        ({"refiner": "org/name"}, "pass refiner=nativesd.load(...)"),
        ({"on_step": 3}, "on_step must be a function"),
        ({"literal": "false"}, "literal must be True or False, not 'false'"),
        ({"guess_mode": None, "literal": []}, "literal must be True or False"),
        ({"num_inference_steps": 3}, "there is no option 'num_inference_steps': here it is steps"),
        ({"generator": 1}, "here it is seed"),
        ({"cfg_scale": 1}, "here it is guidance_scale"),
        ({"mask_image": 1}, "here it is mask"),
        ({"controlnet_conditioning_scale": 1}, "here it is the scale of a nativesd.Control"),
        ({"stepz": 1}, "did you mean steps?"),
        ({"device": "cpu"}, "device is an option of nativesd.load()"),
    ],
    ids=named,
)
def test_what_cannot_be_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        read(**options)
    assert words in str(error.value)
    assert len(str(error.value)) < 250


def test_a_seed_of_none_or_minus_one_is_random() -> None:
    seeds = {read(seed=seed).seeds[0] for seed in (None, -1, "-1", -1.0)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_every_name_has_its_type_its_reader_and_its_word_elsewhere() -> None:
    """The types that callers see, the table, and `load` know the same names; no other tool's word is one of ours."""
    options = CallOptions.__annotations__.keys()
    table = {row.name for row in fields(Checked)} - {"prompts", "one_prompt", "one_negative", "seeds"}
    assert table | {"seed", "num_images"} == set(options)
    assert set(inspect.signature(load).parameters) - {"source"} == LoadOptions.__annotations__.keys()
    assert GenerateOptions.__annotations__.keys() == {*options, *LoadOptions.__annotations__}
    assert not arguments.ELSEWHERE.keys() & GenerateOptions.__annotations__.keys()
    assert list(inspect.signature(nativesd.Pipeline.__call__).parameters)[2:] == list(options)
    doc = nativesd.Pipeline.__call__.__doc__ or ""
    explained = re.findall(r"^        ([a-z_]+(?:, [a-z_]+)*) +", doc, re.MULTILINE)
    assert set(options) <= set(", ".join(explained).split(", "))


def test_generate_checks_before_it_loads() -> None:
    with pytest.raises(UsageError, match="steps must be between"):
        nativesd.generate("a fox", model="/no/such/model", steps=0)
    with pytest.raises(UsageError, match="here it is steps"):
        nativesd.generate("a fox", model="/no/such/model", num_inference_steps=1)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def pipe() -> nativesd.Pipeline:
    return nativesd.load("tiny", device="cpu")


def test_a_negative_prompt_for_each_prompt(pipe: nativesd.Pipeline) -> None:
    """A batch paints what every pair paints alone, and each picture carries its own."""
    pairs = [("a fox", "red"), ("a cat", "a fox on grass")]
    result = pipe([a for a, _ in pairs], negative_prompt=[b for _, b in pairs], steps=2, seed=[5, 9])
    for index, ((prompt, negative), seed) in enumerate(zip(pairs, (5, 9), strict=True)):
        alone = pipe(prompt, negative_prompt=negative, steps=2, seed=seed)
        torch.testing.assert_close(result.latents[index : index + 1], alone.latents)
        assert result.infotext(index) == alone.infotext()
    swapped = pipe([a for a, _ in pairs], negative_prompt=[b for _, b in reversed(pairs)], steps=2, seed=[5, 9])
    assert not torch.allclose(result.latents, swapped.latents, atol=1e-2)


def test_pictures_that_are_too_small_for_the_model(pipe: nativesd.Pipeline) -> None:
    """A side of which nothing is left in the UNet's middle."""
    assert pipe.config.smallest == 4 * pipe.config.vae.factor
    for options in ({"width": 8, "height": 8}, {"width": 8}, {"image": Image.new("RGB", (64, 9))}, {"hires": 0.1}):
        with pytest.raises(UsageError, match=f"tiny makes pictures of {pipe.config.smallest} pixels a side and more"):
            pipe("a fox", steps=1, **options)  # type: ignore[arg-type]
