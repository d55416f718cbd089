"""Streams without any oracle: a frame through the slots is the frame denoised alone, whatever stands beside it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import nativesd
from nativesd.diffusion.control import ControlModel
from nativesd.errors import NativesdError, UsageError
from nativesd.latents import autoencoder
from nativesd.models.controlnet import ControlNet, ControlNetUnion
from nativesd.models.t2i_adapter import T2IAdapter
from nativesd.pictures.images import to_tensor
from nativesd.sampling.schedule import alphas_cumprod
from oracles import TOLERANCE, difference, randomise, save_union_and_adapter
from pipeline.test_pipeline import save_model
from streaming.clips import clip

PROMPT, NEGATIVE = "a red cat", "a dog, blue"
STEPS = [499, 259, 19]
LCM = "tiny-lcm"
FORMS = {"epsilon": "sd15", "v": "sd21-v", "sample": "sd15", "sdxl": "sdxl"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("streams")
    for form in ("sd15", "sd21-v", "sdxl"):
        save_model(form, root / form)
    for form in ("sd15", "sdxl"):
        unet = diffusers.UNet2DConditionModel.from_pretrained(root / form / "unet")
        control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
        randomise(control, 1)
        control.save_pretrained(root / f"{form}-control")
    save_union_and_adapter(unet, root)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, nativesd.Pipeline]:
    out = {name: nativesd.load(folders[form], device="cpu") for name, form in FORMS.items() if name != "sample"}
    return out | {"sample": nativesd.load(folders["sd15"], device="cpu", prediction="sample")}


def picture(frame: nativesd.Frame | None) -> Tensor:
    assert frame is not None
    assert isinstance(frame.image, Tensor)
    return frame.image


def run(stream: nativesd.Stream, frames: list[Any]) -> list[Tensor]:
    """All pictures of a clip, the last ones flushed out, in order."""
    out = [made for made in map(stream, frames) if made is not None] + stream.flush()
    assert [made.index for made in out] == list(range(len(frames)))
    return [picture(made) for made in out]


Steer = Callable[[Tensor, float, int, Tensor, dict[str, Tensor]], dict[str, Any]]


@torch.inference_mode()
def alone(
    pipe: nativesd.Pipeline,
    frame: Image.Image,
    *,
    guidance_scale: float = 1.0,
    residual: str = "self",
    delta: float = 1.0,
    renoise: bool = True,
    steer: Steer | None = None,
) -> Tensor:
    """One frame through its steps, one after the other and a row at a time, by the equations as they are written."""
    n, config = len(STEPS), pipe.config
    cumulative = alphas_cumprod(config.scheduler)[STEPS]
    a, b = [*cumulative.sqrt().tolist(), 1.0], [*(1 - cumulative).sqrt().tolist(), 1.0]
    contexts, pooled = pipe.encode_prompt([PROMPT, NEGATIVE])
    mean, _ = pipe.encode_tensor(to_tensor([frame]))
    e = torch.randn((n, *mean.shape[1:]), generator=torch.Generator().manual_seed(2))
    ids = None if config.unet.added is None else torch.tensor([[64.0, 64, 0, 0, 64, 64]])

    def noise(x: Tensor, k: int, row: int) -> Tensor:
        told = {} if ids is None else {"pooled": pooled[row : row + 1], "time_ids": ids}
        more = {} if steer is None else steer(x, float(STEPS[k]), k, contexts[row : row + 1], told)
        output = pipe.unet(x, float(STEPS[k]), contexts[row : row + 1], **told, **more)
        match config.prediction:
            case "epsilon":
                return output
            case "v":
                return a[k] * output + b[k] * x
            case _:
                return (x - a[k] * output) / b[k]

    x, carried = a[0] * mean + b[0] * e[:1], e[:1]
    for k in range(n):
        s = 10.0 * STEPS[k]
        skip, out = 0.25 / (s**2 + 0.25), s / math.sqrt(s**2 + 0.25)
        eps = noise(x, k, 0)
        if guidance_scale > 1 and residual != "none":
            if residual == "initialize" and k == 0:
                carried = noise(x, k, 1)
            without = noise(x, k, 1) if residual == "full" else delta * carried
            eps = without + guidance_scale * (eps - without)

        def answer(y: Tensor, k: int, eps: Tensor, out: float, skip: float) -> Tensor:
            return out * (y - b[k] * eps) / a[k] + skip * y

        clean = answer(x, k, eps, out, skip)
        following = e[(k + 1) % n : (k + 1) % n + 1]
        carried = following + a[k + 1] * answer(b[k] * carried, k, eps, out, skip) / b[k + 1]
        x = a[k + 1] * clean + (b[k + 1] * following if renoise else 0)
    return autoencoder.decode(pipe.vae, clean, scaling=config.vae.scaling)[0]


@pytest.mark.parametrize("residual", ["self", "initialize", "full", "none"])
@pytest.mark.parametrize("name", FORMS)
def test_a_frame_is_what_it_is_alone(models: dict[str, nativesd.Pipeline], name: str, residual: str) -> None:
    given: dict[str, Any] = {"guidance_scale": 1.4, "residual": residual, "delta": 0.8}
    stream = models[name].stream(PROMPT, timesteps=STEPS, negative_prompt=NEGATIVE, output="tensor", **given)
    assert stream.rows == {"self": 3, "initialize": 4, "full": 6, "none": 3}[residual]
    frames = clip(5)
    for frame, found in zip(frames, run(stream, frames), strict=True):
        assert difference(found, alone(models[name], frame, **given)) <= TOLERANCE


def test_without_renoise_and_guidance(models: dict[str, nativesd.Pipeline]) -> None:
    stream = models["epsilon"].stream(PROMPT, timesteps=STEPS, renoise=False, output="tensor")
    frames = clip(4)
    for frame, found in zip(frames, run(stream, frames), strict=True):
        assert difference(found, alone(models["epsilon"], frame, renoise=False)) <= TOLERANCE


def hint(frame: Image.Image, channels: int = 3) -> Tensor:
    return (to_tensor([frame]) / 2 + 0.5)[:, :channels]


@pytest.mark.parametrize("residual", ["self", "initialize", "full"])
@pytest.mark.parametrize("kind", ["control", "adapter", "union", "xl control", "both"])
def test_every_slot_has_its_own_control(
    folders: dict[str, Path], models: dict[str, nativesd.Pipeline], kind: str, residual: str
) -> None:
    """Slot k's control is frame i - k's, and acts in the steps between start and end."""
    xl = kind in ("union", "xl control")
    names = {"control": ["sd15-control"], "adapter": ["adapter"], "union": ["union"], "xl control": ["sdxl-control"],
             "both": ["sd15-control", "adapter", "sd15-control"]}[kind]  # fmt: skip
    pipe = models["sdxl" if xl else "epsilon"]
    loaded = [nativesd.load_control(folders[name], device="cpu") for name in names]
    turned = clip(5)[::-1]
    controls = [
        nativesd.Control(model, scale=0.7 + 0.1 * i, end=1.0 if i == 1 else 0.7, kind=1 if kind == "union" else None)
        for i, model in enumerate(loaded)
    ]
    given: dict[str, Any] = {"guidance_scale": 1.4, "residual": residual}
    stream = pipe.stream(PROMPT, timesteps=STEPS, negative_prompt=NEGATIVE, output="tensor", control=controls, **given)
    frames = clip(5)
    made = [stream(frame, control=[turned[i], None, turned[i]][: len(controls)]) for i, frame in enumerate(frames)]
    pictures = [picture(each) for each in [each for each in made if each] + stream.flush()]

    for i, (frame, found) in enumerate(zip(frames, pictures, strict=True)):
        hints = [hint(turned[i]), hint(frame), hint(turned[i])]

        def steer(x: Tensor, time: float, k: int, context: Tensor, told: dict[str, Tensor]) -> dict[str, Any]:
            residuals: list[Tensor] | None = None
            adapter: list[Tensor] = []
            for control, pixels in zip(controls, hints, strict=False):  # noqa: B023  # used at once
                if (k + 1) / 3 > control.end:
                    continue
                assert isinstance(control.model, ControlModel)
                match control.model.module:
                    case T2IAdapter() as module:
                        adapter = [feature * control.scale for feature in module(pixels)]
                    case ControlNetUnion() as module:
                        residuals = module(x, time, context, [pixels], [1], **told, scale=control.scale)
                    case ControlNet() as module:
                        more = module(x, time, context, pixels, **told, scale=control.scale)
                        residuals = more if residuals is None else [p + q for p, q in zip(residuals, more, strict=True)]
            return {"residuals": residuals, "adapter": adapter}

        assert difference(found, alone(pipe, frame, steer=steer, **given)) <= TOLERANCE
    plain = run(pipe.stream(PROMPT, timesteps=STEPS, negative_prompt=NEGATIVE, output="tensor", **given), frames)
    assert difference(pictures[2], plain[2]) > 1e-3


def test_a_union_sees_both_rows_of_a_frame(folders: dict[str, Path], models: dict[str, nativesd.Pipeline]) -> None:
    """It attends across its batch: no frame's picture may depend on the frames beside it."""
    union = nativesd.load_control(folders["union"], device="cpu")
    control = [nativesd.Control(union, kind=1), nativesd.Control(union, kind=2, scale=0.5)]
    given: dict[str, Any] = {"timesteps": STEPS, "guidance_scale": 1.4, "residual": "full", "output": "tensor"}
    frames = clip(4)
    whole = run(models["sdxl"].stream(PROMPT, control=control, **given), frames)
    stream = models["sdxl"].stream(PROMPT, control=control, **given)
    assert stream(frames[2]) is None
    assert difference(picture(stream.flush()[0]), whole[2]) <= TOLERANCE


