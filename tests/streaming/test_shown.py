"""Image prompts in a stream: every slot sees them as far as its step says, and they change between frames."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import nativesd
from nativesd import ImageEmbeddings, ImagePrompt
from nativesd.diffusion.images.keys import ImageKeyring
from nativesd.errors import UsageError
from nativesd.export.accelerate import Delegate, accelerate_module
from nativesd.export.kept.store import Store
from nativesd.export.slots import Request, unet_schema
from nativesd.pipeline.acceleration import Acceleration
from nativesd.streaming.rows import require_rows
from oracles import TOLERANCE, adapter_of, difference, drawn_adapter, save_adapter
from pipeline.test_pipeline import save_model
from streaming.clips import clip
from streaming.test_stream import NEGATIVE, PROMPT, STEPS, alone, picture, run


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> nativesd.Pipeline:
    folder = tmp_path_factory.mktemp("shown") / "sd15"
    save_model("sd15", folder)
    return nativesd.load(folder, device="cpu")


@pytest.fixture(scope="module")
def adapters(pipe: nativesd.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, out = tmp_path_factory.mktemp("adapters"), {}
    for number, kind in enumerate(("base", "plus", "faceid")):
        config = adapter_of(pipe.config.unet, kind, lora=2 if kind == "faceid" else None)  # type: ignore[arg-type]
        out[kind] = save_adapter(drawn_adapter(config, number)[1], root / f"{kind}.safetensors")
    return out


def told(seed: int) -> ImageEmbeddings:
    generator = torch.Generator().manual_seed(seed)
    return ImageEmbeddings(*(torch.randn(shape, generator=generator) for shape in ((1, 40), (1, 9, 40), (1, 9, 40))))


@pytest.mark.parametrize("residual", ["self", "initialize", "full"], ids="residual {}".format)
def test_every_slot_sees_what_its_step_says(pipe: nativesd.Pipeline, adapters: dict[str, Path], residual: str) -> None:
    prompts = [ImagePrompt(adapters["base"], told(1), 0.6), ImagePrompt(adapters["plus"], told(2), end=0.7)]
    given: dict[str, Any] = {"guidance_scale": 1.4, "residual": residual}
    options: dict[str, Any] = {"timesteps": STEPS, "negative_prompt": NEGATIVE, "output": "tensor", **given}
    frames = clip(4)
    found = run(pipe.stream(PROMPT, image_prompts=prompts, **options), frames)
    prepared = pipe.prepared(pipe.adapted(prompts), None)
    negative = pipe.encode_prompt([NEGATIVE])[0]

    def steer(x: Tensor, time: float, k: int, context: Tensor, told: dict[str, Tensor]) -> dict[str, Any]:
        keyring = ImageKeyring(prepared, pipe.config.unet, x.shape[2:], device=pipe.device, dtype=pipe.dtype)  # type: ignore[arg-type]
        row = torch.tensor([0.0 if torch.equal(context, negative) else 1.0])
        return {"images": keyring.context(row, [[1.0], [float((k + 1) / 3 <= 0.7)]])}

    for frame, made in zip(frames, found, strict=True):
        assert difference(made, alone(pipe, frame, steer=steer, **given)) <= TOLERANCE
    plain = run(pipe.stream(PROMPT, **options), frames)
    assert difference(found[2], plain[2]) > 1e-3


def test_they_change_between_frames(pipe: nativesd.Pipeline, adapters: dict[str, Path]) -> None:
    """What changes holds for the next picture already; what does not is not made again."""
    options: dict[str, Any] = {"timesteps": [499], "output": "tensor"}
    first, second = (
        ImagePrompt(adapters["base"], told(1)),
        ImagePrompt(adapters["faceid"], identity=torch.ones(12) / 12**0.5),
    )
    frames = clip(3)
    stream = pipe.stream(PROMPT, **options)
    plain = picture(stream(frames[0]))
    stream.update(image_prompts=[first])
    shown = picture(stream(frames[0]))
    images = stream._now.images
    stream.update(guidance_scale=1.0)
    assert stream._now.images is images
    keyring = stream._now.keyring
    stream.update(prompt="another text")
    assert stream._now.keyring is keyring
    changed = picture(pipe.stream("another text", image_prompts=first, **options)(frames[0]))
    assert difference(picture(stream(frames[0])), changed) <= TOLERANCE
    stream.update(prompt=PROMPT)
    with pytest.raises(UsageError, match="or factors by layer such as"):
        stream.update(image_prompts=replace(first, layers=[1, 2]))  # type: ignore[arg-type]
    stream.update(image_prompts=[second])
    face = picture(stream(frames[0]))
    stream.update(image_prompts=[])
    again = picture(stream(frames[0]))
    assert torch.equal(plain, again)
    for prompt, found in ((first, shown), (second, face)):
        expected = picture(pipe.stream(PROMPT, image_prompts=prompt, **options)(frames[0]))
        assert difference(found, expected) <= TOLERANCE
        assert difference(found, plain) > 1e-3
    with pytest.raises(UsageError, match="base needs an image encoder, and none lies beside it"):
        stream.update(image_prompts=replace(first, picture=frames[1]))
    assert torch.equal(picture(stream(frames[0])), plain)


def test_a_graph_without_inputs_for_them_is_refused(pipe: nativesd.Pipeline, tmp_path: Path) -> None:
    graphs = Acceleration("onnx", Store(tmp_path), pipe.device, "sd1")
    request, words = (
        Request(1, 8, 8),
        "exported without inputs for image prompts: leave image_prompts=False out of accelerate",
    )
    for images in (False, True):
        runner = SimpleNamespace(schema=unet_schema(pipe.config.unet, images=images), refusal=lambda request: None)
        unet = accelerate_module(pipe.unet, {"unet": Delegate("unet", runner, lambda: None)})  # type: ignore[arg-type]
        fast = replace(pipe, unet=unet, acceleration=graphs)
        require_rows(fast, [], 1, request, (64, 64))
        with nullcontext() if images else pytest.raises(UsageError, match=words):
            require_rows(fast, [], 1, request, (64, 64), images=True)
