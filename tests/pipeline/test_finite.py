"""NaN and infinity never become a picture: the error names the component that gave them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import nativesd
from nativesd.cache import cache_folder
from nativesd.errors import NativesdError, SourceError
from nativesd.models.controlnet import ControlNet
from nativesd.tuning import tune

HALF = r"may overflow in float16; load the model with dtype=float32"
FULL = "its weights are broken; get the file again"
PROMPT = "a red house"


def tiny(dtype: str = "float32") -> nativesd.Pipeline:
    return nativesd.load("tiny", device="cpu", dtype=dtype, mapped=False)


@pytest.mark.parametrize(("dtype", "says"), [("float16", HALF), ("float32", FULL)])
@pytest.mark.parametrize(
    ("component", "name"), [("text_encoder", "the text encoder gives"), ("unet", "the UNet of tiny gives")]
)
def test_the_component_is_named(component: str, name: str, dtype: str, says: str) -> None:
    pipe = tiny(dtype)
    module = pipe.unet if component == "unet" else pipe.text_encoders[0]
    last = [p for p in module.parameters() if p.ndim > 1][-1]
    with torch.no_grad():
        last.fill_(6e4 if dtype == "float16" else torch.nan)
    with pytest.raises(NativesdError, match=rf"{name} numbers that are not finite: .*{says}"):
        pipe(PROMPT, steps=1, seed=1)


def test_a_controlnet_is_named_before_the_unet_that_it_spoils() -> None:
    pipe = tiny()
    assert pipe.load_control is not None
    control = pipe.load_control("tiny")
    assert isinstance(control.module, ControlNet)
    with torch.no_grad():
        control.module.control_mid.weight.fill_(torch.inf)
    with pytest.raises(NativesdError, match="the ControlNet tiny gives numbers that are not finite"):
        pipe(PROMPT, steps=2, seed=1, control=nativesd.Control(control, Image.new("RGB", (64, 64))))


def test_a_graph_in_a_modules_place_is_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As backends do it, whose graphs stand in for a module's forward."""
    pipe = tiny()
    plain = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: plain(*a, **k) * torch.nan)
    with pytest.raises(NativesdError, match="the UNet of tiny gives numbers that are not finite"):
        pipe(PROMPT, steps=1, seed=1)


@pytest.mark.parametrize("case", ["unset", "a file", "relative", "relative XDG", "read-only"])
def test_pictures_need_no_home(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what has to be kept, such as engines, does, and says where it wanted to."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / "file").touch()
    homes = {"a file": tmp_path / "file", "relative": "home", "read-only": "/proc", "relative XDG": tmp_path}
    if case == "unset":
        monkeypatch.setattr("nativesd.cache.Path.home", _no_home)
    else:
        monkeypatch.setenv("HOME", str(homes[case]))
    if case == "relative XDG":
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
        assert cache_folder() == tmp_path / ".cache" / "nativesd"
    tune.best_tuning.cache_clear()
    assert tiny()(PROMPT, steps=1, seed=1).images
    if case == "relative XDG":
        return
    with pytest.raises(SourceError, match=r"cannot be written: |there is no home folder to keep files in: set HOME"):
        nativesd.load("tiny", device="cpu", backend="onnx")
    tune.best_tuning.cache_clear()


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
