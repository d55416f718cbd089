"""Times on this machine: one UNet step or one decode at published sizes, with random weights, several ways in turns.

Ways to run a case take turns in one process, so that whatever else the machine does falls on all of them alike, and
their ratios hold where seconds do not.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nativesd.config import UNETS, VAES, UNetConfig, VAEConfig
from nativesd.errors import UsageError
from nativesd.export.accelerate import Delegate, accelerate_module
from nativesd.export.capture import CapturedRunner, CudaQueue, Queue
from nativesd.export.graphs import graph_of
from nativesd.export.slots import Component
from nativesd.loading.placement import find_device
from nativesd.machine.timing import CLOCKS, Clock, Report, Timing, Way, ceiling, peak_memory, timed
from nativesd.models.layers import CachedContext, Context
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.tuning.fp8 import use_fp8, why_not_fp8
from nativesd.tuning.int8 import use_int8
from nativesd.tuning.tune import EVERYTHING, compile_blocks, processor, products_of_8_bits, tune, untune

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One step of a UNet for prompt and negative prompt, or the decode of one picture; `side` of the latents."""

    part: Literal["unet", "vae"]
    family: str
    side: int
    precision: str
    batch: int

    @property
    def name(self) -> str:
        """Such as "unet sd21 64x64 bf16"."""
        return f"{self.part} {self.family} {self.side}x{self.side} {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs."""
        return DTYPES[self.precision]

    @property
    def config(self) -> UNetConfig | VAEConfig:
        """Of the module at its published size."""
        return UNETS[self.family] if self.part == "unet" else VAES[self.family]


