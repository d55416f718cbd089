"""Converting keeps what loading decides by: prediction, zero SNR, continuous sigmas; what cannot be said is listed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert import single as family_file
from torch import Tensor

import nativesd
from nativesd.checkpoints.convert import convert
from nativesd.errors import NativesdWarning, SourceError
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


def round_trip(single: Path, tmp_path: Path) -> tuple[list[nativesd.Pipeline], dict[str, Tensor]]:
    """A single file to a folder and back: the pipelines of all three, and the tensors of the last."""
    convert(single, tmp_path / "folder", layout="diffusers")
    convert(tmp_path / "folder", tmp_path / "again.safetensors", layout="ldm")
    paths = (single, tmp_path / "folder", tmp_path / "again.safetensors")
    return [nativesd.load(path, device="cpu") for path in paths], load_file(tmp_path / "again.safetensors")


@pytest.mark.filterwarnings("ignore:.*no published form", "ignore:.*will not say")
def test_playgrounds_markers_there_and_back(tmp_path: Path) -> None:
    """Its continuous sigmas, and its latents' mean and deviation: the file's own numbers, not only the published."""
    mean, std = [-1.5, 1.25, -0.5, 2.0], [8.0, 6.5, 5.25, 4.0]
    path = family_file("sdxl", tmp_path / "playground.safetensors")
    marked = {"edm_mean": torch.tensor(mean).reshape(1, 4, 1, 1), "edm_std": torch.tensor(std).reshape(1, 4, 1, 1)}
    save_file({**load_file(path), **marked}, path)
    pipes, tensors = round_trip(path, tmp_path)
    for pipe in pipes:
        assert pipe.config.scheduler.edm == pipes[0].config.scheduler.edm is not None
        assert pipe.config.prediction == "epsilon"
        assert (list(pipe.config.vae.mean), list(pipe.config.vae.std)) == (mean, std)
        assert pipe.config.vae.scaling == 0.5
    assert tensors["edm_mean"].tolist() == mean
    assert tensors["edm_std"].tolist() == std
    first, *others = (pipe("a fox", steps=2, seed=1, width=64, height=64).latents for pipe in pipes)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.filterwarnings("ignore:.*no published form", "ignore:.*will not say")
def test_sd_turbos_markers_there_and_back(tmp_path: Path) -> None:
    """sgm's layout with `denoiser.sigmas`: Euler a, trailing, and what it predicts is known to be epsilon."""
    path = family_file("sd2", tmp_path / "model.safetensors")
    renamed = {
        key.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): tensor
        for key, tensor in load_file(path).items()
    }
    save_file({**renamed, "denoiser.sigmas": torch.linspace(0.03, 14.6, 1000)}, path)
    pipes, tensors = round_trip(path, tmp_path)
    for pipe in pipes:
        scheduler = pipe.config.scheduler
        assert (scheduler.class_name, scheduler.spacing) == ("EulerAncestralDiscreteScheduler", "trailing")
        assert scheduler.prediction == "epsilon"
        assert "prediction" not in pipe.config.inferred
    assert tensors["denoiser.sigmas"].shape == (1000,)
    assert float(tensors["denoiser.sigmas"].max()) == pytest.approx(14.6146, rel=1e-4)
    first, *others = (pipe("a fox", steps=1, seed=1, width=64, height=64).latents for pipe in pipes)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.filterwarnings("ignore:.*no published form")
def test_latents_that_cannot_be(tmp_path: Path) -> None:
    path = family_file("sdxl", tmp_path / "model.safetensors")
    save_file({**load_file(path), "edm_mean": torch.zeros(4), "edm_std": torch.zeros(3)}, path)
    with pytest.raises(SourceError, match=r"edm_std .*\[3\], not one number for each of the 4 latent channels"):
        nativesd.load(path, device="cpu")
