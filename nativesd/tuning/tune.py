"""What is fast here, by a measurement: oneDNN's operators on a CPU, the layout of weights on CUDA. Modules change over.

What a module computes and what its state is stay as they are, so that a tuned one can be loaded into, merged into and
saved. Undo it (`untune`, `untuned`) before torch.export or torch.compile, which want the plain layers.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nativesd.cache import cache_folder, keep
from nativesd.errors import SourceError
from nativesd.models.layers import GEGLU, Attention, ImageKeys, ResnetBlock, TransformerBlock, Upsample, attention
from nativesd.models.vae import PixelAttention
from nativesd.reading import read_json
from nativesd.schema import truth
from nativesd.tuning import fast, fast_int8, int8

GAIN = 0.97  # of the plain path's time that the fast one may take at most
ROUNDS = 3
GRAPHS = 64  # of all blocks of a process, for widths, dtypes and batches of 1; torch gives up after 8
CALLS = 10  # of a block on CUDA, whose launches take as long as it does
PROBE = 3  # to be raised whenever the fast operators change: a kept choice was made between others then


@dataclass(frozen=True)
class Tuning:
    """Which fast layers a module is given. `Tuning()` is none: the plain path."""

    linear: bool = False
    attention: bool = False
    convolution: bool = False
    """And the residual blocks around convolutions."""
    int8: bool = False
    """Products of 8 bits in layers that keep their weights so"""
    channels_last: bool = False
    """On CUDA: convolutions' weights with their channels innermost, which has feature maps follow."""

    def swaps(self) -> dict[type[nn.Module], type[nn.Module]]:
        """Plain class -> fast class."""
        swaps: dict[type[nn.Module], type[nn.Module]] = {}
        if self.attention:
            swaps |= {Attention: fast.FastAttention, PixelAttention: fast.FastPixelAttention}
        if self.linear:
            swaps |= {nn.Linear: fast.FastLinear, GEGLU: fast.FastGEGLU}
        if self.convolution:
            swaps |= {
                nn.Conv2d: fast.FastConv2d,
                Upsample: fast.FastUpsample,
                ResnetBlock: fast.FastResnetBlock,
            }
        if self.int8:
            swaps |= {
                int8.Int8Linear: fast_int8.FastInt8Linear,
                int8.Int8Conv2d: fast_int8.FastInt8Conv2d,
                int8.Int8Upsample: fast_int8.FastInt8Upsample,
                int8.Int8GEGLU: fast_int8.FastInt8GEGLU,
            }
            if self.attention:
                swaps[int8.Int8Attention] = fast_int8.FastInt8Attention
        return swaps


EVERYTHING = Tuning(linear=True, attention=True, convolution=True, int8=True)
PLAIN = {quick: plain for plain, quick in EVERYTHING.swaps().items()}


def tune(module: nn.Module, tuning: Tuning | None = None) -> Tuning:
    """Change a loaded module to its fast layers, in place, by `tuning` or else by what pays here; returns which.

    Nothing happens to modules on other devices, or in a dtype without a fast path. Weights keep their names and values.
    """
    untune(module)
    first = next(module.parameters())
    if tuning is None:
        tuning = best_tuning(first.dtype, first.device, torch.get_num_threads())
    swaps = tuning.swaps()
    if tuning.channels_last:
        _put_channels_last(module)
    for part in module.modules():
        part.__class__ = swaps.get(type(part), type(part))
    return tuning


def _put_channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def untune(module: nn.Module) -> None:
    """Undo `tune`: the plain layers."""
    for part in module.modules():
        _make_plain(part)


def _make_plain(part: nn.Module) -> None:
    if isinstance(part, fast.Packed):
        part.unpack()
    part.__class__ = PLAIN.get(type(part), type(part))


