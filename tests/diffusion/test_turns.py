"""Threads that share a model, calls that are ended, and what is printed of all that they hand out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import nativesd
from nativesd.errors import UsageError
from nativesd.shipped import TINY

THREADS, ROUNDS = 4, 3


@pytest.fixture
def pipe() -> nativesd.Pipeline:
    return nativesd.load("tiny", device="cpu")


PARTS = {"attn1_to_v": "attn1.to_v", "attn2_to_v": "attn2.to_v", "ff_net_2": "ff.out"}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Strong ones, each of another part of the UNet."""
    unet, folder = nativesd.load("tiny", device="cpu").unet, tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(0)
    for theirs, ours in PARTS.items():
        module = f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_{theirs}"
        out, into = unet.get_parameter(f"down.1.attentions.0.blocks.0.{ours}.weight").shape
        down, up = (2 * torch.randn(*shape, generator=generator) for shape in ((4, into), (out, 4)))
        save_file(
            {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}, folder / f"{theirs}.safetensors"
        )
    return sorted(folder.iterdir())


def hint() -> Image.Image:
    picture = Image.new("RGB", (64, 64))
    ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), outline="white")
    return picture


def same(first: nativesd.Result, second: nativesd.Result) -> bool:
    return torch.equal(first.latents, second.latents)


def test_threads_paint_what_they_paint_in_turn(pipe: nativesd.Pipeline, loras: list[Path]) -> None:
    """Four threads with other LoRAs, controls and offsets, over pipelines that share the weights, bit for bit."""
    control = nativesd.Control(nativesd.load_control("tiny", device="cpu"), hint())
    others: list[dict[str, Any]] = [
        {"loras": loras[0]}, {"loras": [(loras[1], 0.5), loras[2]]}, {"control": control}, {}, {"loras": loras[2]},
        {"control": nativesd.Control("tiny", hint(), scale=0.5), "loras": [(loras[0], -1)]},
    ]  # fmt: skip
    shared = [pipe, replace(pipe, slicing=True), pipe, replace(pipe, sequential=True)]
    calls = [
        (shared[thread], others[(thread + i) % len(others)] | {"seed": 10 * thread + i})
        for thread in range(THREADS)
        for i in range(ROUNDS)
    ]

    def run(call: tuple[nativesd.Pipeline, dict[str, Any]]) -> nativesd.Result:
        return call[0]("a fox on a blue background", steps=2, **call[1])

    in_turn = [run(call) for call in calls]
    assert not same(in_turn[0], run((pipe, {"seed": 0}))), "a LoRA that changes nothing would prove nothing"
    with ThreadPoolExecutor(THREADS) as pool:
        at_once = list(pool.map(run, calls))
    assert [same(*pair) for pair in zip(in_turn, at_once, strict=True)] == [True] * len(calls)


def test_a_copy_that_shares_the_weights_takes_turns_with_them(pipe: nativesd.Pipeline) -> None:
    assert replace(pipe, tile=None).turns is pipe.turns
    assert copy.copy(pipe).turns is pipe.turns
    apart = copy.deepcopy(pipe)
    assert apart.turns is not pipe.turns
    assert apart.unet.state_dict()["conv_in.weight"].data_ptr() != pipe.unet.state_dict()["conv_in.weight"].data_ptr()


def interrupt_at(pipe: nativesd.Pipeline, index: int) -> Callable[[nativesd.Step], None]:
    def on_step(step: nativesd.Step) -> None:
        if step.index == index:
            assert pipe.interrupt()

    return on_step


def fail_at(pipe: nativesd.Pipeline, index: int) -> Callable[[nativesd.Step], None]:
    def on_step(step: nativesd.Step) -> None:
        if step.index == index:
            raise ZeroDivisionError

    return on_step


