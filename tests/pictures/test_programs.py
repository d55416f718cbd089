"""What the programs write about their pictures: real ones, cropped to a pixel, and texts of their forms."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager

import nativesd
from nativesd.errors import SourceError
from nativesd.pictures.embedded import user_comment_exif

REAL = Path(__file__).parent / "real"
DUCK = {
    "steps": 15, "sampler": "UniPC", "guidance_scale": 5.0, "seed": 235284042, "width": 512, "height": 400,
    "prompt": "photo of a duck", "negative_prompt": "monochrome", "model": "realistic_realisticVisionV20_v20",
}  # fmt: skip
WOMAN = {
    "steps": 50, "seed": 2980747362, "width": 512, "height": 768, "guidance_scale": 5.0, "sampler": "k_lms",
    "negative_prompt": "rendering, glowing eyes, skinny",
}  # fmt: skip
PICTURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "automatic1111_cropped.png": (DUCK, []),
    "automatic1111_cropped.jpg": (DUCK, []),
    "text_after_idat.png": (DUCK, []),
    "fooocus1_cropped.png": (
        {
            "steps": 30, "sampler": "dpmpp_2m_sde_gpu", "schedule": "karras", "seed": 6952411511246973023,
            "width": 768, "height": 1280, "guidance_scale": 4.0, "clip_skip": 2,
            "model": "juggernautXL_v8Rundiffusion", "noise": "cpu",
        },
        ["sharpness", "adm_guidance"],
    ),
    "img2img_cropped.png": (
        {
            "steps": 20, "sampler": "sample_dpmpp_2m", "schedule": "normal", "seed": 280823642470253,
            "guidance_scale": 8.0, "strength": pytest.approx(0.87), "steps_as": "all", "noise": "comfyui",
            "model": "v1-5-pruned-emaonly.ckpt", "negative_prompt": "watermark, text",
            "prompt": "photograph of victorian woman with wings, sky clouds, meadow grass",
        },
        [],
    ),
    "invokeai_dream1.png": (WOMAN, ["noise", "gfpgan", "codeformer", "upscaling"]),
    "invokeai_sdmeta1.png": (WOMAN | {"model": "deliberateForInvoke_v08"}, ["noise", "codeformer", "esrgan"]),
    "invokeai_imeta1.png": (
        {
            "steps": 35, "sampler": "EulerDiscreteScheduler", "seed": 3293022630, "width": 1024, "height": 1024,
            "guidance_scale": 8.0, "noise": "cpu", "model": "juggernautXL",
            "prompt": "digital artwork, oil painting. painterly brushstrokes, holidays,",
        },
        ["ipAdapters", "vae VAEFix", "weights in compel's spelling"],
    ),
    "novelai1_cropped.png": (
        {
            "steps": 50, "sampler": "k_euler_ancestral", "seed": 2253955223, "guidance_scale": 10.0,
            "prompt": "masterpiece, best quality,  cat, space, icon",
        },
        ["strength, which stands there with and without a picture"],
    ),
    "unclip_2pass_cropped.png": (
        {
            "steps": 26, "sampler": "uni_pc_bh2", "schedule": "normal", "seed": 1106257833005336, "width": 1280,
            "height": 704, "guidance_scale": 8.0, "model": "wd-1-5-beta2-aesthetic-unclip-h-fp32.safetensors",
        },
        ["seed of the second pass", "model of the second pass", "unCLIPConditioning"],
    ),
    "night_evening_day_morning_cropped.png": (
        {"steps": 13, "sampler": "dpmpp_sde", "width": 704, "height": 1280, "clip_skip": 2, "guidance_scale": 8.5},
        ["seed of the second pass", "model of the second pass", "ConditioningCombine", "ConditioningSetArea"],
    ),
    "noisy_latents_3_subjects_cropped.png": (
        {"steps": 16, "sampler": "uni_pc", "schedule": "normal", "guidance_scale": 6.5},
        ["start_at_step", "seed of the second pass", "LatentComposite"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_real_pictures_are_read(name: str) -> None:
    wanted, unheeded = PICTURES[name]
    options, left = nativesd.options_from(REAL / name)
    assert {key: options.get(key) for key in wanted} == wanted
    assert len(left) == len(unheeded)
    assert all(line.startswith(start) for line, start in zip(left, unheeded, strict=True))


def test_every_real_picture_has_its_values_here() -> None:
    assert {path.name for path in REAL.iterdir()} - {"README.md"} == PICTURES.keys()


@pytest.mark.parametrize(
    "name",
    ["img2img_cropped.png", "unclip_2pass_cropped.png", "novelai1_cropped.png", "automatic1111_cropped.png"],
)
def test_others_read_the_same(name: str) -> None:
    """sd-parsers finds every prompt that we take, and the sampler's seed."""
    options, _ = nativesd.options_from(REAL / name)
    parsed = ParserManager().parse(REAL / name)
    assert parsed is not None
    prompts = {prompt.value.strip() for prompt in parsed.prompts}
    assert options["prompt"].strip() in prompts
    assert str(options["seed"]) in {str(sampler.parameters.get("seed")) for sampler in parsed.samplers}