@contextmanager
def untuned(module: nn.Module) -> Iterator[None]:
    """Within, a tuned or compiled module computes by its plain layers."""
    tuned = {part: type(part) for part in module.modules() if type(part) in PLAIN}
    compiled = {part: part._compiled_call_impl for part in module.modules()}
    try:
        for part in tuned:
            _make_plain(part)
        for part in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, kind in tuned.items():
            part.__class__ = kind
        for part, call in compiled.items():
            part._compiled_call_impl = call


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Have torch.compile compile the block that a UNet repeats, when it is first called.

    Any size, number of tokens and batch above 1 uses what was compiled; a batch of 1 is compiled apart. On CUDA every
    width has its own graph; on a CPU, where compiling takes longer than it saves, one serves all. Weights may be
    written to. Of the fast layers in a block its attention stays, where it was chosen.
    """
    import torch._inductor.compile_fx  # noqa: F401  # 2 s, which the first picture need not wait for
    from torch._dynamo import config

    for block in module.modules():
        if isinstance(block, TransformerBlock):
            tune(block, Tuning(attention=isinstance(block.attn1, fast.FastAttention)))
            if next(block.parameters()).device.type == "cpu":
                _compile_for_every_width(block, backend)
            else:
                block.compile(dynamic=True, fullgraph=True, backend=backend)
                block._compiled_call_impl = config.patch(recompile_limit=GRAPHS)(block._compiled_call_impl)


def _compile_for_every_width(block: TransformerBlock, backend: str) -> None:
    """The block that sees the latents once for several texts stays as it is, and so does every block that is shown
    image prompts: they would need graphs of their own."""
    from torch._dynamo import config

    # else inductor compiles all of torch's vector headers only to see whether that works
    options = {"cpp.vec_isa_ok": True} if backend == "inductor" else None
    block.compile(dynamic=True, fullgraph=True, backend=backend, options=options)
    any_width = config.patch(
        recompile_limit=GRAPHS,
        force_parameter_static_shapes=False,
        force_nn_module_property_static_shapes=False,
        allow_unspec_int_on_nn_module=True,
        specialize_float=True,  # the norms' eps
    )
    compiled, plain = any_width(block._compiled_call_impl), block._call_impl

    def call(x: Tensor, k: Tensor, v: Tensor, images: ImageKeys | None = None) -> Tensor:
        out: Tensor = (compiled if images is None and len(x) == len(k) else plain)(x, k, v, images)
        return out

    block._compiled_call_impl = call


@cache
def best_tuning(dtype: torch.dtype, device: torch.device, threads: int) -> Tuning:
    """What pays on this machine, on a CPU with as many `threads`, from a probe of a fraction of a second.

    It is kept in the user's cache, since a choice that comes out even would otherwise change a picture's last bits
    from one process to the next.
    """
    if device.type == "cpu" and supported(dtype):
        where, probe = f"{processor()}, {threads} threads", _probe
    elif device.type == "cuda":
        where, probe = torch.cuda.get_device_name(device), partial(_probe_layout, device=device)
    else:
        return Tuning()
    try:
        path = cache_folder() / "tuning.json"
    except SourceError:  # no home: the probe is made again next time
        return probe(dtype)
    key = f"{where}, torch {torch.__version__}, {dtype}, probe {PROBE}"
    known = _read(path)
    try:
        return Tuning(**{each.name: truth().read(known[key][each.name]) for each in fields(Tuning)})
    except (KeyError, TypeError, ValueError):
        found = probe(dtype)
        keep(path, json.dumps(known | {key: asdict(found)}, indent=1).encode())
        return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except SourceError:
        return {}


def processor() -> str:
    """The processor's name where the system tells it, and on x86 its family and model, which a name may not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in first:
        return platform.processor() or platform.machine()
    known = [first["model name"], *(f"{name} {first[name]}" for name in ("cpu family", "model") if name in first)]
    return ", ".join(known)


def _probe(dtype: torch.dtype) -> Tuning:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = (normal(1, 1024, 320) for _ in range(3))  # five heads of 64: SD2.1's, on 32x32 latents
    x, weight, bias = normal(1, 2048, 640), normal(640, 640), normal(640)
    with torch.inference_mode():
        return Tuning(
            linear=_pays(
                lambda: torch.nn.functional.linear(x, weight, bias), lambda: fast.linear(x, weight, bias), most=1.0
            ),
            attention=_pays(lambda: attention(q, k, v, 5), lambda: fast.blockwise_attention(q / 8, k, v, 5), most=GAIN),
            convolution=True,  # less work everywhere
            int8=products_of_8_bits(dtype) and _int8_pays(normal(1, 512, 1280), normal(1280, 1280), normal(1280)),
        )


def _int8_pays(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """By a projection of the third level, packed both ways."""
    width, width_in = weight.shape
    plain, eight = (nn.Sequential(nn.Linear(width_in, width, device="meta")) for _ in range(2))
    for each in (plain, eight):
        each[0].weight, each[0].bias = (nn.Parameter(part, requires_grad=False) for part in (weight.clone(), bias))
    int8.use_int8(eight)
    for each in (plain, eight):
        tune(each, EVERYTHING)
    return _pays(lambda: plain(x), lambda: eight(x), most=GAIN)


def _probe_layout(dtype: torch.dtype, device: torch.device) -> Tuning:
    """By a residual block of the UNet's first level: group norms on CUDA want channels first, convolutions last."""
    with torch.random.fork_rng(devices=[]):  # whoever draws next gets what would be drawn without the probe
        block = ResnetBlock(320, 320, time_width=None, groups=32, eps=1e-5).to(device, dtype)
    other = _put_channels_last(copy.deepcopy(block))
    x = torch.randn(2, 320, 64, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    swapped = x.contiguous(memory_format=torch.channels_last)

    def several(block: nn.Module, x: Tensor) -> None:
        for _ in range(CALLS):
            block(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        return Tuning(channels_last=_pays(lambda: several(block, x), lambda: several(other, swapped), most=GAIN))


def supported(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have the fast operators for `dtype`."""
    operators = torch.ops.mkldnn
    if not hasattr(operators, "_linear_pointwise"):  # built without oneDNN
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(operators._is_mkldnn_bf16_supported()))


def products_of_8_bits(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor (with VNNI) multiply numbers of 8 bits beside others in `dtype`.

    Without VNNI oneDNN adds up two products in 16 bits, which overflow.
    """
    return hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.cpu._is_vnni_supported() and supported(dtype)


def _pays(plain: Callable[[], object], quick: Callable[[], object], *, most: float) -> bool:
    """Whether `quick` takes at most so much of the time of `plain`: the best of a few rounds, one after the other."""
    best = [float("inf")] * 2
    for _ in range(ROUNDS + 1):  # the first one is a warm-up that never wins
        for i, run in enumerate((plain, quick)):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    return best[1] <= most * best[0]
