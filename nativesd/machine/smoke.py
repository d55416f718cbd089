"""Every component of every family on a device, compared with float32 on the CPU: a report to paste into an issue.

The weights are random, drawn so that activations keep the order of one, so nothing is downloaded; the sizes are the
published ones. A component is in memory once on the CPU and once, cast, on the device, and it goes before the next one
comes. The embedded model then paints a whole picture on both.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from PIL import Image, ImageChops, ImageDraw, ImageStat
from torch import Tensor, nn

from nativesd.config import Config, ControlNetConfig, TextEncoderConfig, UNetConfig, VAEConfig
from nativesd.errors import NativesdError, UsageError
from nativesd.export.check import tf32
from nativesd.loading.load import load
from nativesd.machine import doctor
from nativesd.machine.needs import FAMILIES, Family, weight_bytes
from nativesd.machine.probe import first_line
from nativesd.models.build import build
from nativesd.models.vae import VAE
from nativesd.pipeline.control import Control
from nativesd.tuning.fp8 import use_fp8, why_not_fp8
from nativesd.tuning.memory import free_bytes

Size = Literal["small", "published"]
T = TypeVar("T")

SCHEMA = 1
"""Version of `SmokeReport.to_json`'s schema; it counts up when a name changes its meaning or goes away."""

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


@dataclass(frozen=True)
class Case:
    """A call of a component: its name, and the call with inputs cast and moved. It gives tensors."""

    name: str
    inputs: Mapping[str, Any]
    call: Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Subject:
    """A component to check: its name, the families that have it, and the (batch, height, width) of the latents."""

    name: str
    families: tuple[str, ...]
    config: Config
    sizes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Check:
    """What became of one case in one precision. `error` is None where it is no number, and `note` says why.

    seconds  of a call (on CUDA the median of three after a first one)
    peak     bytes on the card, weights included; None on the CPU
    """

    component: str
    families: tuple[str, ...]
    case: str
    precision: str
    limit: float
    status: Literal["passed", "failed", "skipped"]
    error: float | None = None
    seconds: float | None = None
    peak: int | None = None
    note: str = ""


