"""Pictures that begin from pictures, against the diffusers pipelines: same weights, noise and steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import nativesd
from nativesd.diffusion import loaded
from nativesd.diffusion.start import Start
from nativesd.errors import NoMemoryError, UsageError
from nativesd.pictures.masks import greys_to_latents
from nativesd.pipeline.asked.hires import UPSCALERS
from nativesd.sampling.names import find_sampler
from nativesd.sampling.published import Kind
from nativesd.tuning import memory
from nativesd.weights import model as weights_model
from pipeline.test_pipeline import BETAS, SCHEDULERS, TOLERANCE, save_model

SIDE = 64
SAMPLERS = ("DDIM", "Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras")


def photo(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Smooth colours with an edge in them."""
    y, x = np.mgrid[:height, :width] / (SIDE - 1)
    colours = np.stack([x, y, 0.5 + 0.5 * np.sin(6 * x + 3 * y)], axis=-1)
    colours[height // 3 : height // 2, width // 4 :] = (0.9, 0.2, 0.1)
    return Image.fromarray((colours * 255).round().clip(0, 255).astype(np.uint8))


def hole() -> Image.Image:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:48, 24:56] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models of every kind, as diffusers saves them; the VAE's posterior is narrow, as a trained one's."""
    root = tmp_path_factory.mktemp("modes")
    for form in ("sd15", "sdxl"):
        save_model(form, root / form)
    for name, channels in (("inpaint", 9), ("edit", 8)):
        shutil.copytree(root / "sd15", root / name)
        old = diffusers.UNet2DConditionModel.from_pretrained(root / "sd15" / "unet")
        torch.manual_seed(1)
        diffusers.UNet2DConditionModel.from_config(old.config, in_channels=channels).save_pretrained(
            root / name / "unet"
        )
    refiner = root / "refiner"
    shutil.copytree(root / "sdxl", refiner)
    for part in ("unet", "text_encoder", "tokenizer"):
        shutil.rmtree(refiner / part)
    old = diffusers.UNet2DConditionModel.from_pretrained(root / "sdxl" / "unet")
    torch.manual_seed(2)
    diffusers.UNet2DConditionModel.from_config(
        old.config, cross_attention_dim=48, projection_class_embeddings_input_dim=24 + 5 * 16
    ).save_pretrained(refiner / "unet")
    index = json.loads((refiner / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None],
              "tokenizer": [None, None], "requires_aesthetics_score": True,
              "force_zeros_for_empty_prompt": False}  # fmt: skip
    (refiner / "model_index.json").write_text(json.dumps(index))
    return {path.name: path for path in root.iterdir()}


def theirs(cls: Any, folder: Path, sampler: str | None = None) -> Any:
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if sampler is not None:
        scheduler, options = SCHEDULERS[sampler]
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    return pipe


def compare(ours: nativesd.Pipeline, result: nativesd.Result, expected: np.ndarray) -> None:
    found = ours.decode_tensor(result.latents).permute(0, 2, 3, 1).numpy()
    assert found.shape == expected.shape
    assert expected.std() > 0.01, "a flat picture would prove nothing"
    assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("form", "cls"), [
    ("sd15", diffusers.StableDiffusionImg2ImgPipeline), ("sdxl", diffusers.StableDiffusionXLImg2ImgPipeline),
])  # fmt: skip
def test_image_to_image(folders: dict[str, Path], form: str, cls: Any, sampler: str) -> None:
    oracle, ours = theirs(cls, folders[form], sampler), nativesd.load(folders[form], device="cpu")
    for strength in (0.3, 0.75, 1.0):
        generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
        expected = oracle(
            ["a red cat"] * 2, image=[photo()] * 2, strength=strength, num_inference_steps=20, guidance_scale=6.0,
            generator=generators, output_type="np",
        ).images  # fmt: skip
        result = ours(
            "a red cat", image=photo(), strength=strength, steps=20, guidance_scale=6.0, seed=5, num_images=2,
            sampler=sampler,
        )  # fmt: skip
        compare(ours, result, expected)
        assert result.images[0].size == (SIDE, SIDE)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("form", ["sd15", "inpaint"])
def test_inpainting(folders: dict[str, Path], form: str, sampler: str) -> None:
    """With a plain UNet the known part is put back at every step; an inpainting UNet is told it."""
    oracle = theirs(diffusers.StableDiffusionInpaintPipeline, folders[form], sampler)
    ours = nativesd.load(folders[form], device="cpu")
    for strength in (0.5, 0.9) if form == "sd15" else (0.5, 1.0):
        expected = oracle(
            "a red cat", image=photo(), mask_image=hole(), strength=strength, num_inference_steps=20, height=SIDE,
            width=SIDE, guidance_scale=6.0, generator=torch.Generator().manual_seed(5), output_type="np",
        ).images  # fmt: skip
        result = ours(
            "a red cat", image=photo(), mask=hole(), strength=strength, steps=20, guidance_scale=6.0, seed=5,
            mask_blur=0, sampler=sampler,
        )  # fmt: skip
        compare(ours, result, expected)
        outside = np.asarray(hole()) == 0
        assert (np.asarray(result.images[0])[outside] == np.asarray(photo())[outside]).all()


@pytest.mark.parametrize("image_guidance_scale", [1.5, 1.0])
def test_instruct_pix2pix(folders: dict[str, Path], image_guidance_scale: float) -> None:
    oracle = theirs(diffusers.StableDiffusionInstructPix2PixPipeline, folders["edit"], "Euler a")
    ours = nativesd.load(folders["edit"], device="cpu")
    expected = oracle(
        "make it red", image=photo(), num_inference_steps=20, guidance_scale=6.0, output_type="np",
        image_guidance_scale=image_guidance_scale, generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    result = ours(
        "make it red", image=photo(), steps=20, guidance_scale=6.0, image_guidance_scale=image_guidance_scale, seed=5,
        sampler="Euler a",
    )  # fmt: skip
    compare(ours, result, expected)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_refiner(folders: dict[str, Path], sampler: str) -> None:
    """Base to 70 % of the way, refiner from there on, on the base's own noise."""
    base = theirs(diffusers.StableDiffusionXLPipeline, folders["sdxl"], sampler)
    refiner = theirs(diffusers.StableDiffusionXLImg2ImgPipeline, folders["refiner"], sampler)
    options = {"num_inference_steps": 20, "guidance_scale": 6.0}
    latents = base(
        "a red cat", denoising_end=0.7, output_type="latent", generator=torch.Generator().manual_seed(5), **options
    ).images
    expected = refiner("a red cat", image=latents, denoising_start=0.7, output_type="np", **options).images
    ours = nativesd.load(folders["sdxl"], device="cpu")
    result = ours(
        "a red cat", steps=20, guidance_scale=6.0, seed=5, sampler=sampler, refiner_at=0.7,
        refiner=nativesd.load(folders["refiner"], device="cpu"),
    )  # fmt: skip
    compare(ours, result, expected)
    assert result.parameters["refiner"] == "refiner"