def test_two_streams_at_once_are_two_streams(models: dict[str, nativesd.Pipeline]) -> None:
    """Over one model, with LoRAs of their own."""
    pipe = nativesd.load("tiny", device="cpu")
    frames = clip(5)
    given: list[dict[str, Any]] = [
        {"prompt": "a fox on a green background", "loras": [LCM], "output": "tensor"},
        {"prompt": "a cactus", "steps": 3, "guidance_scale": 1.5, "residual": "full", "seed": 7, "output": "tensor"},
    ]
    apart = [run(pipe.stream(**each), frames) for each in given]
    streams = [pipe.stream(**each) for each in given]
    made: list[list[Any]] = [[], []]
    for frame in frames:
        for stream, out in zip(streams, made, strict=True):
            out.append(stream(frame))
    for stream, out, expected in zip(streams, made, apart, strict=True):
        pictures = [picture(each) for each in [each for each in out if each] + stream.flush()]
        assert all(map(torch.equal, pictures, expected))


def test_a_call_between_frames_leaves_the_stream_its_loras(models: dict[str, nativesd.Pipeline]) -> None:
    pipe, frames = nativesd.load("tiny", device="cpu"), clip(3)
    stream = pipe.stream("a fox", loras=[LCM], output="tensor")
    expected = run(stream, frames)
    stream.reset()
    for again in (stream.reset, lambda: None):
        pipe("a cactus", steps=1, seed=1)
        assert pipe.uses() == ()
        again()
        assert all(map(torch.equal, expected, run(stream, frames)))
        stream.reset()