@dataclass(frozen=True)
class SmokeReport:
    """What a device computes. Without a usable device nothing ran, for `reason`."""

    device: str
    size: Size
    machine: doctor.Report
    checks: tuple[Check, ...] = ()
    reason: str = ""
    seconds: float = 0.0
    host_peak: int | None = None
    """Bytes of main memory that the process had at its peak, where that can be known."""

    @property
    def ok(self) -> bool:
        """Whether no check failed; where nothing ran, whether there is no card that should have run it."""
        found = self.machine.found
        blocked = not self.checks and bool(found.devices or found.bus)
        return not blocked and all(check.status != "failed" for check in self.checks)

    def to_json(self) -> str:
        """`schema`, `ok` and the fields of the report, named as in `SmokeReport`, `Check` and `machine.Found`."""
        fields = {name: value for name, value in asdict(self).items() if name != "machine"}
        machine = {"found": asdict(self.machine.found), "findings": [asdict(f) for f in self.machine.findings]}
        return json.dumps({"schema": SCHEMA, "ok": self.ok, **fields, "machine": machine}, indent=2)

    def to_text(self) -> str:
        """The machine, then a Markdown table of the checks."""
        lines = [*self.machine.to_text().splitlines(), ""]
        if not self.checks:
            return "\n".join([*lines, f"not run: {self.reason}"])
        lines += [
            f"Smoke test on {self.device}, {self.size} sizes: difference from float32 on the CPU",
            "",
            "| component | of | case | precision | difference | limit | ms | peak GB | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for check in self.checks:
            cells = [
                check.component, ", ".join(check.families), check.case, check.precision,
                "" if check.error is None else f"{check.error:.1e}",
                f"{check.limit:g}",
                "" if check.seconds is None else f"{check.seconds * 1e3:.1f}",
                "" if check.peak is None else f"{check.peak / 1e9:.2f}",
                ": ".join(filter(None, (check.status, check.note))),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        counts = {status: sum(c.status == status for c in self.checks) for status in ("passed", "failed", "skipped")}
        memory = "" if self.host_peak is None else f", main memory at its peak {self.host_peak / 1e9:.1f} GB"
        total = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return "\n".join([*lines, "", f"{total}; {self.seconds:.0f} s{memory}"])


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


# --- what is checked ---------------------------------------------------------------------------------------------


def subjects(families: Mapping[str, Family], size: Size) -> list[Subject]:
    """The components of the families; what several have in common comes once."""
    wanted: dict[tuple[str, Config, tuple[tuple[int, int, int], ...]], list[str]] = {}
    for name, family in families.items():
        cells = family.side // family.vae.factor
        sizes = ((2, 32, 32), (1, 33, 27)) if size == "small" else ((2, cells, cells),)
        one = tuple((1, height, width) for _, height, width in sizes)
        wanted.setdefault(("VAE", family.vae, one), []).append(name)
        for encoder in family.text_encoders:
            wanted.setdefault(("text encoder", encoder, ()), []).append(name)
        wanted.setdefault(("UNet", family.unet, sizes), []).append(name)
        wanted.setdefault(("ControlNet", family.controlnet, sizes), []).append(name)
    return [Subject(label, tuple(names), config, sizes) for (label, config, sizes), names in wanted.items()]


def cases(config: Config, sizes: Sequence[tuple[int, int, int]]) -> Iterator[Case]:
    """The calls of a component for latents of `sizes`, each (batch, height, width)."""
    generator = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, generator=generator)
    match config:
        case TextEncoderConfig():
            yield Case(f"2x{config.length} tokens", {"tokens": _tokens(config, generator)}, _call)
        case VAEConfig():
            for batch, height, width in sizes:
                pixels = (batch, config.image_channels, config.factor * height, config.factor * width)
                shape = f"{pixels[3]}x{pixels[2]} px"
                yield Case(f"encode {shape}", {"images": normal(pixels).clamp(-1, 1)}, _encode)
                latents = normal((batch, config.latent_channels, height, width))
                yield Case(f"decode {shape}", {"latents": latents}, _decode)
        case UNetConfig():
            for batch, height, width in sizes:
                inputs = _unet_inputs(config, batch, height, width, generator)
                residuals = [normal(shape) for shape in config.residual_shapes(batch, height, width)]
                yield Case(f"{batch}x{height}x{width} cells", inputs, _call)
                yield Case(f"{batch}x{height}x{width} cells, residuals", {**inputs, "residuals": residuals}, _call)
        case ControlNetConfig():
            factor = 1 << (len(config.hint_widths) - 1)
            for batch, height, width in sizes:
                inputs = _unet_inputs(config.unet, batch, height, width, generator)
                hint = torch.rand((batch, config.hint_channels, factor * height, factor * width), generator=generator)
                yield Case(f"{batch}x{height}x{width} cells", {**inputs, "hint": hint}, _call)


def _unet_inputs(config: UNetConfig, batch: int, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
    """Normal latents, context and pooled embedding; a timestep per picture, and the ids of a square picture."""
    inputs: dict[str, Any] = {
        "latents": torch.randn((batch, config.in_channels, height, width), generator=generator),
        "timestep": torch.linspace(999, 261, batch),
        "context": torch.randn((batch, 77, config.context), generator=generator),
    }
    if config.added is not None:
        inputs["pooled"] = torch.randn((batch, config.added.pooled), generator=generator)
        inputs["time_ids"] = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024][: config.added.ids]).expand(batch, -1)
    return inputs


FLOAT32_INPUTS = ("timestep", "time_ids")  # as the pipeline passes them, whatever the dtype


def _tokens(config: TextEncoderConfig, generator: torch.Generator) -> Tensor:
    """Ids (2, length) of a short and a long prompt, padded with the end-of-text token."""
    tokens = torch.full((2, config.length), config.vocabulary - 1)
    for row, length in zip(tokens, (7, config.length - 17), strict=True):
        row[:length] = torch.randint(config.vocabulary - 2, (length,), generator=generator)
    return tokens


def _call(module: nn.Module, **inputs: Any) -> Sequence[Tensor]:
    out: Tensor | Sequence[Tensor] = module(**inputs)
    return [out] if isinstance(out, Tensor) else out


def _encode(module: VAE, images: Tensor) -> Sequence[Tensor]:
    return module.encode(images)


def _decode(module: VAE, latents: Tensor) -> Sequence[Tensor]:
    return [module.decode(latents)]


# Of the weights in blocks around which their input passes, times 1 / sqrt(fan-in). With 1 deep transformers double what
# TF32 rounds off (SDXL at a fifth of its width: 2.3e-3 against 1e-3). The VAE's rounding grows with less than 1.
RESIDUAL_GAIN = 0.7


def draw(module: nn.Module, seed: int, gain: float) -> None:
    """Move a module from meta to the CPU and draw every parameter, at scales that keep activations of order one.

    Weights have a standard deviation of gain / sqrt(fan-in). No parameter has a telling value: norms are not the
    identity, and no convolution is zero.
    """
    module.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                match part:
                    case nn.GroupNorm() | nn.LayerNorm():
                        parameter.normal_(1.0 if name == "weight" else 0.0, 0.2, generator=generator)
                    case nn.Embedding():
                        parameter.normal_(generator=generator)
                    case _:
                        fan_in = parameter[0].numel()
                        parameter.normal_(0.0, 0.1 if name == "bias" else gain * fan_in**-0.5, generator=generator)


# --- the checks --------------------------------------------------------------------------------------------------


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
