"""PyTorch's modules by CUDA graphs, on a queue that repeats the recorded work on the CPU. No GPU is used here.

The work reads and writes the very tensors of the recording, so a stale one gives a wrong result.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import nativesd
from nativesd.errors import UsageError
from nativesd.export.capture import GRAPHS, CapturedRunner
from nativesd.export.check import difference
from nativesd.export.graphs import graph_of, image_inputs
from nativesd.export.slots import Request
from nativesd.machine import bench
from nativesd.models.controlnet import ControlNet
from nativesd.models.unet import ImageContext, UNet
from nativesd.models.vae import VAE
from nativesd.pipeline import acceleration

PROMPT = "a green square on a white background"


class Recorder:
    """A stream on which work is done at once; `recorded` counts what was captured, `launches` what was repeated."""

    device = torch.device("cpu")
    handle = 0

    def __init__(self, device: torch.device | None = None) -> None:
        self.recorded = self.launches = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        yield

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def launch() -> None:
            self.launches += 1
            work()

        return launch

    def wait(self) -> None:
        pass


@pytest.fixture(scope="module")
def plain() -> nativesd.Pipeline:
    return nativesd.load("tiny", device="cpu", fast=False)


@pytest.fixture
def queue() -> Recorder:
    return Recorder()


@pytest.fixture
def captured(plain: nativesd.Pipeline, queue: Recorder, monkeypatch: pytest.MonkeyPatch) -> nativesd.Pipeline:
    """The pipeline as on a card, but for the card."""
    monkeypatch.setattr(acceleration, "CudaQueue", lambda device: queue)
    out = acceleration.accelerate(replace(plain, device=torch.device("cuda")), "cudagraphs")
    return replace(out, device=torch.device("cpu"))


def unet_inputs(unet: UNet, batch: int, height: int, width: int, tokens: int = 77) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * height + width)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 999,
        "encoder_hidden_states": torch.randn(batch, tokens, unet.config.context, generator=generator),
    }


def direct(unet: UNet, given: dict[str, Tensor]) -> Tensor:
    out: Tensor = unet(given["sample"], given["timestep"], given["encoder_hidden_states"])
    return out


@torch.inference_mode()
def test_every_call_of_a_shape_but_the_first_is_one_launch(plain: nativesd.Pipeline, queue: Recorder) -> None:
    runner = CapturedRunner(graph_of(plain.unet, "unet"), queue)
    results = []
    for seed, launches in ((0, 0), (1, 1), (2, 2)):
        given = unet_inputs(plain.unet, 2, 8, 8) | {"sample": torch.randn(2, 4, 8, 8) + seed}
        results.append((runner.run(given)["out_sample"], direct(plain.unet, given)))
        assert (queue.recorded, queue.launches) == (min(launches, 1), launches)
    for found, expected in results:  # the earlier ones were not overwritten
        assert torch.equal(found, expected)


@torch.inference_mode()
def test_sizes_prompts_and_control_have_graphs_of_their_own(plain: nativesd.Pipeline, queue: Recorder) -> None:
    runner = CapturedRunner(graph_of(plain.unet, "unet"), queue)
    residuals = [torch.randn(shape) for shape in plain.unet.residual_shapes(2, 9, 7)]
    names = [slot.name for slot in runner.schema.control]
    sizes = [(2, 9, 7, 77), (2, 9, 7, 154), (1, 9, 7, 77)]
    for _ in range(3):
        for size in sizes:
            given = unet_inputs(plain.unet, *size)
            assert torch.equal(runner.run(given)["out_sample"], direct(plain.unet, given))
        given = unet_inputs(plain.unet, *sizes[0])
        expected = plain.unet(*given.values(), residuals=residuals)
        found = runner.run(given | dict(zip(names, residuals, strict=True)))["out_sample"]
        assert torch.equal(found, expected)
    assert (queue.recorded, queue.launches) == (4, 8)


@torch.inference_mode()
def test_image_prompts_have_graphs_of_their_own(plain: nativesd.Pipeline, queue: Recorder) -> None:
    """What is not shown is not in the graph."""
    runner = CapturedRunner(graph_of(plain.unet, "unet"), queue)
    given, like = unet_inputs(plain.unet, 2, 9, 7), torch.zeros(2, 4, 9, 7)
    counts = Counter(place.width for place in plain.unet.config.cross_attentions)
    keys = {width: torch.randn(count, 2, 1, 4, width) for width, count in counts.items()}
    images = ImageContext(keys, keys)
    for _ in range(3):
        assert torch.equal(runner.run(given)["out_sample"], direct(plain.unet, given))
        found = runner.run(given | image_inputs(images, like, runner.schema))["out_sample"]
        assert difference(found, plain.unet(*given.values(), images=images)) <= 1e-5
    assert (queue.recorded, queue.launches) == (2, 4)


@torch.inference_mode()
def test_the_graphs_used_last_are_kept(plain: nativesd.Pipeline, queue: Recorder) -> None:
    runner = CapturedRunner(graph_of(plain.unet, "unet"), queue)
    for width in range(8, 8 + GRAPHS + 1):
        for _ in range(2):
            runner.run(unet_inputs(plain.unet, 1, 8, width))
    assert queue.recorded == GRAPHS + 1
    runner.run(unet_inputs(plain.unet, 1, 8, 9))
    assert queue.recorded == GRAPHS + 1
    runner.run(unet_inputs(plain.unet, 1, 8, 8))
    assert queue.recorded == GRAPHS + 2


@torch.inference_mode()
def test_weights_in_other_memory_are_recorded_anew(queue: Recorder) -> None:
    unet = nativesd.load("tiny", device="cpu", fast=False).unet
    runner = CapturedRunner(graph_of(unet, "unet"), queue)
    given = unet_inputs(unet, 1, 8, 8)
    before = [runner.run(given)["out_sample"] for _ in range(2)][1]
    weight = unet.conv_out.weight
    weight.copy_(weight * 2)
    written = runner.run(given)["out_sample"]
    assert queue.recorded == 1
    weight.data = weight * 2
    moved = runner.run(given)["out_sample"]
    assert queue.recorded == 2
    bias = unet.conv_out.bias[:, None, None]  # (C,) -> (C, 1, 1)
    for found, factor in ((written, 2), (moved, 4)):
        assert torch.allclose(found - bias, (before - bias) * factor, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("room", [0, 1, 2])
def test_too_little_memory(plain: nativesd.Pipeline, room: int) -> None:
    """Of `room` graphs: all are given up for one, and one for which there is none is not tried again."""

    class Full(Recorder):
        tries = 0

        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            self.tries += 1
            if sum(launch() is not None for launch in alive) >= room:
                raise torch.OutOfMemoryError
            launch = super().capture(work)
            alive.append(weakref.ref(launch))
            return launch

    alive: list[weakref.ref[Callable[[], None]]] = []
    queue = Full()
    runner = CapturedRunner(graph_of(plain.unet, "unet"), queue)
    for width in (8, 9, 8, 9, 8, 9, 9, 9):
        given = unet_inputs(plain.unet, 1, 8, width)
        assert torch.equal(runner.run(given)["out_sample"], direct(plain.unet, given))
    # widths:       8  9  8  9  8  9  9  9
    expected = {0: (2, 0, 0), 1: (7, 4, 6), 2: (2, 2, 6)}[room]  # tries, recordings, launches
    assert (queue.tries, queue.recorded, queue.launches) == expected


@torch.inference_mode()
def test_a_call_that_needs_the_memory_of_graphs_gets_it(
    plain: nativesd.Pipeline, queue: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CapturedRunner(graph_of(plain.unet, "unet"), queue)
    small, large = (unet_inputs(plain.unet, 1, 8, width) for width in (8, 16))
    for _ in range(2):
        runner.run(small)
    forward, tries = UNet.forward, 0

    def once(*given: Any, **more: Any) -> Tensor:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise torch.OutOfMemoryError
        return forward(*given, **more)

    expected = direct(plain.unet, large)
    monkeypatch.setattr(UNet, "forward", once)
    assert torch.equal(runner.run(large)["out_sample"], expected)
    assert tries == 2
    tries = 0
    with pytest.raises(torch.OutOfMemoryError):  # there is no graph any more
        runner.run(large | {"sample": large["sample"].repeat(1, 1, 2, 2)})


@torch.inference_mode()
def test_results_that_share_memory(queue: Recorder) -> None:
    """As those of ControlNets that were trained on pooled residuals do."""
    control = nativesd.load_control("tiny", device="cpu", fast=False).module
    assert isinstance(control, ControlNet)
    pooled = ControlNet(replace(control.control_config, pooled=True)).eval()
    pooled.load_state_dict(control.state_dict())
    runner = CapturedRunner(graph_of(pooled, "controlnet"), queue)
    graph = graph_of(pooled, "controlnet")
    given = dict(zip((slot.name for slot in graph.schema.inputs), graph.inputs(Request(2, 8, 8)), strict=True))
    expected = graph(*given.values())
    for _ in range(3):
        found = runner.run(given)
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    assert queue.launches == 2


@torch.inference_mode()
def test_closing_says_what_was_held(plain: nativesd.Pipeline, queue: Recorder) -> None:
    runner = CapturedRunner(graph_of(plain.unet, "unet"), queue)
    given = unet_inputs(plain.unet, 1, 8, 8)
    assert CapturedRunner(graph_of(plain.unet, "unet"), queue).close() == 0
    runner.run(given)
    out = runner.run(given)["out_sample"]
    assert runner.close() == sum(tensor.nbytes for tensor in (*given.values(), out))
    for _ in range(3):
        assert torch.equal(runner.run(given)["out_sample"], out)
    assert runner.close() == 0
    assert queue.launches == 1


@pytest.mark.parametrize("controlled", [False, True])
def test_pictures_are_the_same(
    plain: nativesd.Pipeline, captured: nativesd.Pipeline, queue: Recorder, controlled: bool
) -> None:
    control = [nativesd.Control("tiny", Image.linear_gradient("L").resize((64, 64)), end=0.6)] if controlled else []
    pictures = [pipe(PROMPT, seed=1, steps=5, control=control).images[0] for pipe in (plain, captured, captured)]
    # of the ControlNet, the UNet with residuals, and the UNet without, all calls but the first
    assert (queue.recorded, queue.launches) == ((3, 5 + 5 + 3) if controlled else (1, 9))
    first, *others = (picture.tobytes() for picture in pictures)
    assert all(sum(abs(a - b) > 1 for a, b in zip(first, other, strict=True)) == 0 for other in others)


def test_the_rest_is_torchs_own(plain: nativesd.Pipeline, captured: nativesd.Pipeline) -> None:
    assert captured.vae is plain.vae
    assert captured.text_encoders == plain.text_encoders


def test_loras_change_the_pictures(captured: nativesd.Pipeline, queue: Recorder, tmp_path: Path) -> None:
    """They are written to the weights that the graphs read."""
    file, width = tmp_path / "style.safetensors", captured.unet.config.levels[-1].width
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 4 * width, generator=generator), 20 * torch.randn(width, 4, generator=generator)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
    first, changed, again = (captured(PROMPT, seed=1, steps=3, loras=loras).latents for loras in ([], [file], []))
    assert torch.equal(first, again)
    assert (changed - first).abs().max() > 0.1
    assert queue.launches > 0


def test_without_a_gpu(plain: nativesd.Pipeline) -> None:
    with pytest.raises(
        UsageError, match="CUDA graphs run on a GPU, and the model is on cpu: load it with device='cuda'"
    ):
        plain.accelerate("cudagraphs")


@torch.inference_mode()
def test_the_benchmark_runs_them(plain: nativesd.Pipeline, queue: Recorder) -> None:
    assert isinstance(plain.vae, VAE)
    latents = torch.randn(1, 4, 8, 8)
    module = bench.capture_module(plain.vae, queue)
    for _ in range(3):
        assert torch.equal(bench.call(module, bench.Inputs(latents)), plain.vae.decode(latents))
    assert queue.launches == 2