def test_the_second_pass_of_a_graph_is_hires() -> None:
    options, _ = nativesd.options_from(REAL / "unclip_2pass_cropped.png")
    hires = options["hires"]
    assert (hires.width, hires.height, hires.upscaler) == (1920, 1088, "latent (nearest-exact)")
    assert (hires.steps, hires.sampler, hires.schedule, hires.guidance_scale) == (8, "dpmpp_sde", "normal", 9.0)
    assert hires.strength == pytest.approx(0.52)
    assert hires.prompt == "beautiful scenery landscape outdoors mountains"


def png(path: Path, texts: dict[str, str]) -> Path:
    chunk = PngInfo()
    for name, text in texts.items():
        chunk.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunk)
    return path


SWARM = {
    "sui_image_params": {
        "prompt": "a cat", "negativeprompt": "fog", "model": "xl/base", "seed": 7, "steps": 12, "cfgscale": 6.5,
        "width": 832, "height": 1216, "sampler": "dpmpp_2m", "scheduler": "karras", "clipstopatlayer": "-2",
        "loras": "styles/ink.safetensors,b", "loraweights": "0.5,1", "swarm_version": "0.9.2",
        "variationseedstrength": 0.3,
    }
}  # fmt: skip
GRAPH: dict[str, Any] = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "m.safetensors"}},
    "2": {"class_type": "LoraLoader", "inputs": {
        "lora_name": "dir/ink.safetensors", "strength_model": 0.8, "strength_clip": 0.5, "model": ["1", 0],
        "clip": ["1", 1]}},
    "3": {"class_type": "PrimitiveNode", "inputs": {"value": 99}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": ["9", 0], "clip": ["2", 1]}},
    "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "fog", "clip": ["2", 1]}},
    "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "7": {"class_type": "KSampler", "inputs": {
        "seed": ["3", 0], "steps": 9, "cfg": 3, "sampler_name": "euler", "scheduler": "simple", "denoise": 1,
        "model": ["8", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0]}},
    "8": {"class_type": "FreeU_V2", "inputs": {"model": ["2", 0]}},
    "9": {"class_type": "StringConstant", "inputs": {"string": "a cat"}},
}  # fmt: skip


def test_swarmui(tmp_path: Path) -> None:
    options, unheeded = nativesd.options_from(png(tmp_path / "a.png", {"parameters": json.dumps(SWARM)}))
    assert options == {
        "prompt": "a cat <lora:ink:0.5> <lora:b:1>", "negative_prompt": "fog", "model": "xl/base", "seed": 7,
        "steps": 12, "guidance_scale": 6.5, "width": 832, "height": 1216, "sampler": "dpmpp_2m", "schedule": "karras",
        "clip_skip": 2, "noise": "comfyui", "emphasis": "comfyui",
    }  # fmt: skip
    assert unheeded == ["variationseedstrength"]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=user_comment_exif(json.dumps(SWARM)))
    assert nativesd.options_from(tmp_path / "a.jpg") == (options, unheeded)


def test_comfyui_graphs(tmp_path: Path) -> None:
    """Primitives are followed, LoRAs are tags, and a node that is not known is named."""
    options, unheeded = nativesd.options_from(png(tmp_path / "a.png", {"prompt": json.dumps(GRAPH)}))
    assert options == {
        "prompt": "a cat <lora:ink:0.5:0.8>", "negative_prompt": "fog", "model": "m.safetensors", "seed": 99,
        "steps": 9, "guidance_scale": 3.0, "width": 512, "height": 640, "sampler": "euler", "schedule": "simple",
        "noise": "comfyui", "emphasis": "comfyui",
    }  # fmt: skip
    assert unheeded == ["FreeU_V2"]
    exif = Image.Exif()
    exif[0x0110] = f"prompt:{json.dumps(GRAPH)}"
    Image.new("RGB", (8, 8)).save(tmp_path / "c.webp", exif=exif)
    assert nativesd.options_from(tmp_path / "c.webp") == (options, unheeded)