CASES = {
    case.name: case
    for case in (
        Case("unet", "sd21", 64, "bf16", 2), Case("unet", "sd21", 64, "fp32", 2),
        Case("unet", "sd15", 64, "bf16", 2), Case("unet", "sd15", 64, "fp32", 2),
        Case("unet", "sdxl", 64, "bf16", 2), Case("unet", "sdxl", 128, "bf16", 2),
        Case("vae", "sd", 64, "bf16", 1), Case("vae", "sd", 64, "fp32", 1),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What a UNet takes, or for a VAE the latents alone."""

    latents: Tensor
    context: Context | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    timestep: float = 500.0


def machine(device: torch.device, clock: Clock) -> dict[str, Any]:
    """What the times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "clock": clock,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def empty_module(case: Case) -> UNet | VAE:
    """Our module of a case, on meta, in its dtype."""
    config = case.config
    with torch.device("meta"):
        module = UNet(config) if isinstance(config, UNetConfig) else VAE(config)
    return module.to(case.dtype).eval()


@torch.no_grad()
def draw(module: nn.Module, device: torch.device, seed: int = 0) -> None:
    """Fill a module with random weights that keep activations of order one: normal, of variance 1 / fan-in."""
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(0.0, 0.1, generator=generator)
    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.weight.add_(1.0)


def twin(module: UNet | VAE, case: Case) -> UNet | VAE:
    """A second module with the very same tensors."""
    other = empty_module(case)
    other.load_state_dict(module.state_dict(), assign=True)
    return other


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Normal values for one case, the same at every call; a UNet's latents are the same for both prompts."""
    generator = torch.Generator(device).manual_seed(1) if device.type != "meta" else None

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(case.dtype)

    config = case.config
    if isinstance(config, VAEConfig):
        return Inputs(normal(case.batch, config.latent_channels, case.side, case.side))
    added = config.added
    return Inputs(
        latents=normal(1, config.in_channels, case.side, case.side).repeat(case.batch, 1, 1, 1),
        context=normal(case.batch, 77, config.context),
        pooled=None if added is None else normal(case.batch, added.pooled),
        time_ids=None if added is None else torch.full((case.batch, added.ids), 8.0 * case.side, device=device),
    )


def call(module: UNet | VAE, inputs: Inputs) -> Tensor:
    """One step, or one decode."""
    if isinstance(module, VAE):
        return module.decode(inputs.latents)
    assert inputs.context is not None
    out: Tensor = module(
        inputs.latents, inputs.timestep, inputs.context, pooled=inputs.pooled, time_ids=inputs.time_ids
    )
    return out


def run_bench(
    names: Sequence[str] = (),
    device: str | None = None,
    *,
    threads: int | None = None,
    rounds: int = 3,
    progress: Callable[[str], object] = lambda line: None,
) -> Report:
    """Time our own ways to run the named cases, SD2.1's UNet where none is named.

    `progress` is told what every case will take, and then every call.

    Raises UsageError for a case that is not in `CASES`, a device that is not here, and more threads than cores.
    """
    cases = [_case(name) for name in names or ["unet sd21 64x64 bf16"]]
    place = find_device(device)
    if threads is not None:
        if not 1 <= threads <= (cores := os.cpu_count() or 1):
            raise UsageError(f"threads must be between 1 and {cores}, the cores that are here, not {threads}")
        torch.set_num_threads(threads)
    report = Report(machine(place, "wall"))
    for case in cases:
        plain = empty_module(case)
        draw(plain, place)
        ways = native_ways(plain, case, make_inputs(case, place))
        weights = sum(parameter.nbytes for parameter in plain.parameters())
        calls = 2 + 2 * rounds  # of every way: the first, one for the memory, and two in every round
        total, flops = calls * len(ways), count_flops(case)
        progress(
            f"{case.name}: {weights / 1e9:.1f} GB of weights, {total} calls of {flops / 1e12:.1f} TFLOP: "
            f"{total * flops / ceiling(case.dtype, place, 'wall'):.0f} s at the rate of a large matrix product here, "
            "and in practice more"
        )
        watched = {name: _watched(name, way, calls, progress) for name, way in ways.items()}
        report.timings += measure(case, watched, place, rounds=rounds, repeat=2, clock="wall")
        del plain, ways
        gc.collect()
    return report


def _watched(name: str, way: Way, calls: int, progress: Callable[[str], object]) -> Way:
    """A way that says before each of its calls which it is."""
    numbers = count(1)

    def call() -> object:
        progress(f"{name}: call {next(numbers)} of {calls}")
        return way()

    return call


def _case(name: str) -> Case:
    if name not in CASES:
        raise UsageError(f"{name!r} is not a case: they are {', '.join(CASES)}")
    return CASES[name]


def native_ways(plain: UNet | VAE, case: Case, inputs: Inputs, *, compiled: bool = False) -> dict[str, Way]:
    """Our plain module, its fast twin, a `compiled` one where it is asked for, one in 8 bits (on CUDA in float8), and
    on CUDA a graph.

    They share their tensors, but those that are packed, in another layout or in 8 bits.
    """
    ways: dict[str, Way] = {"nativesd plain": lambda: call(plain, inputs)}
    device = inputs.latents.device

    def add(name: str, change: Callable[[UNet | VAE], object]) -> None:
        other, guided = twin(plain, case), as_guided(inputs)
        tune(other)
        change(other)
        ways[name] = lambda: call(other, guided)

    add("nativesd", lambda module: None)
    if device.type == "cuda":
        captured = capture_module(plain, CudaQueue(device))
        ways["nativesd cudagraphs"] = lambda: call(captured, inputs)
        if case.part == "unet" and case.dtype != torch.float32 and not why_not_fp8(device):
            add("nativesd fp8", use_fp8)
    elif case.part == "unet" and products_of_8_bits(case.dtype):
        add("nativesd int8", _in_8_bits)
    if compiled:
        add("nativesd compile", compile_blocks)
    return ways


def _in_8_bits(module: nn.Module) -> None:
    untune(module)
    use_int8(module)
    tune(module, EVERYTHING)


def capture_module(module: UNet | VAE, queue: Queue) -> UNet | VAE:
    """The module, run by CUDA graphs; it shares its tensors."""
    component: Component = "unet" if isinstance(module, UNet) else "vae_decoder"
    runner = CapturedRunner(graph_of(module, component), queue)
    return accelerate_module(module, {component: Delegate(component, runner, lambda: None)})


def as_guided(inputs: Inputs) -> Inputs:
    """The same inputs as `denoiser.Guided` gives them: latents once where prompts share them, and a cache."""
    if not isinstance(inputs.context, Tensor):
        return inputs
    latents = inputs.latents if inputs.pooled is not None else inputs.latents[:1]
    return replace(inputs, latents=latents, context=CachedContext(inputs.context))


@cache
def count_flops(case: Case) -> float:
    """Multiplications and additions of one call, those of the attention included; nothing is computed."""
    meta = torch.device("meta")
    with FlopCounterMode(display=False) as counter:
        call(empty_module(case), make_inputs(case, meta))
    return float(counter.get_total_flops())


def measure(
    case: Case, ways: Mapping[str, Way], device: torch.device, *, rounds: int, repeat: int, clock: Clock
) -> Iterator[Timing]:
    """`rounds` times, every way is called `repeat` times in a row; one call of each comes before and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int | None] = {}
    first: dict[str, float] = {}
    with torch.inference_mode():
        for name, way in ways.items():
            first[name] = timed(way, device, CLOCKS["wall"])
            with peak_memory(device) as peak:
                way()
            peaks[name] = peak()
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name] += [timed(way, device, CLOCKS[clock]) for _ in range(repeat)]
        most = ceiling(case.dtype, device, clock)
    for name in ways:
        yield Timing(case.name, name, first[name], tuple(seconds[name]), peaks[name], count_flops(case), most)
