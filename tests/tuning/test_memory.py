"""Too little memory, and allocators without snapshots: made up, as no GPU is needed to say the sentence."""

from __future__ import annotations

import pytest
import torch

import nativesd
from nativesd.errors import NoMemoryError, UsageError
from nativesd.loading.placement import find_device
from nativesd.tuning.memory import free_bytes, memory_explained

OUT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB of which 1 GiB is free."


def test_an_allocator_without_snapshots_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.memory_snapshot raises with cudaMallocAsync (PYTORCH_ALLOC_CONF=backend:cudaMallocAsync)."""
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_bytes(torch.device("cuda:0")) == 37


def test_what_would_help_is_said() -> None:
    with (
        pytest.raises(NoMemoryError, match=r"^the GPU's memory does not do \(CUDA out of memory\. Tried to allocate 2"),
        memory_explained(),
    ):
        raise torch.OutOfMemoryError(OUT)
    with pytest.raises(NoMemoryError, match="main memory does not do: make smaller pictures"), memory_explained():
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="something else"), memory_explained():
        raise RuntimeError("something else")


def test_pictures_and_loads_end_in_that_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = nativesd.load("tiny", device="cpu")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(OUT)

    pipe.vae.register_forward_pre_hook(full)
    monkeypatch.setattr(type(pipe.vae), "decode", full)
    with pytest.raises(NoMemoryError, match="offload=True"):
        pipe("a fox", steps=1)
    with pytest.raises(NoMemoryError, match="offload=True"):  # in a loop of one's own
        pipe.decode_tensor(torch.zeros(1, 4, 16, 16))
    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(NoMemoryError, match="end what else uses the card"):
        nativesd.load("tiny", device="cpu")


def test_a_torch_without_kernels_for_the_card_is_said_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor's sentence and remedy, at the first launch; what is wrong otherwise is torch's own first line."""

    def launch(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nhints")

    monkeypatch.setattr(torch, "ones", launch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 5090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(UsageError) as refusal:
        find_device("cuda")
    sentence = str(refusal.value)
    assert "has no kernels for NVIDIA GeForce RTX 5090 (sm_120), only for sm_80 sm_90" in sentence
    assert sentence.endswith("https://download.pytorch.org/whl/cu130")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_120"])
    with pytest.raises(UsageError, match=r"^device .cuda. cannot be used: CUDA error: no kernel"):
        find_device("cuda")
