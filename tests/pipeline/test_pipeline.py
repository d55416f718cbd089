"""Whole pictures against the diffusers pipelines: same weights, prompt, noise, scheduler and 20 steps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import nativesd
from nativesd.errors import UsageError
from nativesd.latents.preview import Step
from nativesd.sampling import noise
from nativesd.sampling.names import Choice, find_sampler
from nativesd.sampling.table import SAMPLERS
from nativesd.text.tokenizer import DEFAULT

TOLERANCE = 2e-3  # of full scale, before rounding to bytes
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULERS = {
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False, "steps_offset": 1}),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    "Euler": (diffusers.EulerDiscreteScheduler, {"steps_offset": 1}),
    "Euler a": (diffusers.EulerAncestralDiscreteScheduler, {"steps_offset": 1}),
    "DPM++ 2M": (diffusers.DPMSolverMultistepScheduler, {"steps_offset": 1}),
    "DPM++ 2M Karras": (diffusers.DPMSolverMultistepScheduler, {"steps_offset": 1, "use_karras_sigmas": True}),
    # Karras sigmas that somebody asks for span the trained range, whatever spacing the model has of its own
    "Euler Karras": (
        diffusers.EulerDiscreteScheduler,
        {"steps_offset": 1, "use_karras_sigmas": True, "timestep_spacing": "linspace"},
    ),
}
FORMS = ("sd15", "sd21-base", "sd21-v", "sdxl")


def text_encoder(width: int, *, act: str, layers: int, projection: int | None = None) -> torch.nn.Module:
    cls = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    return cls(
        transformers.CLIPTextConfig(
            hidden_size=width, intermediate_size=2 * width, num_attention_heads=2, num_hidden_layers=layers,
            hidden_act=act, vocab_size=49408, projection_dim=projection or width, eos_token_id=2, bos_token_id=0,
            pad_token_id=1,
        )
    )  # fmt: skip


def save_model(form: str, folder: Path) -> None:
    """A small random model of one published form, saved by diffusers."""
    torch.manual_seed(0)
    sdxl = form == "sdxl"
    text = text_encoder(32, act="gelu" if form.startswith("sd21") else "quick_gelu", layers=3)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=8, norm_num_groups=16,
        down_block_types=("DownBlock2D" if sdxl else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D" if sdxl else "CrossAttnUpBlock2D"),
        attention_head_dim=8 if form == "sd15" else (2, 4), cross_attention_dim=80 if sdxl else 32,
        use_linear_projection=form != "sd15", transformer_layers_per_block=(1, 2) if sdxl else 1,
        **(
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 16,
             "projection_class_embeddings_input_dim": 24 + 6 * 16}
            if sdxl else {}
        ),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 16, 32), layers_per_block=1, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if sdxl else 0.18215,
    )  # fmt: skip
    pads = {"!": 0, "<|endoftext|>": 49407}

    def tokenizer(pad: str) -> transformers.CLIPTokenizer:
        found = transformers.CLIPTokenizer.from_pretrained(DEFAULT, pad_token=pad)
        assert found.pad_token_id == pads[pad]
        return found

    prediction = "v_prediction" if form == "sd21-v" else "epsilon"
    cls, options = (
        (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1})
        if sdxl
        else (SCHEDULERS["DDIM" if form == "sd21-v" else "PNDM"])
    )
    ends = {} if sdxl else {"set_alpha_to_one": False}
    scheduler = cls(**BETAS, **options, **ends, prediction_type=prediction)
    common = {"unet": unet, "vae": vae, "scheduler": scheduler, "text_encoder": text}
    pad = "!" if form.startswith("sd21") else "<|endoftext|>"
    if sdxl:
        pipe = diffusers.StableDiffusionXLPipeline(
            **common, tokenizer=tokenizer(pad), tokenizer_2=tokenizer("!"),
            text_encoder_2=text_encoder(48, act="gelu", layers=4, projection=24), force_zeros_for_empty_prompt=True,
        )  # fmt: skip
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **common, tokenizer=tokenizer(pad), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipe.save_pretrained(folder)


@pytest.fixture(scope="session", params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("models") / request.param
    save_model(request.param, folder)
    return request.param, folder


@pytest.fixture(scope="session")
def pipelines(model: tuple[str, Path]) -> tuple[str, nativesd.Pipeline, diffusers.DiffusionPipeline]:
    form, folder = model
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return form, nativesd.load(folder, device="cpu"), theirs


def their_picture(
    pipe: diffusers.DiffusionPipeline, prompt: str, guidance: float, seed: int, **options: int
) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        out = pipe(
            prompt, num_inference_steps=20, guidance_scale=guidance, generator=generator, output_type="np", **options
        )
    return out.images[0]


def our_picture(pipe: nativesd.Pipeline, prompt: str, guidance: float, seed: int, **options: object) -> np.ndarray:
    result = pipe(prompt, steps=20, guidance_scale=guidance, seed=seed, **options)
    return pipe.decode_tensor(result.latents)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("sampler", [None, *SCHEDULERS])
def test_whole_pictures(
    pipelines: tuple[str, nativesd.Pipeline, diffusers.DiffusionPipeline], sampler: str | None
) -> None:
    form, ours, theirs = pipelines
    own = theirs.scheduler
    try:
        if sampler is not None:
            cls, options = SCHEDULERS[sampler]
            theirs.scheduler = cls.from_config(own.config, **options)
        for guidance, size in ((7.5, {}), (1.0, {}), (4.0, {"width": 72, "height": 40})):
            expected = their_picture(theirs, "a red cat, sitting", guidance, 7, **size)
            found = our_picture(ours, "a red cat, sitting", guidance, 7, sampler=sampler, **size)
            assert expected.shape == found.shape
            assert expected.std() > 0.01, "a flat picture would prove nothing"
            assert np.abs(expected - found).max() <= TOLERANCE, f"{form} {sampler} guidance {guidance}"
    finally:
        theirs.scheduler = own


def test_negative_prompt(pipelines: tuple[str, nativesd.Pipeline, diffusers.DiffusionPipeline]) -> None:
    _, ours, theirs = pipelines
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        expected = theirs("a boat", negative_prompt="fog", num_inference_steps=20, guidance_scale=6.0,
                          generator=generator, output_type="np").images[0]  # fmt: skip
    found = our_picture(ours, "a boat", 6.0, 3, negative_prompt="fog")
    without = our_picture(ours, "a boat", 6.0, 3)
    assert np.abs(expected - found).max() <= TOLERANCE
    assert np.abs(expected - without).max() > TOLERANCE


@pytest.mark.parametrize("model", ["sdxl"], indirect=True)
def test_what_sdxl_is_told(
    pipelines: tuple[str, nativesd.Pipeline, diffusers.DiffusionPipeline], tmp_path: Path
) -> None:
    """The second encoder's prompts and the sizes, which diffusers takes as (height, width) and (top, left)."""
    _, ours, theirs = pipelines
    told = {
        "prompt_2": "a red cat" + ", sitting on a mat" * 3, "negative_prompt": "fog", "negative_prompt_2": "rain",
        "original_size": (40, 56), "crops_coords_top_left": (3, 5), "target_size": (64, 72),
        "negative_original_size": (32, 48), "negative_crops_coords_top_left": (1, 2), "negative_target_size": (80, 96),
    }  # fmt: skip
    sdxl = nativesd.SDXL(
        prompt_2=str(told["prompt_2"]), negative_prompt_2="rain", original=(56, 40), crop=(5, 3), target=(72, 64),
        negative_original=(48, 32), negative_crop=(2, 1), negative_target=(96, 80),
    )  # fmt: skip
    expected = their_picture(theirs, "a boat", 6.0, 3, **told)  # type: ignore[arg-type]
    options = {"negative_prompt": "fog", "steps": 20, "guidance_scale": 6.0, "seed": 3}
    result = ours("a boat", **options, sdxl=sdxl)
    assert np.abs(expected - ours.decode_tensor(result.latents)[0].permute(1, 2, 0).numpy()).max() <= TOLERANCE
    [path] = result.save(tmp_path / "x.png")
    again, unheeded = nativesd.options_from(path)
    assert (again["sdxl"], unheeded) == (sdxl, [])
    for changed in (nativesd.SDXL(prompt_2="x"), nativesd.SDXL(crop=(9, 0)), nativesd.SDXL(target=(9, 9))):
        assert (ours("a boat", **options, sdxl=changed).latents - result.latents).abs().max() > TOLERANCE
    longer = nativesd.SDXL(prompt_2="a boat, " * 60)
    assert ours("a boat", steps=1, seed=1, sdxl=longer).latents.isfinite().all()


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
def test_sdxls_options_need_sdxl(pipelines: tuple[str, nativesd.Pipeline, diffusers.DiffusionPipeline]) -> None:
    with pytest.raises(nativesd.NativesdError, match=r"sdxl is for SDXL's UNets, and .* has none: leave it out"):
        pipelines[1]("a boat", sdxl=nativesd.SDXL(crop=(9, 0)))
    for value, message in (
        (nativesd.SDXL(crop=(1, -1)), "sdxl.crop must be at least 0, not -1"),
        (nativesd.SDXL(original=(1,)), "sdxl.original must be a width and a height in pixels"),  # type: ignore[arg-type]
        (nativesd.SDXL(aesthetic_score=11), "sdxl.aesthetic_score must be between 0 and 10, not 11"),
        ("x", "sdxl must be an SDXL, not 'x'"),
    ):
        with pytest.raises(nativesd.NativesdError, match=re.escape(message)):
            pipelines[1]("a boat", sdxl=value)


