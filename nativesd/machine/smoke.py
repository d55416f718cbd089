"""Every component of every family on a device, compared with float32 on the CPU: a report to paste into an issue.

The weights are random, drawn so that activations keep the order of one, so nothing is downloaded; the sizes are the
published ones. A component is in memory once on the CPU and once, cast, on the device, and it goes before the next one
comes. The embedded model then paints a whole picture on both.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from PIL import Image, ImageChops, ImageDraw, ImageStat
from torch import Tensor, nn

from nativesd.config import UNetConfig, VAEConfig
from nativesd.diffusion.control import Control
from nativesd.errors import NativesdError, UsageError
from nativesd.export.check import tf32
from nativesd.loading.load import load
from nativesd.machine import doctor
from nativesd.machine.cases import FLOAT32_INPUTS, RESIDUAL_GAIN, Case, Size, Subject, cases, draw, subjects
from nativesd.machine.needs import FAMILIES, Family, weight_bytes
from nativesd.machine.probe import first_line
from nativesd.machine.report import Check, SmokeReport
from nativesd.models.build import build
from nativesd.tuning.fp8 import use_fp8, why_not_fp8
from nativesd.tuning.memory import free_bytes

T = TypeVar("T")

PROMPT = "a strawberry on a yellow background"  # one that the embedded model knows


@dataclass(frozen=True)
class Precision:
    """A way to compute, and the largest max|difference| / max|reference| from float32 on the CPU that it may show."""

    name: str
    dtype: torch.dtype
    limit: float
    tf32: bool = False
    fp8: bool = False
    """The UNet's transformer blocks in float8: of other components there is nothing to check."""


FLOAT32 = Precision("float32", torch.float32, 1e-4)
TF32 = Precision("float32, TF32", torch.float32, 3e-3, tf32=True)
FLOAT16 = Precision("float16", torch.float16, 1e-2)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, 4e-2)
# on a CPU the UNets at their published widths are off by 1.3e-2 to 3.5e-2 in float8 (`tests/test_fp8.py`, -m full -s)
FP8 = Precision("float16, fp8", torch.float16, 6e-2, fp8=True)

# Mean difference of the embedded model's pictures, 1 being black against white. Where every answer of its UNet is off
# by the limit above, four pictures of 20 steps moved by 2e-5, 5e-4, 1.8e-3 and 7e-3; another seed moves them by 3e-2.
PICTURE_LIMITS = {FLOAT32: 2e-4, TF32: 1e-3, FLOAT16: 4e-3, BFLOAT16: 1.5e-2, FP8: 1e-2}


def smoke(
    device: str = "cuda",
    *,
    families: Sequence[str] = (),
    size: Size = "small",
    catalogue: Mapping[str, Family] = FAMILIES,
    progress: Callable[[str], None] | None = None,
) -> SmokeReport:
    """Run every check on `device`.

    families   of the `catalogue`; default: all
    size       "small": 32x32 and 33x27 latent cells; "published": the families' own, which takes the CPU minutes
    progress   called with what comes next

    Raises UsageError for a family or device that does not exist.
    """
    chosen = families or tuple(catalogue)
    for name in chosen:
        if name not in catalogue:
            raise UsageError(f"there is no family {name!r}: {', '.join(catalogue)}")
    place = _place(device)
    machine = doctor.examine()
    if place.type == "cuda" and not torch.cuda.is_available():
        found = machine.found
        reason = "torch cannot use the GPU" if found.devices or found.bus else "there is no NVIDIA GPU"
        return SmokeReport(device, size, machine, reason=f"{reason}; --device cpu runs the same checks on the CPU")
    if place.type == "cuda" and place.index is not None and place.index >= torch.cuda.device_count():
        raise UsageError(f"device {device!r} does not exist: there are {torch.cuda.device_count()} CUDA devices")
    tell = progress or (lambda what: None)
    start = time.perf_counter()
    checks: list[Check] = []
    for subject in subjects({name: catalogue[name] for name in chosen}, size):
        tell(f"{subject.name} ({', '.join(subject.families)})")
        checks += run_subject(subject, place)
        gc.collect()
        if place.type == "cuda":
            with suppress(RuntimeError):  # a card that has failed for good says so in every check
                torch.cuda.empty_cache()
    tell("a picture by the embedded model")
    checks += run_pictures(place)
    return SmokeReport(
        device, size, machine, tuple(checks), seconds=time.perf_counter() - start, host_peak=_host_peak()
    )  # fmt: skip


