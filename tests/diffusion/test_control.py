"""ControlNets and T2I-Adapters in whole pictures, against the diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nativesd
from nativesd import Control
from nativesd.errors import SourceError, UsageError, WeightsError
from nativesd.loading.control import load_control
from nativesd.models.controlnet import ControlNet
from nativesd.weights.checkpoint import unmap
from nativesd.weights.maps.keymap import load_table
from oracles import randomise, save_union_and_adapter
from pipeline.test_image_modes import compare, hole, photo, theirs
from pipeline.test_pipeline import save_model

OPTIONS = {"num_inference_steps": 20, "guidance_scale": 6.0, "output_type": "np"}
OURS = {"steps": 20, "guidance_scale": 6.0}


def stripes(width: int = 64, height: int = 64, *, down: bool = False) -> Image.Image:
    """White bars on black."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:: 8 if down else 1, :: 1 if down else 8] = 255
    return Image.fromarray(array)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("control")
    for form in ("sd15", "sd21-v", "sdxl"):
        save_model(form, root / form)
        unet = diffusers.UNet2DConditionModel.from_pretrained(root / form / "unet")
        for number in (1, 2):
            control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
            randomise(control, number)
            control.save_pretrained(root / f"{form}-control-{number}")
    unet = diffusers.UNet2DConditionModel.from_pretrained(root / "sdxl" / "unet")
    save_union_and_adapter(unet, root)
    return {path.name: path for path in root.iterdir()}


PIPELINES = {
    "sd15": diffusers.StableDiffusionControlNetPipeline, "sd21-v": diffusers.StableDiffusionControlNetPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
}  # fmt: skip