def test_prediction_override(model: tuple[str, Path]) -> None:
    _, folder = model
    stated = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
    assert nativesd.load(folder, device="cpu").config.prediction == {"epsilon": "epsilon", "v_prediction": "v"}[stated]
    assert nativesd.load(folder, device="cpu", prediction="sample").config.prediction == "sample"


def test_turbo(model: tuple[str, Path], tmp_path: Path) -> None:
    """Trailing spacing on an Euler scheduler: four steps and no guidance are the default, one step works."""
    form, folder = model
    if form != "sd21-base":
        pytest.skip("one form is enough")
    turbo = tmp_path / "turbo"
    shutil.copytree(folder, turbo)
    cls = diffusers.EulerAncestralDiscreteScheduler
    cls(**BETAS, timestep_spacing="trailing").save_pretrained(turbo / "scheduler")
    index = json.loads((turbo / "model_index.json").read_text())
    (turbo / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", cls.__name__]}))
    theirs = diffusers.DiffusionPipeline.from_pretrained(turbo)
    theirs.set_progress_bar_config(disable=True)
    ours = nativesd.load(turbo, device="cpu")
    for steps in (None, 1):
        generator = torch.Generator().manual_seed(2)
        with torch.inference_mode():
            expected = theirs("a bridge", num_inference_steps=steps or 4, guidance_scale=0.0, generator=generator,
                              output_type="np").images[0]  # fmt: skip
        result = ours("a bridge", steps=steps, seed=2)
        found = ours.decode_tensor(result.latents)[0].permute(1, 2, 0).numpy()
        assert np.abs(expected - found).max() <= TOLERANCE


def test_on_step(pipelines: tuple[str, nativesd.Pipeline, diffusers.DiffusionPipeline]) -> None:
    _, ours, _ = pipelines
    for sampler in ("DDIM", "PLMS", "Euler a", "DPM++ 2M"):
        steps: list[Step] = []
        ours("a bridge", steps=5, sampler=sampler, on_step=steps.append)
        assert [(step.index, step.total) for step in steps] == [(i, 5) for i in range(5)]
        assert all(a.sigma > b.sigma for a, b in pairwise(steps))
        assert steps[0].latents.shape == steps[0].denoised.shape == (1, 4, 8, 8)


class AllStepsTakenError(Exception):
    """What comes after the steps needs no watching."""


class Crossings(TorchFunctionMode):
    """What makes CUDA's queue wait for the host, or the host for it, where "meta" stands for the device.

    Values that are asked for raise by themselves there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        made = func in (torch.tensor, torch.as_tensor)
        copied = any(tensor.device.type == "cpu" and tensor.ndim > 0 for tensor in given)
        if isinstance(out, torch.Tensor) and out.device.type == "meta" and (made or copied):
            self.calls.append(str(func))
        return out


ADAPTIVE = "DPM adaptive"
"""The one sampler that has to wait: the error that it measured decides how far it goes next."""


def test_only_an_adaptive_sampler_asks_for_values() -> None:
    pipe = nativesd.load("tiny", device="meta")
    with pytest.raises(RuntimeError, match="meta tensors"):
        pipe("a red apple", sampler=ADAPTIVE)


@pytest.mark.parametrize(
    "options", [{}, {"control": True}, {"control": True, "guess_mode": True}, {"guidance_scale": 1.0}], ids=str
)
@pytest.mark.parametrize("name", [sampler.name for sampler in SAMPLERS if sampler.name != ADAPTIVE])
def test_no_step_waits_for_the_device(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = nativesd.load("tiny", device="meta")
    crossings = Crossings()

    def find(*given: Any) -> Choice:
        choice = find_sampler(*given)

        def run(*given: Any) -> torch.Tensor:
            with crossings:
                choice.sampler.run(*given)
            raise AllStepsTakenError

        return replace(choice, sampler=replace(choice.sampler, run=run))

    monkeypatch.setattr(nativesd.pipeline.asked.chosen, "find_sampler", find)
    for module in (nativesd.diffusion.model, noise):
        monkeypatch.setattr(module, "move_noise", lambda noise, device: torch.empty(noise.shape, device=device))
    if options.get("control"):
        options = options | {"control": [nativesd.Control("tiny", Image.new("RGB", (64, 64)))]}
    with pytest.raises(AllStepsTakenError):
        pipe("a red apple", sampler=name, steps=5, **options)
    assert crossings.calls == []


def scheduled(folder: Path, **fields: Any) -> Path:
    """An SD1.5 model whose scheduler_config.json has these fields, too."""
    save_model("sd15", folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "DPMSolverMultistepScheduler", "thresholding": True},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "rk"},
        {"_class_name": "SomethingNewScheduler"},
        {"skip_prk_steps": False},
        {"timestep_spacing": "cosine"},
    ],
    ids=str,
)
def test_what_a_sampler_overrides_does_not_stop_the_load(tmp_path: Path, fields: dict[str, Any]) -> None:
    pipe = nativesd.load(scheduled(tmp_path / "model", **fields), device="cpu")
    name = next(iter(fields.keys() - {"_class_name"}), "SomethingNewScheduler")
    with pytest.raises(UsageError, match=f"{name}.*pass (another )?sampler="):
        pipe("a cat", steps=2, seed=1)
    assert pipe("a cat", steps=2, seed=1, sampler="Euler").parameters["sampler"] == "Euler"


def test_epsilon_with_zero_snr_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="zero terminal SNR of a model that predicts epsilon"):
        pipe = nativesd.load(scheduled(tmp_path / "model", rescale_betas_zero_snr=True), device="cpu")
    assert "zero_snr" in pipe.config.inferred