def _place(device: str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} cannot be: pass cuda, cuda:1, ... or cpu") from error
    if place.type not in ("cuda", "cpu"):
        raise UsageError(f"device {device!r} is not checked: pass cuda, cuda:1, ... or cpu")
    return place


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """What a device is checked in. A CPU computes in half precision where oneDNN has kernels for it."""
    if device.type == "cuda":
        return FLOAT32, TF32, FLOAT16, BFLOAT16, *([] if why_not_fp8(device) else [FP8])
    onednn = torch.ops.mkldnn
    halves = [
        (FLOAT16, onednn._is_mkldnn_fp16_supported),
        (BFLOAT16, onednn._is_mkldnn_bf16_supported),
    ]
    return FLOAT32, *(precision for precision, supported in halves if supported())


@torch.inference_mode()
def run_subject(subject: Subject, device: torch.device) -> list[Check]:
    """All checks of a component: float32 on the CPU first, then every precision on the device."""
    is_unet = isinstance(subject.config, UNetConfig)
    todo = [precision for precision in precisions(device) if is_unet or not precision.fp8]
    calls = list(cases(subject.config, subject.sizes))
    weights = weight_bytes(subject.config, torch.float32)
    free = free_bytes(torch.device("cpu"))
    if free is not None and weights > free:
        note = f"its weights take {weights / 1e9:.1f} GB of main memory, and {free / 1e9:.1f} GB are free"
        return [_skipped(subject, case, precision, note) for precision in todo for case in calls]
    reference = build(subject.config)
    gain = 1.0 if isinstance(subject.config, VAEConfig) else RESIDUAL_GAIN
    draw(reference, zlib.crc32(repr(subject.config).encode()), gain)
    expected = [case.call(reference, **case.inputs) for case in calls]
    return [
        check
        for precision in todo
        for check in _run_precision(subject, list(zip(calls, expected, strict=True)), reference, precision, device)
    ]


def _run_precision(
    subject: Subject,
    calls: Sequence[tuple[Case, Sequence[Tensor]]],
    reference: nn.Module,
    precision: Precision,
    device: torch.device,
) -> Iterator[Check]:
    """The checks of a component in one precision: cases with what the reference makes of them."""
    shared = device.type == "cpu" and precision.dtype == torch.float32
    weights = 0 if shared else weight_bytes(subject.config, precision.dtype)
    try:
        free = free_bytes(device)
        if free is not None and weights > free:
            note = f"its weights take {weights / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            yield from (_skipped(subject, case, precision, note) for case, _ in calls)
            return
        module = build(subject.config).eval()
        tensors = {name: tensor.to(device, precision.dtype) for name, tensor in reference.state_dict().items()}
        module.load_state_dict(tensors, assign=True)
        del tensors
        if precision.fp8:
            use_fp8(module)
    except RuntimeError as error:
        yield from (_ended(subject, case, precision, error) for case, _ in calls)
        return
    for case, expected in calls:
        try:
            yield _run_case(subject, case, module, expected, precision, device)
        except RuntimeError as error:
            yield _ended(subject, case, precision, error)


def _run_case(
    subject: Subject, case: Case, module: nn.Module, expected: Sequence[Tensor], precision: Precision,
    device: torch.device,
) -> Check:  # fmt: skip
    """One call, compared, and timed."""
    inputs = {name: _cast(value, device, precision, name) for name, value in case.inputs.items()}
    with tf32(allowed=precision.tf32):
        outputs, seconds, peak = measure(partial(case.call, module, **inputs), device)
    error = max(difference(found.float().cpu(), wanted) for found, wanted in zip(outputs, expected, strict=True))
    strays = misplaced([module], outputs, device)
    blank = Check(subject.name, subject.families, case.name, precision.name, precision.limit, "failed")
    return _judged(blank, error, strays, seconds, peak, device)


def _judged(
    check: Check, error: float, strays: Sequence[str], seconds: float, peak: int | None, device: torch.device
) -> Check:
    """The check with what was measured: passed within its limit and with nothing left elsewhere."""
    notes = [] if math.isfinite(error) else ["the result is not finite, or of another shape"]
    notes += [f"not on {device}: {', '.join(strays)}"] if strays else []
    return replace(
        check,
        status="passed" if error <= check.limit and not strays else "failed",
        error=error if math.isfinite(error) else None,
        seconds=seconds,
        peak=peak,
        note="; ".join(notes),
    )