UPDATES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a blue tree"},
    "prompts": {"prompts": [("a blue tree", 1), ("a house", 2)], "blend": "slerp"},
    "long": {"prompt": "a tree, " * 40},
    "negative": {"negative_prompt": "a house"},
    "seed": {"seed": 9},
    "seeds": {"seeds": [(9, 1), (3, 1)]},
    "timesteps": {"timesteps": [699, 99]},
    "t_index_list": {"t_index_list": [20, 30]},
    "strength": {"strength": 0.3},
    "more steps": {"steps": 4},
    "fewer steps": {"steps": 1},
    "off": {"guidance_scale": 1.0},
    "on": {"guidance_scale": 2.0},
    "delta": {"delta": 0.5},
    "renoise": {"renoise": False},
    "self": {"residual": "self"},
    "initialize": {"residual": "initialize"},
    "full": {"residual": "full"},
    "none": {"residual": "none"},
    "scales": {"control_scales": [0.2]},
    "filter": {"skip_similar": True},
}


@pytest.mark.parametrize("guidance_scale", [1.0, 1.4], ids=["off", "on"])
@pytest.mark.parametrize("residual", ["self", "initialize", "full", "none"])
def test_every_mode_takes_every_update(
    folders: dict[str, Path], models: dict[str, nativesd.Pipeline], residual: str, guidance_scale: float
) -> None:
    """What comes out afterwards is what a stream makes that was opened so; another number of slots begins anew."""
    pipe, frames = models["epsilon"], clip(9)
    control = nativesd.Control(nativesd.load_control(folders["sd15-control"], device="cpu"))
    begin: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "residual": residual, "guidance_scale": guidance_scale,
        "control": control, "output": "tensor",
    }  # fmt: skip
    for name, changes in UPDATES.items():
        stream = pipe.stream(**begin)
        for frame in frames[:4]:
            before = stream(frame)
        assert before is not None
        slots = stream.slots
        stream.update(**changes)
        found = stream(frames[4])
        assert (found is None) == (stream.slots > 1 and stream.slots != slots), name
        for frame in frames[5:]:
            found = stream(frame)
        opened = pipe.stream(**begin | changes | ({"prompt": None} if "prompts" in changes else {}))
        for frame in frames[4:]:
            expected = opened(frame)
        if name != "filter":
            assert difference(picture(found), picture(expected)) <= TOLERANCE, name