def test_hires(folders: dict[str, Path]) -> None:
    """All 20 steps of the second pass run, the last of int(20 / 0.6) = 33, on the enlarged latents, from the same seed.

    Of 33 steps diffusers runs int(33 * 0.607) = 20.
    """
    text2image = theirs(diffusers.StableDiffusionPipeline, folders["sd15"], "Euler")
    image2image = diffusers.StableDiffusionImg2ImgPipeline(**text2image.components)
    image2image.set_progress_bar_config(disable=True)
    first = text2image(
        "a cat", generator=torch.Generator().manual_seed(5), output_type="latent", num_inference_steps=20,
        guidance_scale=6.0,
    ).images  # fmt: skip
    larger = torch.nn.functional.interpolate(first, scale_factor=1.5, mode="bilinear")
    image2image.scheduler = SCHEDULERS["DPM++ 2M"][0].from_config(image2image.scheduler.config)
    expected = image2image(
        "a dog", image=larger, strength=0.607, generator=torch.Generator().manual_seed(5), output_type="np",
        negative_prompt="fog", num_inference_steps=33, guidance_scale=4.0,
    ).images  # fmt: skip
    ours = nativesd.load(folders["sd15"], device="cpu")
    steps: list[int] = []
    hires = nativesd.Hires(
        1.5, strength=0.6, sampler="DPM++ 2M", schedule="automatic", prompt="a dog", negative_prompt="fog",
        guidance_scale=4,
    )  # fmt: skip
    result = ours(
        "a cat", steps=20, guidance_scale=6.0, seed=5, sampler="Euler", hires=hires,
        on_step=lambda step: steps.append(step.index),
    )  # fmt: skip
    compare(ours, result, expected)
    assert steps == [*range(20), *range(20)]
    assert result.images[0].size == (96, 96)
    options, unheeded = nativesd.options_from(result.save(folders["sd15"].parent / "hires.png")[0])
    assert options["hires"] == hires_of(result)
    assert unheeded == []