def _cast(value: Any, device: torch.device, precision: Precision, name: str) -> Any:
    if isinstance(value, list):
        return [_cast(item, device, precision, name) for item in value]
    exact = name in FLOAT32_INPUTS or not value.is_floating_point()
    return value.to(device) if exact else value.to(device, precision.dtype)


def difference(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected|; infinite where that has no meaning.

    That is where shapes differ, a value is not finite, or nothing but zeros is expected.
    """
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return math.inf
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / scale if scale > 0 else math.inf


def misplaced(modules: Sequence[nn.Module], outputs: Sequence[Tensor], device: torch.device) -> list[str]:
    """The parameters, buffers and outputs that are not on a device, by name."""
    tensors = [entry for module in modules for entry in (*module.named_parameters(), *module.named_buffers())]
    tensors += [(f"output {index}", output) for index, output in enumerate(outputs)]
    return [
        name
        for name, tensor in tensors
        if tensor.device.type != device.type or device.index not in (None, tensor.device.index)
    ]


def _skipped(subject: Subject, case: Case, precision: Precision, note: str) -> Check:
    return Check(
        subject.name, subject.families, case.name, precision.name, precision.limit, "skipped", note=note
    )  # fmt: skip


def _ended(subject: Subject, case: Case, precision: Precision, error: RuntimeError) -> Check:
    """A check that the device could not finish: skipped where it ran out of memory, else failed."""
    status: Literal["failed", "skipped"] = "skipped" if isinstance(error, torch.OutOfMemoryError) else "failed"
    return Check(
        subject.name, subject.families, case.name, precision.name, precision.limit, status, note=first_line(error)
    )  # fmt: skip


@torch.inference_mode()
def run_pictures(device: torch.device, *, steps: int = 20) -> list[Check]:
    """Whole pictures by the embedded model, from noise that is the same everywhere, without and with its ControlNet."""
    checks = []
    outline = [Control("tiny", _outline())]
    ways: dict[str, tuple[Sequence[Control], Literal["torch", "cudagraphs"]]] = {
        "from a prompt": ([], "torch"),
        "with a ControlNet": (outline, "torch"),
    }
    if device.type == "cuda":
        ways["with a ControlNet, CUDA graphs"] = (outline, "cudagraphs")
    reference = load("tiny", device="cpu", dtype="float32")
    expected = {name: reference(PROMPT, steps=steps, seed=0, control=control) for name, (control, _) in ways.items()}
    for precision in precisions(device):
        for name, (control, backend) in ways.items():
            blank = Check("picture", ("tiny",), name, precision.name, PICTURE_LIMITS[precision], "failed")
            try:
                pipeline = load(
                    "tiny", device=device, dtype=precision.dtype, backend=backend, fp8=precision.fp8
                )  # fmt: skip
                call = partial(pipeline, PROMPT, steps=steps, seed=0, control=control)
                with tf32(allowed=precision.tf32):
                    found, seconds, peak = measure(call, device)
                strays = misplaced([pipeline.unet, pipeline.vae, *pipeline.text_encoders], [found.latents], device)
            except (RuntimeError, NativesdError) as error:
                checks.append(replace(blank, note=first_line(error)))
                continue
            moved = picture_difference(found.images[0], expected[name].images[0])
            checks.append(_judged(blank, moved, strays, seconds, peak, device))
    return checks


def _outline() -> Image.Image:
    """A hint for the ControlNet: the edges of a square in the middle of the embedded model's 64x64 pixels."""
    hint = Image.new("RGB", (64, 64))
    ImageDraw.Draw(hint).rectangle((16, 16, 48, 48), outline="white")
    return hint


def picture_difference(found: Image.Image, expected: Image.Image) -> float:
    """The mean difference of two pictures of one size over all pixels and channels, 1 being black against white."""
    means = ImageStat.Stat(ImageChops.difference(found, expected)).mean
    return sum(means) / len(means) / 255


class Measured(NamedTuple, Generic[T]):
    """What a call gave, the seconds it took, and the most bytes that tensors took on the card; None on the CPU."""

    result: T
    seconds: float
    peak: int | None


def measure(call: Callable[[], T], device: torch.device) -> Measured[T]:
    """Run a call. On CUDA, where the first one loads kernels, three more are timed, and the median counts."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call()
        return Measured(result, time.perf_counter() - start, None)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    times = []
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return Measured(result, median(times), torch.cuda.max_memory_allocated(device))


def _host_peak() -> int | None:
    """Of this process, in bytes; Linux counts in KiB, macOS in bytes, Windows has no such call."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