def test_updates_hold_for_the_next_picture(models: dict[str, nativesd.Pipeline]) -> None:
    """In all slots: a prompt, a seed and noise levels alike."""
    changed: list[dict[str, Any]] = [
        {"prompt": "a blue tree"}, {"seed": 5}, {"timesteps": [799, 699, 599]}, {"guidance_scale": 3.0},
    ]  # fmt: skip
    frame = clip(1)[0]
    for changes in changed:
        given: dict[str, Any] = {"timesteps": [899, 799, 699], "guidance_scale": 1.2, "output": "tensor"}
        stream, other = (models["epsilon"].stream(PROMPT, **given) for _ in range(2))
        for each in (stream, other):
            for _ in range(3):
                each(frame)
        stream.update(**changes)
        assert difference(picture(stream(frame)), picture(other(frame))) > 1e-3, changes


def test_an_update_is_whole_or_nothing(models: dict[str, nativesd.Pipeline]) -> None:
    stream, other = (models["epsilon"].stream(PROMPT, output="tensor") for _ in range(2))
    refused: list[dict[str, Any]] = [
        {"prompt": "a tree", "delta": -1},
        {"seed": 3, "timesteps": [10, 20]},
        {"guidance_scale": 2, "control_scales": [1]},
        {"prompt": "a tree AND a house"},
    ]
    for changes in refused:
        with pytest.raises(UsageError):
            stream.update(**changes)
    assert stream.asked == other.asked
    frames = clip(3)
    assert all(map(torch.equal, run(stream, frames), run(other, frames)))