def test_what_acts_by_a_picture_in_a_graph_is_told_as_options(tmp_path: Path) -> None:
    graph: dict[str, Any] = copy.deepcopy(GRAPH)
    graph["7"]["inputs"] |= {"model": ["12", 0], "positive": ["14", 0], "negative": ["14", 1]}
    graph |= {
        "10": {"class_type": "IPAdapterUnifiedLoader", "inputs": {"model": ["2", 0], "preset": "PLUS (high strength)"}},
        "11": {"class_type": "IPAdapterAdvanced", "inputs": {
            "model": ["10", 0], "ipadapter": ["10", 1], "weight": 0.5, "weight_type": "style transfer", "end_at": 0.8,
            "start_at": 0.0, "attn_mask": ["20", 1]}},
        "12": {"class_type": "IPAdapter", "inputs": {
            "model": ["11", 0], "ipadapter": ["13", 0], "weight": 1, "weight_type": "standard"}},
        "13": {"class_type": "IPAdapterModelLoader", "inputs": {"ipadapter_file": "ip-adapter_sd15.bin"}},
        "14": {"class_type": "ControlNetApplyAdvanced", "inputs": {
            "positive": ["4", 0], "negative": ["5", 0], "control_net": ["15", 0], "strength": 0.7,
            "start_percent": 0.0, "end_percent": 0.6}},
        "15": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "canny.safetensors"}},
    }  # fmt: skip
    _, unheeded = nativesd.options_from(png(tmp_path / "a.png", {"prompt": json.dumps(graph)}))
    assert sorted(unheeded) == [
        "ControlNetApplyAdvanced: pass it again: --control canny.safetensors PICTURE --control-scale 0.7 "
        "--control-end 0.6",
        "IPAdapter: pass it again: --image-prompt ip-adapter_sd15.bin PICTURE",
        'IPAdapterAdvanced: pass it again: --image-prompt "PLUS (high strength)" PICTURE --image-prompt-scale 0.5 '
        '--image-prompt-end 0.8 --image-prompt-layers "style transfer" --image-prompt-mask MASK',
    ]


A1111 = "a cat\nNegative prompt: dog\nSteps: 20, Sampler: {sampler}, CFG scale: 7, Seed: 1, Size: 64x64, Model: m"


def test_a_text_beside_a_picture_and_alone(tmp_path: Path) -> None:
    text = A1111.format(sampler="Euler a")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(text)
    found = nativesd.options_from(tmp_path / "a.png")
    assert found == nativesd.options_from(tmp_path / "a.txt")
    assert (found[0]["sampler"], found[0]["prompt"], found[1]) == ("Euler a", "a cat", [])
    png(tmp_path / "a.png", {"parameters": A1111.format(sampler="Heun")})  # its own text is nearer
    assert nativesd.options_from(tmp_path / "a.png")[0]["sampler"] == "Heun"


@pytest.mark.parametrize("name", ["Default", "DPM++ 17M", "res_4s"])
def test_a_sampler_that_is_not_here_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text(A1111.format(sampler=name))
    options, unheeded = nativesd.options_from(tmp_path / "a.txt")
    assert "sampler" not in options
    assert unheeded == [f"sampler {name} (taken: the model's own)"]


def test_an_upscaler_that_is_not_here_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(A1111.format(sampler="Euler") + ", Hires upscale: R-ESRGAN 4x+, Hires steps: 3")
    options, unheeded = nativesd.options_from(tmp_path / "a.txt")
    assert options["hires"] == nativesd.Hires(steps=3)
    assert unheeded == ["Hires upscaler R-ESRGAN 4x+ (taken: latent)"]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"parameters": "a cat on a mat"}, "without any generation parameters: no line of it starts with Steps:"),
        ({"workflow": '{"nodes": []}'}, "a ComfyUI workflow as it is edited, without the prompt"),
        ({"prompt": json.dumps({"1": {"class_type": "FluxSampler"}})}, "graph without a KSampler.*: FluxSampler"),
        ({"parameters": '{"prompt": "a cat", "steps": 30}'}, "JSON of a program that is not known"),
        ({"Software": "Paint 3"}, r"no generation parameters \(made by Paint 3\)"),
        ({}, "holds no generation parameters: there is no PNG text chunk"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, texts: dict[str, str], sentence: str) -> None:
    with pytest.raises(SourceError, match=sentence):
        nativesd.options_from(png(tmp_path / "a.png", texts))