def hires_of(result: nativesd.Result) -> nativesd.Hires:
    fields = dict(result.parameters["hires"])
    return nativesd.Hires(fields.pop("upscale"), **fields)


@pytest.mark.parametrize(
    ("strength", "steps", "total"), [(0.6, 20, 33), (0.7, 20, 28), (1.0, 20, 20), (0.3, 10, 33), (0.05, 4, 80)]
)
def test_hires_runs_every_step_at_any_strength(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, strength: float, steps: int, total: int
) -> None:
    assert Start(strength, steps_as="all").steps(steps) == (total, total - steps)
    ours = nativesd.load(folders["sd15"], device="cpu")
    seen: list[float] = []
    ours("a cat", steps=2, seed=5, guidance_scale=1, hires=nativesd.Hires(1, strength, steps), sampler="Euler",
         schedule="karras", on_step=lambda step: seen.append(step.sigma))  # fmt: skip
    plan = find_sampler("Euler").schedule(ours.config.scheduler, total, "karras")
    assert seen[2:] == plan.sigmas[-steps - 1 : -1].tolist()


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ({"schedule": "karras"}, {"sampler": "Heun"}, "karras"),
        ({"sampler": "Euler Karras"}, {"sampler": "Heun"}, "karras"),
        ({"sampler": "Euler Karras"}, {"schedule": "exponential"}, "exponential"),
        ({"schedule": "exponential"}, {"sampler": "Heun Karras"}, "karras"),
    ],
)
def test_the_second_pass_has_the_first_one_s_schedule_or_its_own(
    first: dict[str, Any], second: dict[str, Any], kind: Kind
) -> None:
    pipe, seen = nativesd.load("tiny", device="cpu"), list[float]()
    pipe("a fox", hires=nativesd.Hires(1, 1.0, **second), on_step=lambda step: seen.append(step.sigma),
         **{"steps": 3, "seed": 5, "guidance_scale": 1, "sampler": "Euler", **first})  # fmt: skip
    plan = find_sampler("Euler").schedule(pipe.config.scheduler, 3, kind)
    assert seen[3:] == plan.sigmas[:-1].tolist()


