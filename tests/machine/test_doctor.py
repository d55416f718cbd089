"""The doctor on made-up machines: what will not work, and the line that mends it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nativesd.machine import doctor
from nativesd.machine import probe as machine
from nativesd.machine.doctor import Fit, findings
from nativesd.machine.needs import Need
from nativesd.machine.probe import Backend, Device, Found
from nativesd.wheels import TORCH, dotted, install_torch, kernels

GB = 10**9
# torch.cuda.get_arch_list() of published builds
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")

RTX_5090 = Device("NVIDIA GeForce RTX 5090", (12, 0), 34 * GB, 33 * GB)
RTX_4090 = Device("NVIDIA GeForce RTX 4090", (8, 9), 25 * GB, 24 * GB)
H200 = Device("NVIDIA H200", (9, 0), 150 * GB, 149 * GB)
V100 = Device("Tesla V100", (7, 0), 34 * GB, 33 * GB)

HEALTHY = Found(
    python=(3, 12, 4), system="Linux 6.8 x86_64", torch="2.11.0+cu130", cuda="13.0", architectures=CU130, usable=True,
    driver="580.95.05", devices=(RTX_5090,), bus=1, free=60 * GB, total=64 * GB,
)  # fmt: skip
CU126_TORCH = replace(HEALTHY, torch="2.11.0+cu126", cuda="12.6", architectures=CU126)
WITHOUT_GPU = replace(HEALTHY, torch="2.11.0+cpu", cuda=None, architectures=(), usable=False, driver=None, devices=(),
                      bus=0)  # fmt: skip


def url(index: str) -> str:
    return f"https://download.pytorch.org/whl/{index}"


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (CU130, (12, 0), "compiled"),
        (CU126, (12, 0), None),
        (CU128, (12, 1), "compiled"),  # GB10 runs sm_120
        (CU128, (10, 3), "compiled"),  # B300 runs sm_100
        (CU128, (11, 0), None),
        (CU126, (8, 6), "compiled"),
        (CU126, (8, 9), "compiled"),
        (("sm_80",), (8, 6), "compiled"),
        (("sm_86",), (8, 0), None),  # a lower minor version is not enough
        (("sm_90", "compute_90"), (12, 0), "PTX"),
        (("sm_90", "compute_90"), (8, 9), None),
        (("sm_90", "compute_90"), (9, 0), "compiled"),
        (("compute_90", "sm_120"), (12, 0), "compiled"),
        (("compute_86",), (8, 9), "PTX"),
        (("sm_90a", "compute_90a"), (9, 0), "compiled"),
        (("sm_100a", "compute_100a"), (10, 3), None),  # architecture-specific
        (("compute_90a",), (12, 0), None),
        (("sm_100f",), (10, 3), "compiled"),  # family-specific
        (("compute_100f",), (10, 3), "PTX"),
        (("compute_100f",), (12, 0), None),
        (("gfx1100",), (9, 0), None),
        ((), (9, 0), None),
    ],
)
def test_kernels(architectures: tuple[str, ...], capability: tuple[int, int], expected: str | None) -> None:
    assert kernels(architectures, capability) == expected


@pytest.mark.parametrize(
    ("capability", "driver", "index"),
    [
        ((12, 0), "580.95.05", "cu130"),
        ((12, 0), "570.124.06", "cu128"),
        ((12, 1), None, "cu130"),
        ((9, 0), "535.183.01", "cu128"),
        ((7, 0), "580.95.05", "cu126"),
        ((6, 1), "550.54.14", "cu126"),
        ((8, 9), "470.256.02", None),
        ((3, 7), None, None),
        ((11, 0), "570.124.06", None),
        (None, "580.95.05", "cu130"),
    ],
)
def test_the_index_to_install_from(capability: tuple[int, int] | None, driver: str | None, index: str | None) -> None:
    line = install_torch([capability], driver)
    expected = None if index is None else f'pip install --force-reinstall "torch>=2.10" --index-url {url(index)}'
    assert line == expected


@pytest.mark.parametrize(
    "found",
    [
        HEALTHY,
        WITHOUT_GPU,
        replace(CU126_TORCH, devices=(RTX_4090,), driver="535.183.01"),  # sm_86 code; CUDA 12.6 on an older 12 driver
        replace(HEALTHY, torch="2.10.0+cu128", cuda="12.8", architectures=CU128, driver="570.124.06"),
        replace(HEALTHY, backends=(Backend("tensorrt", "engines", "pip install tensorrt", missing="not installed"),)),
        replace(HEALTHY, driver=None),  # not known is not too old
        replace(HEALTHY, torch="2.10.0a0+git1234"),
        replace(HEALTHY, architectures=("sm_90", "compute_90")),
    ],
)
def test_nothing_to_find(found: Found) -> None:
    assert findings(found) == []


def test_blackwell_with_a_torch_that_has_no_kernels_for_it() -> None:
    (finding,) = findings(CU126_TORCH)
    assert finding.kind == "kernels"
    assert "NVIDIA GeForce RTX 5090 (sm_120)" in finding.message
    assert "no kernel image is available" in finding.message
    assert "sm_90" in finding.message
    assert finding.remedy == f'pip install --force-reinstall "torch>=2.10" --index-url {url("cu130")}'
    (older_driver,) = findings(replace(CU126_TORCH, driver="570.124.06"))
    assert older_driver.remedy.endswith(url("cu128"))


def test_two_cards_of_a_kind_are_named_once_and_every_other_one() -> None:
    found = findings(replace(CU126_TORCH, devices=(RTX_5090, RTX_5090, RTX_4090)))
    assert [finding.kind for finding in found] == ["kernels"]
    found = findings(replace(HEALTHY, devices=(V100, RTX_5090)))
    assert [finding.kind for finding in found] == ["kernels"]
    assert "Tesla V100 (sm_70)" in found[0].message
    assert found[0].remedy == (
        "no torch from pytorch.org has kernels for all of these cards: leave Tesla V100 out with CUDA_VISIBLE_DEVICES=1"
    )


GTX_1080 = Device("NVIDIA GeForce GTX 1080", (6, 1), 8 * GB, 8 * GB)


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        # what runs the 1080 would leave the 5090 without kernels
        (replace(HEALTHY, devices=(RTX_5090, GTX_1080)),
         "leave NVIDIA GeForce GTX 1080 out with CUDA_VISIBLE_DEVICES=0"),
        (replace(CU126_TORCH, devices=(RTX_5090, GTX_1080)), "whl/cu130 (no torch has kernels for all of these cards: "
         "NVIDIA GeForce GTX 1080 may lie idle then)"),
        (replace(WITHOUT_GPU, devices=(GTX_1080, RTX_5090), driver="580.95.05"), "whl/cu130"),
        # one that has kernels for all of them
        (replace(CU126_TORCH, devices=(RTX_5090, RTX_4090)), "whl/cu130"),
        (replace(HEALTHY, devices=(RTX_4090, GTX_1080)), "whl/cu126"),
    ],
)  # fmt: skip
def test_no_card_loses_its_kernels_for_another(found: Found, remedy: str) -> None:
    (finding,) = findings(found)
    assert finding.remedy.endswith(remedy)


def test_a_card_that_fails_beside_another_is_named() -> None:
    (finding,) = findings(replace(HEALTHY, complaints=("card 1: CUDA error: uncorrectable ECC error encountered",)))
    assert finding.kind == "unusable"
    assert finding.message == "torch cannot use card 1: CUDA error: uncorrectable ECC error encountered"


def test_a_full_card_is_not_a_broken_driver() -> None:
    full = replace(HEALTHY, usable=False, complaints=("CUDA error: out of memory",))
    (finding,) = findings(full)
    assert finding.kind == "unusable"
    assert finding.remedy == "end what else uses the card: nvidia-smi names it"


def test_rocm_is_not_sent_to_cuda() -> None:
    radeon = Device("AMD Radeon RX 7900 XTX", (11, 0), 24 * GB, 23 * GB)
    rocm = replace(HEALTHY, torch="2.11.0+rocm6.4", cuda=None, hip="6.4.0", architectures=("gfx1100",), driver=None,
                   devices=(radeon,), bus=0)  # fmt: skip
    assert findings(rocm) == []
    (old,) = findings(replace(rocm, torch="2.9.0+rocm6.4"))
    assert "ROCm" in old.remedy
    assert "whl/cu" not in old.remedy
    (beside,) = findings(replace(rocm, devices=(RTX_5090,), driver="580.95.05", bus=1, usable=False))
    assert beside.message.endswith("as torch 2.11.0+rocm6.4 was built for AMD's cards (ROCm 6.4.0)")
    assert beside.remedy.endswith("whl/cu130")


def test_a_card_that_no_torch_runs_on() -> None:
    (finding,) = findings(replace(CU126_TORCH, devices=(replace(V100, name="Tesla K80", capability=(3, 7)),)))
    assert finding.kind == "kernels"
    assert "--device cpu" in finding.remedy


@pytest.mark.parametrize(
    ("driver", "remedy"),
    [
        ("580.95.05", url("cu130")),
        ("550.54.14", url("cu128")),
        ("470.256.02", f"install NVIDIA driver 580 or newer (this is 470.256.02), then: pip install "
                       f'--force-reinstall "torch>=2.10" --index-url {url("cu130")}'),
    ],
)  # fmt: skip
def test_torch_without_cuda_beside_a_card(driver: str, remedy: str) -> None:
    (finding,) = findings(replace(WITHOUT_GPU, devices=(H200,), driver=driver))
    assert finding.kind == "without CUDA"
    assert "NVIDIA H200 (sm_90)" in finding.message
    assert finding.remedy.endswith(remedy)


@pytest.mark.parametrize(
    ("torch_version", "cuda", "driver", "least", "index"),
    [
        ("2.11.0+cu130", "13.0", "570.124.06", "580", "cu128"),
        ("2.11.0+cu130", "13.0", "535.183.01", "580", "cu128"),
        ("2.11.0+cu126", "12.6", "520.61.05", "525", None),
    ],
)
def test_a_driver_too_old(torch_version: str, cuda: str, driver: str, least: str, index: str | None) -> None:
    words = "The NVIDIA driver on your system is too old"
    found = replace(HEALTHY, torch=torch_version, cuda=cuda, driver=driver, devices=(H200,), usable=False,
                    complaints=(words,))  # fmt: skip
    (finding,) = findings(found)
    assert finding.kind == "driver"
    assert f"needs NVIDIA driver {least} or newer; this is {driver}" in finding.message
    assert finding.remedy.startswith(f"install driver {least} or newer")
    assert ("whl/" in finding.remedy) == (index is not None)
    assert finding.remedy.endswith(url(index) if index is not None else "newer")


def test_a_card_whose_driver_does_not_answer() -> None:
    (finding,) = findings(replace(WITHOUT_GPU, bus=1))
    assert finding.kind == "driver"
    assert "--gpus all" in finding.remedy


@pytest.mark.parametrize(
    ("visible", "kind"),
    [
        ("", "hidden"), ("-1", "hidden"), ("3", "hidden"), ("1,0", "hidden"), ("GPU-5f2c", "hidden"),
        ("cuda:0", "hidden"), ("0", "unusable"), (None, "unusable"),
    ],
)  # fmt: skip
def test_a_card_that_torch_does_not_see(visible: str | None, kind: str) -> None:
    (finding,) = findings(replace(HEALTHY, usable=False, visible=visible, complaints=("CUDA unknown error",)))
    assert finding.kind == kind
    assert ("CUDA unknown error" in finding.message) == (kind == "unusable")


def test_old_versions() -> None:
    python, old = findings(replace(HEALTHY, python=(3, 10, 12), torch="2.9.1+cu128"))
    assert (python.kind, old.kind) == ("python", "torch")
    assert "3.10.12 is older than 3.11" in python.message
    assert "2.9.1+cu128 is older than 2.10" in old.message
    assert old.remedy.endswith(url("cu130"))
    (old,) = findings(replace(WITHOUT_GPU, torch="2.4.1"))
    assert old.remedy.endswith(url("cpu"))


def test_the_oldest_versions_are_those_that_can_be_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={dotted(doctor.PYTHON)}"
    assert f"torch>={dotted(TORCH)}" in project["dependencies"]


def test_torch_that_cannot_be_imported() -> None:
    (finding,) = findings(Found((3, 12, 4), "Linux", None, torch_error="libcudnn.so.9: cannot open", devices=(H200,)))
    assert finding.kind == "torch"
    assert "libcudnn.so.9: cannot open" in finding.message
    assert finding.remedy.endswith(url("cu130"))


NEED = Need("sdxl", 1024, "float16", weights=7 * GB, step=2 * GB, decode=4 * GB, strips=1 * GB, visiting=6 * GB)


@pytest.mark.parametrize(
    ("free", "offload", "expected"),
    [
        (11 * GB, False, "as a whole"),
        (11 * GB - 1, False, "in parts"),
        (8 * GB, False, "in parts"),
        (8 * GB - 1, False, None),
        (8 * GB - 1, True, "with offload"),
        (6 * GB, True, "with offload"),
        (6 * GB - 1, True, None),
    ],
)
def test_fit(free: int, offload: bool, expected: Fit | None) -> None:
    assert doctor.fit(NEED, free, offload=offload) == expected


def test_memory_that_does_not_do() -> None:
    small = replace(HEALTHY, devices=(replace(RTX_5090, total=6 * GB, free=5 * GB),), needs=(NEED,))
    (finding,) = findings(small)
    assert finding.kind == "memory"
    assert "sdxl does not fit: it needs 6.0 GB in float16 with offload, and 5.0 GB are free" in finding.message
    assert finding.remedy == "end what uses the other 1.0 GB"
    (finding,) = findings(replace(small, devices=(replace(RTX_5090, total=5 * GB, free=5 * GB),)))
    assert finding.remedy == "use a smaller model"
    assert findings(replace(small, devices=(replace(RTX_5090, free=6 * GB),))) == []
    assert findings(replace(small, devices=(replace(RTX_5090, free=None),))) == []


def test_memory_of_a_machine_without_a_card() -> None:
    """One dtype that fits is enough, and offload is no help."""
    needs = (replace(NEED, dtype="float32", weights=14 * GB, visiting=1 * GB), NEED)
    assert findings(replace(WITHOUT_GPU, needs=needs, free=8 * GB)) == []
    (finding,) = findings(replace(WITHOUT_GPU, needs=needs, free=7 * GB, total=7 * GB))
    assert "7.0 GB in float16, and 7.0 GB are free in main memory" in finding.message


def test_what_the_families_need() -> None:
    """The weights are those of the published files: UNet, VAE and text encoders, SDXL's VAE in float32."""
    unet, vae, clip_l, bigg = 2_567_463_684, 83_653_863, 123_060_480, 694_659_840
    sdxl = machine.estimate("sdxl", machine.FAMILIES["sdxl"], "float16")
    assert sdxl.weights == 2 * (unet + clip_l + bigg) + 4 * vae
    sd15 = machine.estimate("sd15", machine.FAMILIES["sd15"], "float32")
    assert sd15.weights == 4 * (859_520_964 + vae + clip_l)
    assert sdxl.visiting < sdxl.parts < sdxl.whole
    assert 2 * unet < sdxl.visiting < 2 * unet + GB


