"""On a CUDA device: the doctor finds nothing, and every component at its published size computes what the CPU does.

python -m pytest gpu -m gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import nativesd
from nativesd.machine import doctor, smoke
from nativesd.machine import probe as machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_doctor() -> None:
    """All but memory, which others may use."""
    report = doctor.examine()
    assert report.found.usable
    assert [finding for finding in report.findings if finding.kind != "memory"] == []
    for device in report.found.devices:
        assert device.capability is not None
        assert doctor.kernels(report.found.architectures, device.capability) is not None
        assert 0 < (device.free or 0) <= (device.total or 0)


@pytest.mark.parametrize("family", list(machine.FAMILIES))
def test_smoke(family: str) -> None:
    report = smoke.smoke("cuda", families=[family])
    print(report.to_text())
    assert [check for check in report.checks if check.status == "failed"] == []
    assert any(check.status == "passed" and check.component == "UNet" for check in report.checks)
    assert all(check.peak for check in report.checks if check.status == "passed")


def test_cuda_is_the_default_device() -> None:
    pipeline = nativesd.load("tiny")
    modules = [pipeline.unet, pipeline.vae, *pipeline.text_encoders]
    result = pipeline(smoke.PROMPT, steps=2, seed=0)
    assert smoke.misplaced(modules, [result.latents], torch.device("cuda")) == []
    assert pipeline.dtype == torch.float16


def test_a_second_run_gives_the_same_picture() -> None:
    pipeline = nativesd.load("tiny", device="cuda")
    first, second = (pipeline(smoke.PROMPT, seed=0).images[0] for _ in range(2))
    assert smoke.picture_difference(first, second) <= smoke.PICTURE_LIMITS[smoke.FLOAT32]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cuda_graphs_give_the_same_picture(dtype: str) -> None:
    """From the second step on; the second call has nothing but launches."""
    plain = nativesd.load("tiny", device="cuda", dtype=dtype)
    captured = plain.accelerate("cudagraphs")
    options: dict[str, Any] = {"seed": 0, "steps": 8, "control": [nativesd.Control("tiny", Image.new("RGB", (64, 64)))]}
    expected = plain(smoke.PROMPT, **options).latents
    for _ in range(2):
        assert (captured(smoke.PROMPT, **options).latents - expected).abs().max() <= 1e-2 * expected.abs().max()
    assert captured.close() > 0