def test_updates_from_another_thread(models: dict[str, nativesd.Pipeline]) -> None:
    """Between two frames: every picture is of one prompt or of the other, never of both."""
    pipe, frame = models["epsilon"], clip(1)[0]
    prompts = ["a red cat", "a blue tree"]
    given: dict[str, Any] = {"steps": 1, "output": "tensor"}
    wanted = [picture(pipe.stream(prompt, **given)(frame)) for prompt in prompts]
    stream, ended = pipe.stream(prompts[0], **given), threading.Event()

    def change() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            stream.update(prompt=prompts[number % 2])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(20):
            found = picture(stream(frame))
            assert any(torch.equal(found, each) for each in wanted)
    finally:
        ended.set()
        thread.join()


def test_constant_frames_give_constant_pictures(models: dict[str, nativesd.Pipeline]) -> None:
    for steps in (1, 3):
        stream = models["epsilon"].stream(PROMPT, steps=steps, guidance_scale=1.4, output="tensor")
        found = [picture(each) for each in [stream(clip(1)[0]) for _ in range(8)] if each is not None]
        assert len(found) == 9 - steps
        assert all(torch.equal(each, found[0]) for each in found)


def test_frames_of_every_form(models: dict[str, nativesd.Pipeline]) -> None:
    frame = clip(1)[0]
    array = np.asarray(frame)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    stream = models["epsilon"].stream(PROMPT, steps=1, output="tensor")
    expected = picture(stream(frame))
    for given in (array, tensor, tensor[None], tensor / 255, (tensor / 255).double()):
        assert difference(picture(stream(given)), expected) <= TOLERANCE
    larger = frame.resize((96, 80))
    assert picture(stream(larger)).shape == (3, 64, 64)
    assert picture(stream(torch.from_numpy(np.asarray(larger).copy()).permute(2, 0, 1))).shape == (3, 64, 64)
    wide = models["epsilon"].stream(PROMPT, steps=1, width=96, height=32)(frame)
    assert wide is not None
    assert isinstance(wide.image, Image.Image)
    assert wide.image.size == (96, 32)
    out = models["epsilon"].stream(PROMPT, steps=1, output="array")(frame)
    assert out is not None
    assert isinstance(out.image, np.ndarray)
    assert (out.image.shape, out.image.dtype) == ((64, 64, 3), np.uint8)
    assert np.abs(out.image - expected.permute(1, 2, 0).numpy() * 255).max() <= 0.51


def test_ages_skips_flush_and_reset(models: dict[str, nativesd.Pipeline]) -> None:
    stream = models["epsilon"].stream(
        PROMPT, steps=3, output="tensor", skip_similar=nativesd.Similar(max_skip=1), guidance_scale=1.2
    )
    frame, other = clip(2)
    found = [stream(frame) for _ in range(3)]  # none is skipped while the slots fill
    assert [each and (each.index, each.age, each.skipped) for each in found] == [None, None, (0, 2, False)]
    again = [stream(frame) for _ in range(3)]
    assert [each and (each.index, each.age, each.skipped) for each in again] == [
        (0, 3, True),
        (0, 4, True),
        (1, 4, False),
    ]
    assert torch.equal(picture(again[0]), picture(found[2]))
    changed = stream(other)
    assert changed is not None
    assert not changed.skipped
    left = stream.flush()
    assert [(each.index, each.age) for each in left] == [(5, 1), (6, 0)]
    assert stream.flush() == []
    assert stream(frame) is None
    stream.reset()
    once_more = [stream(frame) for _ in range(3)]
    assert torch.equal(picture(once_more[2]), picture(found[2]))
    assert once_more[2].index == 0  # type: ignore[union-attr]


def test_noise_begins_again_after_a_reset(models: dict[str, nativesd.Pipeline]) -> None:
    stream = models["epsilon"].stream(PROMPT, steps=2, strength=1.0, output="tensor")
    first = [picture(each) for each in [stream() for _ in range(4)][1:]]
    assert not torch.equal(first[0], first[1])
    stream.reset()
    assert all(map(torch.equal, first, [picture(each) for each in [stream() for _ in range(4)][1:]]))


