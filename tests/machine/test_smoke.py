"""The smoke test at small widths on the CPU: everything passes as it is, and every kind of fault is found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from nativesd.config import (
    Config,
    ControlNetConfig,
    Depth,
    Level,
    TextEncoderConfig,
    TextTime,
    UNetConfig,
    VAEConfig,
)
from nativesd.errors import UsageError
from nativesd.export.check import tf32
from nativesd.machine import doctor, smoke
from nativesd.machine.needs import FAMILIES, Family
from nativesd.machine.probe import Device, Found
from nativesd.machine.smoke import BFLOAT16, FLOAT16, FLOAT32, FP8, TF32, Check, SmokeReport
from nativesd.models.build import build
from oracles import on_one_thread

CPU = torch.device("cpu")


def small(depths: tuple[Depth, ...], *, linear: bool, added: TextTime | None = None) -> UNetConfig:
    levels = tuple(Level(32 << min(i, 1), (d,) * 2, (d,) * 3, heads=2) for i, d in enumerate(depths))
    return UNetConfig(levels, (1, None), context=24, linear_projection=linear, added=added, groups=16)


def family(unet: UNetConfig, *encoders: TextEncoderConfig) -> Family:
    encoder = replace(unet, levels=tuple(replace(level, up=()) for level in unet.levels))
    vae = VAEConfig(widths=(8, 8, 16, 16), groups=4)
    return Family(unet, vae, encoders, ControlNetConfig(encoder, hint_widths=(8, 8, 16, 16)), side=128)


TEXT = TextEncoderConfig(24, 2, 2, 48, "quick_gelu", vocabulary=500)
SMALL = {
    "sd15": family(small((1, 1, None), linear=False), TEXT),
    "sdxl": family(
        small((None, 2, 3), linear=True, added=TextTime(24, 6, 32)), TEXT, replace(TEXT, layers=3, projection=24)
    ),
}
UNET = smoke.subjects({"sd15": SMALL["sd15"]}, "small")[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with on_one_thread():
        yield


@pytest.fixture(autouse=True)
def no_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nativesd.machine.probe.OPTIONAL", {})


def test_everything_passes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "precisions", lambda device: (FLOAT32, BFLOAT16))
    told: list[str] = []
    report = smoke.smoke("cpu", catalogue=SMALL, progress=told.append)
    assert [check for check in report.checks if check.status != "passed"] == []
    assert report.ok
    made = {(check.component, check.families) for check in report.checks}
    assert made == {
        ("VAE", ("sd15", "sdxl")), ("text encoder", ("sd15", "sdxl")), ("text encoder", ("sdxl",)),
        ("UNet", ("sd15",)), ("UNet", ("sdxl",)), ("ControlNet", ("sd15",)), ("ControlNet", ("sdxl",)),
        ("picture", ("tiny",)),
    }  # fmt: skip
    assert {check.case for check in report.checks if check.component == "UNet"} == {
        "2x32x32 cells", "2x32x32 cells, residuals", "1x33x27 cells", "1x33x27 cells, residuals"
    }  # fmt: skip
    assert {check.case for check in report.checks if check.component == "picture"} == {
        "from a prompt", "with a ControlNet"
    }  # fmt: skip
    assert len(told) == len(made)
    for check in report.checks:
        assert check.error is not None
        assert check.seconds is not None
        if check.precision == "float32":  # the very same computation
            assert check.error == 0
        else:
            assert 0 < check.error <= check.limit

    text = report.to_text()
    assert f"{len(report.checks)} passed" in text
    assert text.count("| passed |") == len(report.checks)
    data = json.loads(report.to_json())
    assert data["ok"] is True
    assert len(data["checks"]) == len(report.checks)
    assert data["machine"]["found"]["torch"] == torch.__version__


def test_published_sizes() -> None:
    """At the families' own sizes SD1.5 and SD2.1 do not share their VAE's cases, and every component is there."""
    found = smoke.subjects(FAMILIES, "published")
    assert [s.sizes for s in found if s.name == "UNet"] == [((2, 64, 64),), ((2, 96, 96),), ((2, 128, 128),)]
    assert len(found) == 3 + 4 + 3 + 3  # VAEs, text encoders, UNets, ControlNets
    assert len(smoke.subjects(FAMILIES, "small")) == 2 + 4 + 3 + 3
    (case,) = smoke.cases(FAMILIES["sd15"].controlnet, ((1, 4, 6),))
    assert case.inputs["hint"].shape == (1, 3, 32, 48)


def sabotage(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any]) -> None:
    """What the module on the device gives goes through `fault`; the reference, which is built first, stays."""
    built: list[nn.Module] = []

    def faulty(config: Config) -> nn.Module:
        module = build(config)
        if built:
            module.register_forward_hook(lambda module, inputs, output: fault(output))
        built.append(module)
        return module

    monkeypatch.setattr(smoke, "build", faulty)
    monkeypatch.setattr(smoke, "precisions", lambda device: (FLOAT32,))


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, lambda output: output * (1 + 2 * FLOAT32.limit))
    checks = smoke.run_subject(UNET, CPU)
    assert {check.status for check in checks} == {"failed"}
    assert all(check.error == pytest.approx(2 * FLOAT32.limit, rel=1e-2) for check in checks)


def test_a_result_within_the_limit_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, lambda output: output * (1 + FLOAT32.limit / 2))
    assert {check.status for check in smoke.run_subject(UNET, CPU)} == {"passed"}


def test_a_result_that_is_not_finite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, lambda output: output * math.nan)
    checks = smoke.run_subject(UNET, CPU)
    assert {(check.status, check.error) for check in checks} == {("failed", None)}
    report = SmokeReport("cpu", "small", doctor.examine(), tuple(checks))
    assert not report.ok
    assert "not finite" in report.to_text()
    assert json.loads(report.to_json())["checks"][0]["error"] is None


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (RuntimeError("CUDA error: no kernel image is available\nCompile with ..."), "failed", "no kernel image"),
        (torch.OutOfMemoryError("CUDA out of memory."), "skipped", "out of memory"),
    ],
)
def test_what_the_device_raises_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, note: str
) -> None:
    def fail(output: Tensor) -> Tensor:
        raise error

    sabotage(monkeypatch, fail)
    checks = smoke.run_subject(UNET, CPU)
    assert len(checks) == 4
    for check in checks:
        assert check.status == status
        assert note in check.note
        assert "\n" not in check.note


def test_what_stays_elsewhere_is_named() -> None:
    module = nn.Module()
    module.register_buffer("here", torch.zeros(1))
    module.register_buffer("there", torch.zeros(1, device="meta"))
    outputs = [torch.zeros(1), torch.zeros(1, device="meta")]
    assert smoke.misplaced([module], outputs, CPU) == ["there", "output 1"]
    assert smoke.misplaced([module], outputs, torch.device("meta")) == ["here", "output 0"]


def test_what_stays_elsewhere_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "precisions", lambda device: (FLOAT32,))
    monkeypatch.setattr(smoke, "misplaced", lambda modules, outputs, device: ["norm_out.weight"])
    checks = [*smoke.run_subject(UNET, CPU), *smoke.run_pictures(CPU, steps=1)]
    assert {(check.status, check.note) for check in checks} == {("failed", "not on cpu: norm_out.weight")}


def test_a_component_that_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "free_bytes", lambda device: 1000)
    checks = smoke.run_subject(UNET, CPU)
    assert {check.status for check in checks} == {"skipped"}
    assert all("0.0 GB are free" in check.note for check in checks)


def test_a_wrong_picture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "precisions", lambda device: (BFLOAT16,))
    monkeypatch.setattr(smoke, "picture_difference", lambda found, expected: 2 * smoke.PICTURE_LIMITS[BFLOAT16])
    assert {check.status for check in smoke.run_pictures(CPU, steps=1)} == {"failed"}


def test_picture_difference() -> None:
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 0, 0))
    assert smoke.picture_difference(black, black) == 0
    assert smoke.picture_difference(grey, black) == pytest.approx(0.2 / 3)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.0, -2.0], [1.0, -4.0], 0.5),
        ([0.0, 0.0], [0.0, 0.0], math.inf),
        ([math.nan, 0.0], [1.0, 0.0], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
    ],
)
def test_difference(found: list[float], expected: list[float], difference: float) -> None:
    assert smoke.difference(torch.tensor(found), torch.tensor(expected)) == difference


def test_weights_are_drawn_for_good() -> None:
    """The same seed gives the same tensors; none is constant, and another seed gives others."""
    first, again, other = (build(UNET.config) for _ in range(3))
    for module, seed in ((first, 1), (again, 1), (other, 2)):
        smoke.draw(module, seed, 1.0)
    for name, tensor in first.state_dict().items():
        assert tensor.std() > 0, name
        assert torch.equal(tensor, again.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])


def test_tf32_is_set_meanwhile() -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = (matmul.fp32_precision, conv.fp32_precision)
    for allowed, name in ((True, "tf32"), (False, "ieee")):
        with tf32(allowed=allowed):
            assert (matmul.fp32_precision, conv.fp32_precision) == (name, name)
    assert (matmul.fp32_precision, conv.fp32_precision) == before


def test_a_card_is_checked_in_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, more in (("too old", ()), (None, (FP8,))):
        monkeypatch.setattr(smoke, "why_not_fp8", lambda device, found=reason: found)
        assert smoke.precisions(torch.device("cuda")) == (FLOAT32, TF32, FLOAT16, BFLOAT16, *more)
    assert smoke.precisions(CPU)[0] == FLOAT32
    assert TF32 not in smoke.precisions(CPU)


@pytest.mark.parametrize(
    ("found", "ok", "reason"),
    [
        ({"devices": (), "bus": 0}, True, "there is no NVIDIA GPU"),
        ({"devices": (Device("NVIDIA H200", (9, 0), 1, 1),)}, False, "torch cannot use the GPU"),
        ({"devices": (), "bus": 1}, False, "torch cannot use the GPU"),
    ],
)
def test_without_cuda_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], ok: bool, reason: str
) -> None:
    machine = Found((3, 12, 0), "Linux", "2.11.0+cpu", **found)
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Report(machine, ()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = smoke.smoke("cuda", catalogue=SMALL)
    assert report.checks == ()
    assert report.ok is ok
    assert reason in report.to_text().splitlines()[-1]
    assert "not run" in report.to_text()
    assert json.loads(report.to_json())["reason"] == report.reason


@pytest.mark.parametrize(
    ("device", "families", "message"),
    [
        ("cpu", ["sd16"], "no family 'sd16': sd15, sdxl"),
        ("gpu", [], "'gpu' cannot be"),
        ("meta", [], "'meta' is not checked"),
    ],
)
def test_what_cannot_be(device: str, families: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        smoke.smoke(device, families=families, catalogue=SMALL)


def test_a_skipped_check_in_the_text() -> None:
    check = Check("UNet", ("sdxl",), "2x32x32 cells", "float32", 1e-4, "skipped", note="too large")
    text = SmokeReport("cuda", "small", doctor.examine(), (check,)).to_text()
    assert "| UNet | sdxl | 2x32x32 cells | float32 |  | 0.0001 |  |  | skipped: too large |" in text
    assert "1 skipped" in text