def test_engines() -> None:
    assert [doctor.tensorrt_engine(c) for c in ((12, 0), (12, 1), (8, 9), (7, 5))] == ["tensorrt-rtx"] * 4
    assert [doctor.tensorrt_engine(c) for c in ((9, 0), (10, 0))] == ["tensorrt"] * 2
    assert doctor.tensorrt_engine((7, 0)) is None


def test_report() -> None:
    report = doctor.Report(CU126_TORCH, tuple(findings(CU126_TORCH)))
    text = report.to_text()
    assert "torch has no kernels for it, engines by tensorrt-rtx" in text
    assert text.endswith(url("cu130"))
    data = json.loads(report.to_json())
    assert data["ok"] is False
    assert data["found"]["devices"][0]["capability"] == [12, 0]
    assert data["findings"][0]["kind"] == "kernels"
    healthy = doctor.Report(replace(HEALTHY, needs=(NEED,)), ())
    assert json.loads(healthy.to_json())["ok"] is True
    assert "1024x1024 in float16: about 11.0 GB, 7.0 GB of it weights: fits" in healthy.to_text()
    ptx = replace(HEALTHY, architectures=("compute_90",))
    assert "compiled at the first use" in doctor.Report(ptx, ()).to_text()


# --- looking at a machine ----------------------------------------------------------------------------------------

