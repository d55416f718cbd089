"""Converting keeps what loading decides by: prediction, zero SNR, continuous sigmas; what cannot be said is listed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nativesd
from nativesd.checkpoints.convert import convert
from nativesd.errors import NativesdWarning
from nativesd.sampling.published import SchedulerConfig
from nativesd.shipped import TINY

MARKED = {
    "v": ({"prediction_type": "v_prediction"}, {"v_pred"}),
    "zero SNR": (
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"v_pred", "ztsnr"},
    ),
    "EDM v": (
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_max": 110.0, "sigma_min": 0.004,
         "sigma_data": 1.0, "sigma_schedule": "exponential"},
        {"edm_vpred.sigma_max", "edm_vpred.sigma_min"},
    ),
    "epsilon": ({"prediction_type": "epsilon"}, set()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*no published form", "ignore:.*will not say")
@pytest.mark.parametrize("case", MARKED)
def test_what_a_folder_says_of_its_sampling_is_kept(case: str, tmp_path: Path) -> None:
    """From a folder to a single file and back: loading decides the same, and the picture is the same."""
    said, names = MARKED[case]
    folder = tmp_path / "folder"
    shutil.copytree(TINY, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text()) | said
    if "EDM" in case:
        scheduler = dict(said)
    file.write_text(json.dumps(scheduler))
    convert(folder, tmp_path / "single.safetensors", layout="ldm")
    tensors = load_file(tmp_path / "single.safetensors")
    markers = {"v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std"}
    assert set(tensors) & markers == names
    convert(tmp_path / "single.safetensors", tmp_path / "again", layout="diffusers")
    kept = [
        nativesd.load(source, device="cpu").config.scheduler for source in (folder, tmp_path / "single.safetensors")
    ]
    again = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    for other in (kept[1], SchedulerConfig.from_published(again)):
        for field in ("prediction", "zero_snr", "edm"):
            assert getattr(other, field) == getattr(kept[0], field), field
    with safe_open(tmp_path / "single.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.predict_key"] == kept[0].prediction


@pytest.mark.filterwarnings("ignore:.*no published form")
def test_what_a_single_file_cannot_say_is_listed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(TINY, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02, "use_karras_sigmas": True}))
    with pytest.warns(NativesdWarning) as caught:
        convert(folder, tmp_path / "single.safetensors", layout="ldm")
    said = " ".join(str(warning.message) for warning in caught)
    assert "will not say the scheduler's beta_end = 0.02" in said
    assert "kind = 'karras'" in said
    single = tmp_path / "a_lightning_4step.safetensors"
    (tmp_path / "single.safetensors").rename(single)
    with pytest.warns(NativesdWarning, match="model of 4 steps"):
        convert(single, tmp_path / "plain", layout="diffusers")


@pytest.mark.filterwarnings("ignore:.*no published form", "ignore:.*will not say")
def test_metadata_of_the_source_is_kept(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "one.safetensors", layout="ldm")
    tensors = load_file(tmp_path / "one.safetensors")
    save_file(tensors, tmp_path / "two.safetensors", {"modelspec.title": "Mine", "modelspec.predict_key": "v"})
    convert(tmp_path / "two.safetensors", tmp_path / "folder", layout="diffusers")
    scheduler = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    convert(tmp_path / "folder", tmp_path / "three.safetensors", layout="ldm")
    with safe_open(tmp_path / "three.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["modelspec.title"], metadata["modelspec.predict_key"]) == ("Mine", "v")
