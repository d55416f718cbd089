"""Variations of pictures: asked for, made, written into files, and made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nativesd
from conftest import Run
from nativesd import Pipeline, Variation

PROMPT = "a fox on a green background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return nativesd.load("tiny", device="cpu")


def apart(one: Image.Image, two: Image.Image) -> int:
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(two, np.int16)).max())


def test_pictures_of_a_variation_share_their_seed(pipe: Pipeline) -> None:
    result = pipe(PROMPT, seed=5, num_images=2, steps=2, variation=Variation(9, 0.4))
    assert result.seeds == [5, 5]
    for index, seed in enumerate((9, 10)):
        alone = pipe(PROMPT, seed=5, steps=2, variation=Variation(seed, 0.4))
        assert apart(result.images[index], alone.images[0]) <= 1
    listed = pipe(PROMPT, seed=[5, 6], steps=2, variation=Variation(9, 0.4))
    assert listed.seeds == [5, 6]
    assert apart(listed.images[0], result.images[0]) <= 1 < apart(listed.images[1], result.images[1])


@pytest.mark.parametrize(
    "variation",
    [Variation(9, 0.4), Variation(strength=0.2), Variation(resize_from=(48, 96)), Variation(9, 0.3, (96, 96), 31337)],
)
def test_a_variation_is_made_again_from_its_picture(pipe: Pipeline, variation: Variation, tmp_path: Path) -> None:
    result = pipe(PROMPT, seed=5, num_images=2, steps=3, sampler="Euler a", variation=variation)
    for index, path in enumerate(result.save(tmp_path / "x.png")):
        options, unheeded = nativesd.options_from(path)
        assert not unheeded
        del options["model"]
        assert apart(pipe(**options).images[0], result.images[index]) <= 1
    assert apart(pipe(PROMPT, seed=5, steps=3, sampler="Euler a").images[0], result.images[0]) > 9


def test_a1111s_fields(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe(PROMPT, seed=5, num_images=2, steps=1, variation=Variation(9, 0.4, (48, 96), 31337))
    assert "Variation seed: 10, Variation seed strength: 0.4, Seed resize from: 48x96, ENSD: 31337" in result.infotext(
        1
    )
    text = tmp_path / "x.txt"
    for said, expected in {
        "ENSD: 31337": Variation(ensd=31337),
        "Variation seed: 3, Variation seed strength: 0.5": Variation(3, 0.5),
        "Variation seed: 3, Variation seed strength: 0, Seed resize from: 0x0, ENSD: 0": None,
    }.items():
        text.write_text(f"x\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64, Model: tiny, {said}")
        options, unheeded = nativesd.options_from(text)
        assert (options.get("variation"), unheeded) == (expected, [])


def test_variations_from_the_command_line(run: Run, pipe: Pipeline, tmp_path: Path) -> None:
    done = run(
        "generate", PROMPT, "--seed", "5", "--steps", "2", "--variation-seed", "9", "--variation-strength", "0.4",
        "--seed-resize", "48x96", "--ensd", "3", "-o", "x.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = pipe(PROMPT, seed=5, steps=2, variation=Variation(9, 0.4, (48, 96), 3)).images[0]
    assert apart(Image.open(tmp_path / "x.png"), expected) <= 1
    done = run("generate", PROMPT, "--variation-seed", "9")
    assert (done.returncode, "--variation-seed does nothing without --variation-strength" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("variation", "message"),
    [
        (0.5, "variation must be a Variation, not 0.5"),
        (Variation(strength=2), "variation.strength must be between 0 and 1, not 2"),
        (Variation(-2, 0.5), "seeds must be between 0 and 2^64 - 1, or -1 for a random one, not -2"),
        (Variation(resize_from=(48,)), "variation.resize_from must be a width and a height in pixels"),  # type: ignore[arg-type]
        (Variation(resize_from=(48, 0)), "variation.resize_from must be"),
        (Variation(ensd=0.5), "variation.ensd must be a whole number"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused(pipe: Pipeline, variation: Variation, message: str) -> None:
    with pytest.raises(nativesd.NativesdError) as error:
        pipe(PROMPT, variation=variation)
    assert message in str(error.value)