@pytest.mark.parametrize(
    ("hires", "size", "enlarged", "final"),
    [  # the numbers are those of A1111's `calculate_target_resolution`, worked out by hand
        ({"scale": 1.5}, (512, 768), (768, 1152, 0, 0), (768, 1152)),
        ({"scale": 1.3}, (512, 520), (665, 676, 0, 0), (664, 672)),
        ({"scale": 2.1}, (72, 72), (151, 151, 0, 0), (144, 144)),
        ({"width": 1024}, (512, 768), (1024, 1536, 0, 0), (1024, 1536)),
        ({"height": 1024}, (512, 768), (682, 1024, 0, 0), (680, 1024)),
        ({"width": 1024, "height": 1024}, (512, 768), (1024, 1536, 0, 64), (1024, 1024)),
        ({"width": 1024, "height": 1024}, (768, 512), (1536, 1024, 64, 0), (1024, 1024)),
        ({"width": 1280, "height": 720}, (512, 512), (1280, 1280, 0, 70), (1280, 720)),
        ({"width": 600, "height": 1024}, (512, 512), (1024, 1024, 53, 0), (600, 1024)),
    ],
)
def test_sizes_of_hires_are_a1111s(
    hires: dict[str, Any], size: tuple[int, int], enlarged: tuple[int, ...], final: tuple[int, int]
) -> None:
    found = nativesd.Hires(**hires).enlarged(*size, factor=8)
    assert found == enlarged
    assert found.size(8) == final
    cells = torch.zeros(1, 4, found.height // 8, found.width // 8)
    assert found.cut(cells).shape[2:] == (final[1] // 8, final[0] // 8)


@pytest.mark.parametrize("upscaler", [*UPSCALERS, "Latent (bicubic antialiased)", "function"])
def test_upscalers_of_hires(folders: dict[str, Path], upscaler: str) -> None:
    ours = nativesd.load(folders["sd15"], device="cpu")
    way: Any = upscaler
    if upscaler == "function":
        way = lambda picture: picture.resize((4 * picture.width, 4 * picture.height))  # noqa: E731
    hires = nativesd.Hires(strength=0.5, steps=2, upscaler=way, width=100, height=72)
    result = ours("a cat", steps=2, seed=5, sampler="Euler", hires=hires)
    assert result.images[0].size == (96, 72)
    assert np.asarray(result.images[0]).std() > 0


def test_an_unknown_upscaler_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"hires\.upscaler must be latent, .*, lanczos"):
        nativesd.load(folders["sd15"], device="cpu")("a cat", hires=nativesd.Hires(upscaler="R-ESRGAN 4x+"))


@pytest.mark.parametrize(("strength", "run"), [(0.5, 11), (0.75, 16), (1.0, 20), (0.0, 1), (0.01, 1), (0.999, 20)])
def test_image_to_image_as_a1111_counts(folders: dict[str, Path], strength: float, run: int) -> None:
    """int(min(s, 0.999) n) + 1 steps, the picture never given up wholly."""
    seen: list[float] = []
    ours = nativesd.load(folders["sd15"], device="cpu")
    ours("a cat", image=photo(), strength=strength, steps_as="a1111", steps=20, seed=1, guidance_scale=1,
         sampler="Euler", on_step=lambda step: seen.append(step.sigma))  # fmt: skip
    assert len(seen) == run == int(min(strength, 0.999) * 20) + 1


def test_outpainting(folders: dict[str, Path]) -> None:
    ours = nativesd.load(folders["sd15"], device="cpu")
    result = ours("a cat", image=photo(), outpaint=(0, 0, 32, 8), steps=4, seed=1, mask_blur=0)
    picture = np.asarray(result.images[0])
    assert picture.shape == (72, 96, 3)
    assert (picture[:40, :40] == np.asarray(photo())[:40, :40]).all()
    assert picture[:, 80:].std() > 0


def test_sizes_are_adapted_and_said(folders: dict[str, Path]) -> None:
    ours = nativesd.load(folders["sd15"], device="cpu")
    result = ours("a cat", image=photo(67, 50), steps=4, strength=0.5, seed=1)
    assert result.images[0].size == (64, 48)
    assert "67x50" in " ".join(result.parameters["notes"])
    result = ours("a cat", image=photo(), steps=4, strength=0.5, seed=1, width=72, height=40)
    assert result.images[0].size == (72, 40)


@pytest.mark.parametrize(
    ("form", "options", "sentence"),
    [
        ("sd15", {"mask": hole()}, "pass image= too"),
        ("sd15", {"outpaint": (8, 0, 0, 0)}, "pass image= too"),
        ("sd15", {"strength": 0.5}, "strength is for a picture to begin from: pass image= too"),
        ("inpaint", {}, "9 input channels: pass image= and mask="),
        ("inpaint", {"image": photo()}, "inpainting model: pass mask="),
        ("edit", {}, "8 input channels: pass image="),
        ("edit", {"image": photo(), "mask": hole()}, "takes no mask"),
        ("sd15", {"image": photo(), "strength": 1.2}, "strength must be between 0 and 1"),
        ("sd15", {"image": photo(), "strength": 0.01}, "leaves no step"),
        ("sd15", {"image": photo(), "hires": 2.0}, "pass no image"),
        ("sd15", {"image": photo(), "mask": Image.new("L", (SIDE, SIDE))}, "black"),
        ("sd15", {"noise": "gpu"}, "noise must be"),
        ("sd15", {"guidance_rescale": -1.0}, "guidance_rescale must be"),
        ("sd15", {"clip_skip": 40}, "clip_skip"),
    ],
)
def test_what_cannot_be(folders: dict[str, Path], form: str, options: dict[str, Any], sentence: str) -> None:
    ours = nativesd.load(folders[form], device="cpu")
    with pytest.raises(UsageError, match=sentence):
        ours("a cat", steps=4, seed=1, **options)


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_guidance_rescale(folders: dict[str, Path], rescale: float) -> None:
    oracle = theirs(diffusers.StableDiffusionPipeline, folders["sd15"], "DDIM")
    ours = nativesd.load(folders["sd15"], device="cpu")
    expected = oracle(
        "a cat", num_inference_steps=20, guidance_scale=9.0, guidance_rescale=rescale,
        generator=torch.Generator().manual_seed(5), output_type="np",
    ).images  # fmt: skip
    result = ours("a cat", steps=20, guidance_scale=9.0, guidance_rescale=rescale, seed=5, sampler="DDIM")
    compare(ours, result, expected)


def test_sequential_guidance_is_the_same(folders: dict[str, Path]) -> None:
    for form in ("sd15", "sdxl"):
        ours = nativesd.load(folders[form], device="cpu")
        at_once = ours("a cat", negative_prompt="fog", steps=4, seed=1)
        ours.sequential = True
        one_by_one = ours("a cat", negative_prompt="fog", steps=4, seed=1)
        assert (at_once.latents - one_by_one.latents).abs().max() <= 1e-4 * at_once.latents.abs().max()


def test_lcm(folders: dict[str, Path], tmp_path: Path) -> None:
    """An LCM is told its guidance scale; its own steps and its own sampler are the default."""
    folder = tmp_path / "lcm"
    shutil.copytree(folders["sd15"], folder)
    old = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel.from_config(old.config, time_cond_proj_dim=32)
    unet.save_pretrained(folder / "unet")
    diffusers.LCMScheduler(**BETAS).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    oracle = theirs(diffusers.LatentConsistencyModelPipeline, folder)
    expected = oracle("a cat", generator=torch.Generator().manual_seed(5), output_type="np").images
    ours = nativesd.load(folder, device="cpu")
    result = ours("a cat", seed=5)
    compare(ours, result, expected)
    assert (result.parameters["steps"], result.parameters["sampler"]) == (4, "LCM")
    options: dict[str, Any] = {"negative_prompt": "fog", "guidance": "apg tcfg interval:end=0.5", "seed": 5}
    idle = ours("a cat", **options)
    assert torch.equal(idle.latents, result.latents)
    said = "is not used: the UNet of lcm takes the guidance scale as an input"
    for name in ("negative_prompt", "guidance apg", "guidance tcfg", "guidance interval"):
        assert any(note.startswith(f"{name} {said}") for note in idle.parameters["notes"]), name
    for refused in ({"sampler": "Euler CFG++"}, {"hires": nativesd.Hires(sampler="DDIM CFG++")}):
        with pytest.raises(UsageError, match="needs an answer without the prompt"):
            ours("a cat", **refused)
    with pytest.raises(UsageError, match="write one prompt"):
        ours("a cat AND a dog")


def test_taesd(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drop-in for the VAE, both ways, and the maker of previews."""
    torch.manual_seed(4)
    tiny = diffusers.AutoencoderTiny()
    tiny.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    monkeypatch.setattr(weights_model, "locate_taesd", lambda family: file)
    ours = nativesd.load(folders["sd15"], device="cpu", vae="taesd", preview="taesd")
    oracle = theirs(diffusers.StableDiffusionImg2ImgPipeline, folders["sd15"], "Euler")
    oracle.vae = tiny
    expected = oracle(
        "a red cat", image=photo(), strength=0.5, num_inference_steps=20, guidance_scale=6.0,
        generator=torch.Generator().manual_seed(5), output_type="np",
    ).images  # fmt: skip
    previews: list[Image.Image] = []
    ours.previewer = nativesd.load(folders["sd15"], device="cpu", preview=file).previewer
    options = {"steps": 20, "guidance_scale": 6.0, "sampler": "Euler", "strength": 0.5, "image": photo()}
    result = ours("a red cat", seed=5, on_step=lambda step: previews.append(step.preview()), **options)
    compare(ours, result, expected)
    assert previews[-1].size == (SIDE, SIDE)
    assert np.abs(np.asarray(previews[-1], np.float32) - np.asarray(result.images[0], np.float32)).mean() < 20


def test_offloaded_modules_visit_the_device(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module is called on to the device and back; the picture is the same."""
    ours = nativesd.load(folders["sdxl"], device="cpu", offload=True)
    moved: list[tuple[str, str]] = []
    original = torch.nn.Module.to

    def to(self: torch.nn.Module, device: Any) -> torch.nn.Module:
        moved.append((type(self).__name__, "device" if isinstance(device, torch.device) else str(device)))
        return original(self, device)

    plain = nativesd.load(folders["sdxl"], device="cpu")("a cat", steps=2, seed=1)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    result = ours("a cat", steps=2, seed=1)
    assert (result.latents == plain.latents).all()
    visits = [("TextEncoder", "device")] * 2 + [("TextEncoder", "cpu")] * 2
    visits += [("UNet", "device"), ("UNet", "cpu"), ("VAE", "device"), ("VAE", "cpu")]
    assert moved == visits


def test_memory_that_torch_holds_for_the_next_tensors_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what it holds for graphs, and what tensors have."""
    segments = [
        {"device": 0, "total_size": 1000, "active_size": 100, "segment_pool_id": (0, 0)},
        {"device": 0, "total_size": 20, "active_size": 20, "segment_pool_id": (0, 0)},
        {"device": 0, "total_size": 3000, "active_size": 0, "segment_pool_id": (0, 1)},
        {"device": 1, "total_size": 5000, "active_size": 0, "segment_pool_id": (0, 0)},
    ]
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 100000))
    found = [memory.free_bytes(torch.device(name)) for name in ("cuda:0", "cuda:1", "cuda")]
    assert found == [907, 5007, 5007]


def test_what_does_not_fit_is_said_before_the_first_step(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = nativesd.load(folders["sd15"], device="cpu")
    expected = ours("a cat", steps=2, seed=1, num_images=2).latents
    needed = memory.unet_bytes(ours.config.unet, 2, 8, 8, torch.float32)
    monkeypatch.setattr(loaded, "free_bytes", lambda device: needed + 1)
    batches: list[int] = []
    ours.unet.register_forward_pre_hook(lambda module, arguments: batches.append(len(arguments[0])))
    found = ours("a cat", steps=2, seed=1, num_images=2).latents
    assert set(batches) == {2}, "guidance one by one"
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    batches.clear()
    monkeypatch.setattr(loaded, "free_bytes", lambda device: needed - 1)
    with pytest.raises(NoMemoryError, match=r"2 pictures of 64x64 cannot fit: .*--force"):
        ours("a cat", steps=2, seed=1, num_images=2)
    assert not batches
    assert len(ours("a cat", steps=2, seed=1, num_images=2, force=True).images) == 2


def test_only_masked_is_inpainting_of_the_part(folders: dict[str, Path]) -> None:
    """The part around the mask, at its own size, is what inpainting makes of it; the rest stays."""
    ours = nativesd.load(folders["sd15"], device="cpu")
    picture = photo(150, 110)
    mask = Image.new("L", picture.size)
    mask.paste(255, (60, 40, 76, 56))
    options: dict[str, Any] = {"steps": 4, "seed": 3, "strength": 0.6, "mask_blur": 0, "width": SIDE, "height": SIDE}
    whole = ours("a cat", image=picture, mask=mask, only_masked=8, **options)
    box = (52, 32, 84, 64)
    part, part_mask = (each.crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS) for each in (picture, mask))
    alone = ours("a cat", image=part, mask=part_mask, **options)
    assert (whole.latents == alone.latents).all()
    found, before = np.asarray(whole.images[0]), np.asarray(picture)
    inside = np.asarray(mask) > 0
    np.testing.assert_array_equal(found[~inside], before[~inside])
    assert (found[inside] != before[inside]).any()
    assert whole.parameters["notes"] == ["only 32x32 pixels at 52, 32 are repainted"]
    assert "Inpaint area: Only masked, Masked area padding: 8" in whole.infotext()


def test_what_is_under_the_mask_at_first(folders: dict[str, Path], tmp_path: Path) -> None:
    """Every kind gives another picture, except where there is only noise at first; and the text repeats it."""
    ours = nativesd.load(folders["sd15"], device="cpu")
    options: dict[str, Any] = {"steps": 4, "seed": 3, "image": photo(), "mask": hole(), "strength": 0.6}
    fills = ("original", "fill", "noise", "nothing")
    results = {fill: ours("a cat", mask_fill=fill, **options) for fill in fills}
    assert len({each.latents.sum().item() for each in results.values()}) == len(fills)
    assert (results["original"].latents == ours("a cat", **options).latents).all()
    for fill in fills[1:]:
        results[fill].save(tmp_path / "made.png")
        assert nativesd.options_from(tmp_path / "made.png")[0]["mask_fill"] == fill
    noise = [
        ours("a cat", mask_fill=fill, **{**options, "strength": 1, "mask_blur": 0}).latents
        for fill in ("noise", "nothing")
    ]
    assert (noise[0] == noise[1]).all()


def soft_hole() -> Image.Image:
    return hole().filter(ImageFilter.GaussianBlur(8))


@pytest.mark.parametrize("name", ["sd15", "inpaint"])
def test_soft_inpainting_mixes_every_answer_with_the_picture(folders: dict[str, Path], name: str) -> None:
    """A sampler that lands on the last answer ends where the formula says; black stays, and the picture repeats."""
    ours = nativesd.load(folders[name], device="cpu")
    settings = nativesd.SoftInpaint(mask_blend_scale=2, composite_mask_influence=0.5)
    options: dict[str, Any] = {"image": photo(), "mask": soft_hole(), "mask_blur": 0, "steps": 4, "seed": 3,
                               "strength": 0.75, "sampler": "Euler", "schedule": "karras"}  # fmt: skip
    answers: list[torch.Tensor] = []
    made = ours("a cat", soft_inpaint=settings, on_step=lambda step: answers.append(step.denoised), **options)
    torch.testing.assert_close(made.latents, answers[-1])
    black = greys_to_latents(soft_hole(), 64 // made.latents.shape[3])[0, 0] == 0
    assert black.any()
    assert (answers[0] - answers[-1])[0][:, black].abs().max() < 1e-4
    assert (answers[0] - answers[-1])[0][:, ~black].abs().max() > 1e-2
    assert (made.latents != ours("a cat", **options).latents).any()


def test_soft_inpainting_is_covered_by_what_changed(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of the whole and of a part; and parameters have A1111's fields, which make the option again."""
    ours = nativesd.load(folders["sd15"], device="cpu")
    picture = photo(150, 110)
    mask = Image.new("L", picture.size)
    mask.paste(255, (60, 40, 76, 56))
    options: dict[str, Any] = {"steps": 4, "seed": 3, "strength": 0.6, "mask_blur": 4, "width": SIDE, "height": SIDE,
                               "image": picture, "mask": mask, "only_masked": 8, "num_images": 2}  # fmt: skip
    made = ours("a cat", soft_inpaint=True, **options)
    same = ours("a cat", soft_inpaint="composite_difference_threshold=8", **options)
    assert (made.latents == same.latents).all()  # the threshold is of the end alone
    found, little = (np.abs(np.asarray(each.images[0], int) - np.asarray(picture)).sum() for each in (made, same))
    assert found > little
    box = made.parameters["notes"][0]
    assert box == "only 52x52 pixels at 42, 22 are repainted"
    outside = np.ones((110, 150), bool)
    outside[22:74, 42:94] = False
    np.testing.assert_array_equal(np.asarray(made.images[0])[outside], np.asarray(picture)[outside])
    assert (
        "Soft inpainting enabled: True, Soft inpainting schedule bias: 1, Soft inpainting preservation strength: 0.5, "
        "Soft inpainting transition contrast boost: 4, Soft inpainting mask influence: 0, "
        "Soft inpainting difference threshold: 0.5, Soft inpainting difference contrast: 2" in made.infotext()
    )
    same.save(tmp_path / "made.png")
    again, unheeded = nativesd.options_from(tmp_path / "made-0.png")
    assert again["soft_inpaint"] == nativesd.SoftInpaint(composite_difference_threshold=8)
    assert unheeded == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"soft_inpaint": True}, "soft_inpaint is for a mask"),
        ({"soft_inpaint": 3, "mask": hole()}, "must be a SoftInpaint, or True, not 3"),
        ({"soft_inpaint": "blur=3", "mask": hole()}, "has no 'blur'"),
        ({"soft_inpaint": nativesd.SoftInpaint(9), "mask": hole()}, "mask_blend_power must be between 0 and 8, not 9"),
        ({"only_masked": 8}, "only_masked is for a mask"),
        ({"mask_fill": "noise"}, "mask_fill is for a mask"),
        ({"only_masked": 8, "mask": hole(), "outpaint": (8, 0, 0, 0)}, "no outpaint"),
        ({"only_masked": -1, "mask": hole()}, "only_masked must be between 0 and 16384"),
        ({"mask_fill": "red", "mask": hole()}, "mask_fill must be original"),
    ],
)
def test_parts_that_cannot_be(folders: dict[str, Path], options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        nativesd.load(folders["sd15"], device="cpu")("a cat", steps=2, image=photo(), **options)


def test_an_interrupted_call_has_a_result_of_what_there_was(folders: dict[str, Path]) -> None:
    ours = nativesd.load(folders["sd15"], device="cpu")
    with pytest.raises(nativesd.Interrupted) as ended:
        ours("a cat", steps=4, seed=3, image=photo(), mask=hole(), on_step=lambda step: ours.interrupt())
    result = ended.value.result()
    assert isinstance(result, nativesd.Result)
    assert result.latents is ended.value.latents
    assert result.parameters["notes"] == ["interrupted after step 1 of 4"]
    assert "Steps: 4" in result.infotext()
    outside = np.asarray(hole()) == 0
    np.testing.assert_array_equal(np.asarray(result.images[0])[outside][:100], np.asarray(photo())[outside][:100])


def test_latents_to_begin_from(folders: dict[str, Path]) -> None:
    """A second pass by hand is what hires makes of it."""
    ours = nativesd.load(folders["sd15"], device="cpu")
    first = ours("a cat", steps=4, seed=3)
    wanted = ours("a cat", steps=4, seed=3, hires=nativesd.Hires(2, 0.5))
    larger = torch.nn.functional.interpolate(first.latents, scale_factor=2, mode="bilinear")
    found = ours("a cat", steps=4, seed=3, latents=larger, strength=0.5, steps_as="all")
    assert (found.latents == wanted.latents).all()
    assert found.images[0].size == (2 * SIDE, 2 * SIDE)
    for options, says in (
        ({"latents": larger[0]}, "must be a tensor"),
        ({"latents": larger[:, :3]}, "latents must be"),
        ({"latents": larger, "image": photo()}, "pass no image"),
        ({"latents": larger, "width": SIDE}, "pass no other width"),
        ({"latents": larger.expand(2, -1, -1, -1)}, "latents must be"),
    ):
        with pytest.raises(UsageError, match=says):
            ours("a cat", steps=4, seed=3, **options)