def oracle(folders: dict[str, Path], form: str, cls: Any, count: int) -> Any:
    nets = [diffusers.ControlNetModel.from_pretrained(folders[f"{form}-control-{i + 1}"]) for i in range(count)]
    base = theirs(diffusers.DiffusionPipeline, folders[form])
    pipe = (
        cls(**base.components, controlnet=nets[0] if count == 1 else nets)
        if form == "sdxl"
        else cls(**base.components, controlnet=nets[0] if count == 1 else nets, requires_safety_checker=False)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("size", [(64, 64), (72, 40)])
@pytest.mark.parametrize("form", PIPELINES)
def test_one_controlnet(folders: dict[str, Path], form: str, size: tuple[int, int]) -> None:
    """Odd sizes of latents too: 9 x 5 cells are halved to 5 x 3."""
    pipe = oracle(folders, form, PIPELINES[form], 1)
    hint = stripes(*size)
    expected = pipe(
        "a red cat", image=hint, controlnet_conditioning_scale=0.7, width=size[0], height=size[1],
        generator=torch.Generator().manual_seed(5), **OPTIONS,
    ).images  # fmt: skip
    ours = nativesd.load(folders[form], device="cpu")
    control = Control(folders[f"{form}-control-1"], hint, scale=0.7)
    result = ours("a red cat", control=[control], width=size[0], height=size[1], seed=5, **OURS)
    compare(ours, result, expected)
    plain = ours("a red cat", width=size[0], height=size[1], seed=5, **OURS)
    assert (plain.latents - result.latents).abs().max() > 0.05, "the control has to matter"


@pytest.mark.parametrize("form", PIPELINES)
def test_two_controlnets_with_scales_and_times(folders: dict[str, Path], form: str) -> None:
    pipe = oracle(folders, form, PIPELINES[form], 2)
    expected = pipe(
        ["a red cat"] * 2, image=[stripes(), stripes(down=True)], controlnet_conditioning_scale=[0.5, 0.8],
        control_guidance_start=[0.0, 0.3], control_guidance_end=[0.6, 1.0],
        generator=[torch.Generator().manual_seed(s) for s in (5, 6)], **OPTIONS,
    ).images  # fmt: skip
    ours = nativesd.load(folders[form], device="cpu")
    control = [
        Control(folders[f"{form}-control-1"], stripes(), 0.5, end=0.6),
        Control(load_control(folders[f"{form}-control-2"], device="cpu"), stripes(down=True), 0.8, start=0.3),
    ]
    result = ours("a red cat", control=control, num_images=2, seed=5, **OURS)
    compare(ours, result, expected)


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_guess_mode(folders: dict[str, Path], form: str) -> None:
    pipe = oracle(folders, form, PIPELINES[form], 1)
    expected = pipe(
        "a red cat", image=stripes(), guess_mode=True, generator=torch.Generator().manual_seed(5), **OPTIONS
    ).images
    ours = nativesd.load(folders[form], device="cpu")
    control = [Control(folders[f"{form}-control-1"], stripes())]
    compare(ours, ours("a red cat", control=control, guess_mode=True, seed=5, **OURS), expected)


@pytest.mark.parametrize("guess", [False, True])
def test_shuffle(folders: dict[str, Path], tmp_path: Path, guess: bool) -> None:
    """A pooled ControlNet acts for the prompt only."""
    pipe = oracle(folders, "sd15", PIPELINES["sd15"], 1)
    pipe.controlnet.register_to_config(global_pool_conditions=True)
    pipe.controlnet.save_pretrained(tmp_path / "pooled")
    expected = pipe(
        "a red cat", image=stripes(), guess_mode=guess, generator=torch.Generator().manual_seed(5), **OPTIONS
    ).images
    ours = nativesd.load(folders["sd15"], device="cpu")
    control = [Control(tmp_path / "pooled", stripes())]
    compare(ours, ours("a red cat", control=control, guess_mode=guess, seed=5, **OURS), expected)


def test_a_single_file_says_by_its_name_that_it_is_pooled(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(folders["sd15-control-1"] / "diffusion_pytorch_model.safetensors")
    for name, pooled in (
        ("control_sd15_Shuffle.safetensors", True),
        ("control_sd15_canny.safetensors", False),
    ):
        save_file(weights, tmp_path / name)
        module = load_control(tmp_path / name, device="cpu").module
        assert isinstance(module, ControlNet)
        assert module.control_config.pooled is pooled


def test_controlnet_with_image_to_image(folders: dict[str, Path]) -> None:
    pipe = oracle(folders, "sd15", diffusers.StableDiffusionControlNetImg2ImgPipeline, 1)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    expected = pipe(
        "a red cat", image=photo(), control_image=stripes(), strength=0.6, controlnet_conditioning_scale=0.7,
        generator=torch.Generator().manual_seed(5), **OPTIONS,
    ).images  # fmt: skip
    ours = nativesd.load(folders["sd15"], device="cpu")
    control = [Control(folders["sd15-control-1"], stripes(), 0.7)]
    result = ours("a red cat", image=photo(), strength=0.6, control=control, seed=5, sampler="DDIM", **OURS)
    compare(ours, result, expected)


@pytest.mark.parametrize("kinds", [(3,), (1, 3)])
def test_union(folders: dict[str, Path], kinds: tuple[int, ...]) -> None:
    """One hint or several in one network; every picture of a batch is the one it is alone."""
    base = theirs(diffusers.DiffusionPipeline, folders["sdxl"])
    union = diffusers.ControlNetUnionModel.from_pretrained(folders["union"])
    pipe = diffusers.StableDiffusionXLControlNetUnionPipeline(**base.components, controlnet=union)
    pipe.set_progress_bar_config(disable=True)
    hints = [stripes(), stripes(down=True)][: len(kinds)]
    expected = pipe(
        "a red cat", control_image=hints, control_mode=list(kinds), controlnet_conditioning_scale=0.7,
        generator=torch.Generator().manual_seed(6), **OPTIONS,
    ).images  # fmt: skip
    ours = nativesd.load(folders["sdxl"], device="cpu")
    model = load_control(folders["union"], device="cpu")
    control = [Control(model, hint, 0.7, kind=kind) for hint, kind in zip(hints, kinds, strict=True)]
    result = ours("a red cat", control=control, num_images=2, seed=5, **OURS)
    found = ours.decode_tensor(result.latents)[1:].permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() <= 2e-3


def test_t2i_adapter(folders: dict[str, Path]) -> None:
    base = theirs(diffusers.DiffusionPipeline, folders["sd15"])
    adapter = diffusers.T2IAdapter.from_pretrained(folders["adapter"])
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a red cat", image=stripes(), adapter_conditioning_scale=0.7, width=64, height=64,
        generator=torch.Generator().manual_seed(5), **OPTIONS,
    ).images  # fmt: skip
    ours = nativesd.load(folders["sd15"], device="cpu")
    result = ours("a red cat", control=[Control(folders["adapter"], stripes(), 0.7)], seed=5, **OURS)
    _, unheeded = nativesd.options_from(result.save(folders["adapter"].parent / "made.png")[0])
    assert unheeded == ["ControlNet 0: pass it again: --control adapter PICTURE --control-scale 0.7"]
    compare(ours, result, expected)
    plain = ours("a red cat", seed=5, **OURS)
    assert (plain.latents - result.latents).abs().max() > 0.05


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Two modules of the UNet and one of the text encoder, in kohya's naming."""
    generator = torch.Generator().manual_seed(7)
    keys: dict[str, torch.Tensor] = {}
    for module, width in (
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 32),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0", 64),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 32),
    ):
        keys[f"{module}.lora_down.weight"] = torch.randn(4, width, generator=generator)
        keys[f"{module}.lora_up.weight"] = torch.randn(width, 4, generator=generator)
        keys[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(keys, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_loras_come_and_go_between_calls(folders: dict[str, Path], lora: Path) -> None:
    """Scale by scale another picture; without them the first one again, to the bit."""
    ours = nativesd.load(folders["sd15"], device="cpu")
    options = {"steps": 3, "seed": 1}
    plain = ours("a cat", **options).latents
    weak, strong = (ours("a cat", loras=[(lora, scale)], **options) for scale in (0.2, 1.0))
    assert weak.parameters["loras"] == {"style": (0.2, 0.2)}
    unet_only = ours("a cat", loras=[(lora, 1.0, 0.0)], **options).latents
    changes = [float((latents - plain).abs().max()) for latents in (weak.latents, strong.latents, unet_only)]
    assert 1e-3 < changes[0] < changes[1]
    assert changes[2] > 1e-3
    assert (unet_only - strong.latents).abs().max() > 1e-3
    assert (ours("a cat", **options).latents == plain).all()
    with pytest.raises(WeightsError, match="3 of its 9 keys found no place"):
        nativesd.load(folders["sdxl"], device="cpu")("a cat", loras=[lora], **options)


def test_everything_at_once(folders: dict[str, Path], lora: Path) -> None:
    """Inpainting, a LoRA, two controls of two kinds and a prompt of two chunks, bit-equal when repeated."""
    ours = nativesd.load(folders["sd15"], device="cpu")
    control = [Control(folders["sd15-control-1"], stripes(), 0.5, end=0.5), Control(folders["adapter"], stripes(), 0.5)]
    options = {
        "image": photo(),
        "mask": hole(),
        "strength": 0.8,
        "control": control,
        "loras": [lora],
        "steps": 5,
        "seed": 1,
    }
    prompt = "a (red:1.2) cat, " * 30
    first, second = (ours(prompt, **options) for _ in range(2))
    assert (first.latents == second.latents).all()
    assert (np.asarray(first.images[0])[:4] == np.asarray(photo())[:4]).all()


def test_what_does_not_fit_is_refused_before_a_step(folders: dict[str, Path]) -> None:
    ours = nativesd.load(folders["sdxl"], device="cpu")
    steps: list[int] = []

    def call(control: Control, **options: Any) -> None:
        ours("a cat", control=[control], steps=2, seed=1, on_step=lambda step: steps.append(step.index), **options)

    with pytest.raises(UsageError, match=r"another family.*context 32 wide, and the model's is 80"):
        call(Control(folders["sd15-control-1"], stripes()))
    with pytest.raises(UsageError, match="pass kind="):
        call(Control(folders["union"], stripes()))
    with pytest.raises(UsageError, match="start and end"):
        call(Control(folders["sdxl-control-1"], stripes(), start=0.6, end=0.5))
    with pytest.raises(UsageError, match=r"T2I-Adapter of another family.*\(1, 32, 8, 8\)"):
        call(Control(folders["adapter"], stripes()))
    with pytest.raises(UsageError, match=r"no preprocessor|needs controlnet_aux"):
        call(Control(folders["sdxl-control-1"], stripes(), preprocess="nonsense"))
    assert steps == []
    with pytest.raises(SourceError, match="neither a ControlNet nor a T2I-Adapter"):
        load_control(folders["sdxl"] / "vae")


def test_a_difference_is_added_to_the_models_unet(folders: dict[str, Path], tmp_path: Path) -> None:
    """lllyasviel's difference files: the encoder's weights less those of the model it was trained on."""
    ours = nativesd.load(folders["sd15"], device="cpu")
    whole = load_control(folders["sd15-control-1"], device="cpu")
    state, shared = whole.module.state_dict(), ours.unet.state_dict()
    difference = {name: tensor - shared[name] if name in shared else tensor for name, tensor in state.items()}
    table = load_table("controlnet.ldm").bind(whole.module.config.dims, "control_model.")
    published = {key: tensor.contiguous() for key, tensor in unmap(difference, table).items()}
    file = tmp_path / "diff_control.safetensors"
    save_file({**published, "difference": torch.ones(1)}, file)
    module = load_control(file, device="cpu", unet=ours.unet).module
    for name, tensor in module.state_dict().items():
        assert (tensor - state[name]).abs().max() < 1e-6, name
    with pytest.raises(SourceError, match="holds the difference"):
        load_control(file, device="cpu")


def test_canny() -> None:
    edges = np.asarray(nativesd.canny(photo()))
    assert edges.shape == (64, 64, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert 20 < (edges[..., 0] > 0).sum() < 400