def test_the_default_filter_sees_brightness() -> None:
    from nativesd.streaming.similar import SimilarFilter

    dark, bright = torch.full((1, 3, 8, 8), -0.9), torch.full((1, 3, 8, 8), -0.1)
    for measure, skips in (("cosine", True), ("difference", False)):
        at_work = SimilarFilter(nativesd.Similar(measure=measure))  # type: ignore[arg-type]
        assert not at_work.skips(dark)
        assert at_work.skips(bright) == skips
        assert at_work.skips(bright)


def test_seeds_are_blended_at_unit_variance(models: dict[str, nativesd.Pipeline]) -> None:
    stream = models["epsilon"].stream(PROMPT, width=256, height=256, seeds=[(1, 1), (2, 3)])
    assert stream._now.plan.noise.std() == pytest.approx(1, abs=0.02)
    one = models["epsilon"].stream(PROMPT, seeds=[(1, 1), (2, 0)])
    assert torch.equal(one._now.plan.noise, models["epsilon"].stream(PROMPT, seed=1)._now.plan.noise)


def test_blends_of_prompts(models: dict[str, nativesd.Pipeline]) -> None:
    """All weight on one is that one, and the same text twice is itself."""
    pipe, frame = models["sdxl"], clip(1)[0]
    expected = picture(pipe.stream("a cat", steps=1, output="tensor")(frame))
    for blend in ("linear", "slerp"):
        for prompts in ([("a cat", 2.0), ("a dog", 0)], [("a cat", 1), ("a cat", 1)]):
            found = picture(pipe.stream(prompts=prompts, blend=blend, steps=1, output="tensor")(frame))  # type: ignore[misc,arg-type]
            assert difference(found, expected) <= TOLERANCE
        half = picture(pipe.stream(prompts=[("a cat", 1), ("a dog", 1)], blend=blend, steps=1, output="tensor")(frame))  # type: ignore[misc,arg-type]
        assert difference(half, expected) > 1e-4