SMI = """NVIDIA GeForce RTX 5090, 12.0, 32607, 31500, 580.95.05, GPU-5f2c
NVIDIA GB10, 12.1, [N/A], [N/A], 580.95.05, GPU-77aa
Some, card, [N/A], 100, 50, 580.95.05, GPU-0123
"""


def test_parse_smi() -> None:
    driver, devices = machine.parse_smi(SMI)
    assert driver == "580.95.05"
    assert devices == (
        Device("NVIDIA GeForce RTX 5090", (12, 0), 32607 << 20, 31500 << 20),
        Device("NVIDIA GB10", (12, 1), None, None),
        Device("Some, card", None, 100 << 20, 50 << 20),
    )
    assert machine.parse_smi("No devices were found\n") == (None, ())


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(machine, "OPTIONAL", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = machine.probe()
    assert found.driver == "580.95.05"
    assert [device.name for device in found.devices][:2] == ["NVIDIA GeForce RTX 5090", "NVIDIA GB10"]


def fake_cuda(**functions: Any) -> SimpleNamespace:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    defaults = {
        "is_available": lambda: True, "device_count": lambda: 1, "get_device_properties": lambda index: properties,
        "mem_get_info": lambda index: (3, 5),
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **functions})


def test_torch_devices() -> None:
    assert machine._torch_devices(fake_cuda()) == (True, (Device("NVIDIA H200", (9, 0), 5, 3),), ())

    def too_old() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old.\nMore", stacklevel=1)
        return False

    words = "CUDA initialization: The NVIDIA driver on your system is too old"
    assert machine._torch_devices(fake_cuda(is_available=too_old)) == (False, (), (words,))

    def busy(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nhint")

    words = "card 0: CUDA error: all CUDA-capable devices are busy or unavailable"
    assert machine._torch_devices(fake_cuda(mem_get_info=busy)) == (
        True, (Device("NVIDIA H200", (9, 0), None, None),), (words,)
    )  # fmt: skip


def test_memory_is_asked_of_nvidia_smi_and_a_card_that_fails_hides_no_other() -> None:
    """By the cards' UUIDs, as torch may have another order; no context is made on any."""
    _, smi = machine.parse_smi(SMI)

    def properties(index: int) -> SimpleNamespace:
        if index == 1:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        return SimpleNamespace(name=f"card {index}", major=12, minor=0, uuid={0: "0123", 2: "5f2c"}[index])

    def context(index: int) -> tuple[int, int]:
        raise AssertionError("a context was made")

    cuda = fake_cuda(device_count=lambda: 3, get_device_properties=properties, mem_get_info=context)
    assert machine._torch_devices(cuda, smi) == (
        True, (Device("card 0", (12, 0), 100 << 20, 50 << 20), Device("card 2", (12, 0), 32607 << 20, 31500 << 20)),
        ("card 1: CUDA error: uncorrectable ECC error encountered",),
    )  # fmt: skip


def test_probe_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_backend.py").write_text("raise OSError('libbroken.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine, "OPTIONAL", {
        "scipy": ("scipy", "scipy", "schedules"),
        "absent": ("absent_backend", "absent-backend", "nothing"),
        "broken": ("broken_backend", "broken-backend", "nothing"),
    })  # fmt: skip
    found = machine.probe()
    assert found.python == tuple(sys.version_info[:3])
    assert found.torch == torch.__version__
    assert {need.family for need in found.needs} == {"sd15", "sd21", "sdxl"}
    scipy, absent, broken = found.backends
    assert scipy.version is not None
    assert absent.missing == "not installed"
    assert absent.install == "pip install absent-backend"
    assert broken.missing == "its import fails: libbroken.so.1: cannot open shared object file"
    assert broken.version is None


def test_backends_are_installed_by_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["torch>=2.10", 'torchsde; extra == "samplers"', "tensorrt_rtx>=1.2; extra == 'engines'", 
                'onnx; extra == "test"']  # fmt: skip
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda name: required)
    assert machine._install_line("torchsde") == 'pip install ".[samplers]"'
    assert machine._install_line("tensorrt-rtx") == 'pip install ".[engines]"'
    assert machine._install_line("onnx") == "pip install onnx"


def test_without_torch_the_doctor_still_speaks() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from nativesd.machine import doctor, probe; probe.OPTIONAL = {}\n"
        "report = doctor.examine(); print(report.findings[0].kind, '|', report.findings[0].message)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("torch | torch cannot be imported: import of torch halted"), done.stderr
