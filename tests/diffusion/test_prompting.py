"""Prompts that differ in length, change between steps, and are combined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import save_model
from torch import Tensor

import nativesd
from nativesd.diffusion.conditioning import Conditioning, groups
from nativesd.diffusion.guiding.combine import At, Guidance

OPTIONS: dict[str, Any] = {"steps": 20, "seed": 5, "sampler": "Euler", "guidance_scale": 6.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prompting")
    for form in ("sd15", "sdxl"):
        save_model(form, root / form)
    return {path.name: path for path in root.iterdir()}


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def watched(pipe: nativesd.Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of every context that the UNet is asked about."""
    seen: list[tuple[int, int]] = []
    forward = pipe.unet.forward

    def record(latents: Tensor, time: float, context: Any, **options: Any) -> Tensor:
        seen.append(tuple(context.shape[:2]))
        return forward(latents, time, context, **options)

    monkeypatch.setattr(pipe.unet, "forward", record)
    return seen


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_prompts_of_5_7_8_and_9_chunks_cost_what_they_have(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Once 194,040 tokens a row, the least common multiple; now 2,387 for all rows and their negative prompt."""
    pipe = nativesd.load(folders[form], device="cpu")
    prompts = [" BREAK ".join(f"{word} {i}" for i in range(count)) for word, count in
               (("cat", 5), ("dog", 7), ("fox", 8), ("owl", 9))]  # fmt: skip
    options = OPTIONS | {"steps": 2, "negative_prompt": "fog", "width": 32, "height": 32}
    seen = watched(pipe, monkeypatch)
    together = pipe(prompts, **options)
    step = seen[: len(seen) // 2]
    assert max(tokens for _, tokens in step) == 9 * 77
    assert sum(rows * tokens for rows, tokens in step) == (5 + 7 + 8 + 9 + 4 * 9) * 77
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, **(options | {"seed": 5 + i}))
        assert close(together.latents[i : i + 1], alone.latents)
    pipe.sequential = True
    assert close(pipe(prompts, **options).latents, together.latents)


def test_lengths_that_divide_the_longest_go_together() -> None:
    texts = tuple(torch.full((n * 77, 2), float(n)) for n in (1, 6, 3, 4))
    found = groups(Conditioning(texts, torch.ones(4)))
    assert [(None if g.rows is None else g.rows.tolist(), g.side.texts.shape[1]) for g in found] == [
        ([0, 1, 2], 6 * 77),
        ([3], 4 * 77),
    ]
    (one,) = groups(Conditioning(texts, torch.ones(4)), one=True)
    assert one.side.texts.shape == (4, 12 * 77, 2)


def steps_of(pipe: nativesd.Pipeline, prompt: str, **options: Any) -> list[Tensor]:
    """What the model took for the picture at every step."""
    out: list[Tensor] = []
    pipe(prompt, **(OPTIONS | options), on_step=lambda step: out.append(step.denoised))
    return out


def test_a_prompt_that_changes(folders: dict[str, Path]) -> None:
    """Step by step as the first, from the 12th on as something else; beyond the ends as either."""
    pipe = nativesd.load(folders["sd15"], device="cpu")
    first, second, edited = (steps_of(pipe, prompt) for prompt in ("a fox", "a penguin", "a [fox:penguin:0.5]"))
    assert all(close(a, b) for a, b in zip(edited[:11], first[:11], strict=True))
    assert not close(edited[11], first[11])
    assert not close(edited[-1], second[-1])
    for prompt, like in (("a [fox:penguin:20]", first), ("a [fox:penguin:0]", second)):
        assert all(close(a, b) for a, b in zip(steps_of(pipe, prompt), like, strict=True))
    turns = steps_of(pipe, "a [fox|penguin]")
    assert close(turns[1], first[1])
    assert not close(turns[2], first[2])
    assert close(steps_of(pipe, "a [fox|fox]")[-1], first[-1])
    negative = steps_of(pipe, "a fox", negative_prompt="[fog:rain:5]")
    assert close(negative[5], steps_of(pipe, "a fox", negative_prompt="fog")[5])
    assert not close(negative[6], steps_of(pipe, "a fox", negative_prompt="fog")[6])


def test_prompts_that_are_combined(folders: dict[str, Path]) -> None:
    pipe = nativesd.load(folders["sd15"], device="cpu")
    fox, owl = pipe("a fox", **OPTIONS).latents, pipe("an owl", **OPTIONS).latents
    assert close(pipe("a fox :0.25 AND a fox :0.75", **OPTIONS).latents, fox)
    assert close(pipe("a fox AND an owl :0", **OPTIONS).latents, fox)
    both = pipe(["a fox AND an owl", "an owl"], **OPTIONS).latents
    assert not close(both[:1], fox)
    assert close(both[1:], pipe("an owl", **(OPTIONS | {"seed": 6})).latents)
    assert not close(owl, fox)
    literal = pipe("a fox AND an owl", literal=True, **OPTIONS).latents
    assert not close(literal, both[:1])


def test_the_sum_of_prompts_is_a1111s() -> None:
    """As `combine_denoised` of modules/sd_samplers_cfg_denoiser.py."""
    parts = [torch.randn(2, 4, 3, 3) for _ in range(3)]
    shares = [torch.tensor([1.0, 0.5]), torch.tensor([0.7, -1.0])]
    sides = [Conditioning(torch.zeros(2, 77, 8), torch.zeros(2), role="negative"),
             *(Conditioning(torch.zeros(2, 77, 8), torch.ones(2), share=share) for share in shares)]  # fmt: skip
    found = Guidance(7.5).combine(parts, sides, At(torch.zeros(2, 4, 3, 3), 1.0, 1.0, -1.0))
    for row in range(2):
        expected = parts[0][row].clone()
        for part, share in zip(parts[1:], shares, strict=True):
            expected += (part[row] - parts[0][row]) * (float(share[row]) * 7.5)
        assert close(found[row], expected)


def test_a_second_pass_counts_on(folders: dict[str, Path]) -> None:
    """Shares from 1 to 2, and whole numbers beyond the first pass's steps, are of the second pass."""
    pipe = nativesd.load(folders["sd15"], device="cpu")
    hires = nativesd.Hires(1, 0.9, 10)
    plain = steps_of(pipe, "a fox", hires=hires)
    late = steps_of(pipe, "a [fox:owl:25]", hires=hires)
    assert all(close(a, b) for a, b in zip(late[:26], plain[:26], strict=True))
    assert not close(late[26], plain[26])
    early = steps_of(pipe, "a [fox:owl:20]", hires=hires)
    assert close(early[19], plain[19])
    assert not close(early[20], plain[20])


def test_the_embedded_model_knows_the_words_of_every_step() -> None:
    pipe = nativesd.load()
    result = pipe("a [fox:zzyx:0.5] on a [red|blue] background AND a penguin :0.5", steps=2, seed=7)
    (note,) = result.parameters["notes"]
    assert "zzyx" in note
    assert "fox" not in note