@pytest.mark.parametrize(("end", "error"), [(interrupt_at, nativesd.Interrupted), (fail_at, ZeroDivisionError)])
@pytest.mark.parametrize("options", [{}, {"offload": True}, {"fast": False}], ids=str)
def test_a_call_that_is_ended_leaves_the_model_as_it_was(
    options: dict[str, Any], end: Any, error: type[Exception], loras: list[Path]
) -> None:
    """Weights, classes of the layers and devices; and the next call paints what it painted before."""
    pipe = nativesd.load("tiny", device="cpu", **options)

    def state() -> list[Any]:
        modules = [pipe.unet, pipe.vae, *pipe.text_encoders]
        kinds = [type(part) for module in modules for part in module.modules()]
        tensors = [
            (name, t.device, t.dtype, t.clone()) for module in modules for name, t in module.state_dict().items()
        ]
        return [kinds, tensors]

    plain = pipe("a fox", steps=3, seed=1)
    kinds, tensors = state()
    with pytest.raises(error):
        pipe("a fox", steps=3, seed=1, loras=loras[0], on_step=end(pipe, 1))
    assert not pipe.interrupt()
    assert same(pipe("a fox", steps=3, seed=1), plain)
    after = state()
    assert after[0] == kinds
    assert all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(tensors, after[1], strict=True))


def test_interrupting_from_another_thread(pipe: nativesd.Pipeline) -> None:
    """The call ends after its step with the latents so far; one that waits for its turn goes on to its end."""
    assert not pipe.interrupt()
    began, go_on = threading.Event(), threading.Event()
    clean: list[torch.Tensor] = []

    def on_step(step: nativesd.Step) -> None:
        clean.append(step.denoised)
        began.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pipe, "a fox", steps=5, seed=1, on_step=on_step)
        assert began.wait(60)
        second = pool.submit(pipe, "a fox", steps=2, seed=1)
        assert pipe.interrupt()
        go_on.set()
        with pytest.raises(nativesd.Interrupted, match="interrupted after step 1 of 5") as error:
            first.result(60)
        assert second.result(60).images
    assert len(clean) == 1
    assert torch.equal(error.value.latents, clean[0])
    assert pipe.decode(error.value.latents)[0].size == (pipe.config.size, pipe.config.size)


def test_a_call_inside_a_call_is_refused(pipe: nativesd.Pipeline, loras: list[Path]) -> None:
    for inner in (lambda step: pipe("a cat", steps=1), lambda step: pipe.set_loras(loras[0])):
        with pytest.raises(UsageError, match="while it makes pictures"):
            pipe("a fox", steps=2, on_step=inner)
    previews: list[Image.Image] = []
    pipe("a fox", steps=2, on_step=lambda step: previews.append(step.preview()))
    assert len(previews) == 2


def test_what_is_printed_is_one_short_line(
    pipe: nativesd.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny-model").symlink_to(TINY)
    monkeypatch.chdir(tmp_path)
    steps: list[nativesd.Step] = []
    result = pipe(["a fox", 'a <b> & "c"'], steps=1, seed=3, on_step=steps.append)
    control = nativesd.load_control("tiny", device="cpu")
    size = pipe.config.size
    for thing, words in (
        (pipe, "<Pipeline tiny (sd2) on cpu in float32>"),
        (control, "<ControlNet tiny>"),
        (result, f"<Result: 2 pictures of {size}x{size}, seeds 3, ...>"),
        (steps[0], "<Step 1 of 1, sigma "),
        (nativesd.audit("tiny-model"), "<AuditReport tiny-model: unet, vae, text_encoder; ok>"),
        (nativesd.diff("tiny-model", "tiny-model"), "<DiffReport tiny-model, tiny-model: "),
        (nativesd.Control(control, "x.png"), "Control(model=<ControlNet tiny>, image='x.png', scale=1.0"),
    ):
        assert repr(thing).startswith(words)
        assert len(repr(thing)) < 150
    html = result._repr_html_()
    assert html.count("<img ") == 2
    assert "a &lt;b&gt; &amp; &quot;c&quot;" in html