def test_a_failure_empties_the_slots(models: dict[str, nativesd.Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = models["epsilon"].stream(PROMPT, output="tensor")
    frame = clip(1)[0]
    assert stream(frame) is None
    expected = picture(stream(frame))
    with monkeypatch.context() as patch:
        patch.setattr(type(models["epsilon"].unet), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream(frame)
    assert stream(frame) is None
    assert torch.equal(picture(stream(frame)), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timesteps": [100, 200]}, "must fall"),
        ({"timesteps": [100, 100]}, "must fall"),
        ({"timesteps": []}, "1 to 8 timesteps"),
        ({"timesteps": list(range(900, 0, -100))}, "1 to 8 timesteps"),
        ({"timesteps": [1000]}, "between 0 and 999"),
        ({"timesteps": 500}, "one for each slot"),
        ({"t_index_list": [45, 32]}, "must rise"),
        ({"t_index_list": [50]}, "between 0 and 49"),
        ({"timesteps": [5], "steps": 1}, "not timesteps and steps"),
        ({"steps": 9}, "1 to 8"),
        ({"steps": 4, "strength": 0.05}, "at most 2 steps"),
        ({"strength": 0}, "strength must be"),
        ({"width": 65}, "width must be a multiple of 8"),
        ({"height": 8}, "at least 16"),
        ({"residual": "half"}, "residual must be"),
        ({"guidance_scale": "much"}, "guidance_scale must be"),
        ({"delta": math.nan}, "delta must be"),
        ({"seed": -1}, "seed must be"),
        ({"seeds": [1, 2]}, "pairs of a seed and its weight"),
        ({"prompts": [("a", 0)]}, "must not all be 0"),
        ({"prompt": "a", "prompts": [("a", 1)]}, "not both"),
        ({"skip_similar": 0.9}, "nativesd.Similar"),
        ({"skip_similar": nativesd.Similar(threshold=2)}, "threshold"),
        ({"control_scales": [1.0]}, "one number for each control"),
        ({"control": "tiny"}, "nativesd.Control"),
        ({"output": "jpeg"}, "output must be"),
        ({"num_inference_steps": 50}, "here it is steps"),
        ({"cfg_type": "self"}, "here it is residual"),
        ({"guidance": 2}, "here it is guidance_scale"),
        ({"residul": "self"}, "did you mean residual"),
        ({"prompt": "a cat AND a dog"}, "AND is not for streams"),
        ({"prompt": "<lora:none:1> a cat"}, "which is not here"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_frame(
    models: dict[str, nativesd.Pipeline], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        models["epsilon"].stream(**options)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ("frame.png", "not a str"),
        (np.zeros((8, 8), np.uint8), "is \\(H, W, 3\\) of uint8"),
        (np.zeros((8, 8, 3), np.float32), "not float32"),
        (torch.zeros(8, 8, 3), "is \\(3, H, W\\)"),
        (torch.zeros(2, 3, 8, 8), "is \\(3, H, W\\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "not int64"),
        (np.zeros((0, 8, 3), np.uint8), "shape \\(0, 8, 3\\)"),
    ],
)
def test_what_is_no_frame(models: dict[str, nativesd.Pipeline], frame: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        models["epsilon"].stream(PROMPT)(frame)


def test_what_cannot_stream_is_named(
    models: dict[str, nativesd.Pipeline], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = models["epsilon"]
    config = pipe.config
    for changed, words in (
        (replace(config, family="refiner"), "is a refiner"),
        (replace(config, unet=replace(config.unet, in_channels=9)), "9 input channels"),
    ):
        monkeypatch.setattr(pipe, "config", changed)
        with pytest.raises(UsageError, match=words):
            pipe.stream(PROMPT)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="offload"):
        nativesd.load(folders["sd15"], device="cpu", offload=True).stream(PROMPT)
    control = nativesd.load_control(folders["sdxl-control"], device="cpu")
    with pytest.raises(UsageError, match="another family"):
        pipe.stream(PROMPT, control=nativesd.Control(control))
    with pytest.raises(UsageError, match="steered by the frame, and there is none"):
        pipe.stream(PROMPT, control=nativesd.Control(nativesd.load_control(folders["sd15-control"], device="cpu")))()
    fitting = nativesd.load_control(folders["sd15-control"], device="cpu")
    with pytest.raises(UsageError, match="'midas'"):
        pipe.stream(PROMPT, control=nativesd.Control(fitting, preprocess="midas"))
    with pytest.raises(UsageError, match="cannot change: open another"):
        pipe.stream(PROMPT).update(width=128)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="steers by a picture"):
        pipe(PROMPT, control=nativesd.Control("tiny"))


def test_a_stream_that_is_closed(models: dict[str, nativesd.Pipeline]) -> None:
    with models["epsilon"].stream(PROMPT) as stream:
        assert stream(clip(1)[0]) is None
    stream.close()
    for use in (stream, stream.flush, stream.reset, lambda: stream.update(seed=1)):
        with pytest.raises(NativesdError, match="is closed"):
            use()


def test_latency_and_notes(models: dict[str, nativesd.Pipeline]) -> None:
    stream = models["epsilon"].stream(PROMPT, negative_prompt="a dog")
    assert stream.latency.frames == 0
    for frame in clip(5):
        stream(frame)
    latency = stream.latency
    assert latency.frames == 4
    assert set(latency.stages) == {"input", "control", "slots", "unet", "output"}
    assert 0 < sum(latency.stages.values()) <= 1.5 * latency.p95
    assert latency.fps == pytest.approx(1 / latency.median)
    unused, slow = stream.notes
    assert "negative_prompt is not used" in unused
    assert "pass an LCM-LoRA" in slow
    assert "does not know quorn" in nativesd.load("tiny", device="cpu").stream("a quorn", loras=[LCM]).notes[0]
