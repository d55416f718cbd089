"""Settings of StreamDiffusion and its forks: every one is honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nativesd
from conftest import Run
from nativesd.diffusion.control import Control
from nativesd.errors import NativesdError, SourceError, UsageError
from nativesd.streaming.config import Settings, read_settings

yaml = pytest.importorskip("yaml", reason='needs pip install ".[stream]"')


def read(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return read_settings(path)


def test_all_at_once(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        """
        model_id: model.safetensors
        t_index_list: [20, 35]
        num_inference_steps: 50
        width: 512
        height: 384
        device: cpu
        dtype: fp32
        prompt: a cat
        negative_prompt: a dog
        guidance_scale: 1.2
        use_denoising_batch: true
        delta: 0.7
        frame_buffer_size: 1
        use_lcm_lora: true
        lcm_lora_id: lcm.safetensors
        lora_dict: {style.safetensors: 0.5}
        use_tiny_vae: true
        acceleration: xformers
        cfg_type: initialize
        seed: 7
        do_add_noise: false
        enable_similar_image_filter: true
        similar_image_filter_threshold: 0.9
        use_controlnet: true
        controlnets:
          - model_id: canny.safetensors
            preprocessor: canny
            conditioning_scale: 0.4
            control_guidance_end: 0.5
          - model_id: depth.safetensors
            enabled: false
          - model_id: tile.safetensors
            preprocessor: passthrough
        """,
    )
    assert settings.model == "model.safetensors"
    assert settings.loading == {
        "device": "cpu", "dtype": "float32", "loras": ["lcm.safetensors", ("style.safetensors", 0.5)], "vae": "taesd",
        "backend": "torch",
    }  # fmt: skip
    assert settings.stream == {
        "t_index_list": [20, 35], "width": 512, "height": 384, "prompt": "a cat", "negative_prompt": "a dog",
        "guidance_scale": 1.2, "delta": 0.7, "residual": "initialize", "seed": 7, "renoise": False,
        "skip_similar": nativesd.Similar(threshold=0.9, measure="cosine"),
        "control": [
            nativesd.Control("canny.safetensors", scale=0.4, end=0.5, preprocess="canny"),
            nativesd.Control("tile.safetensors"),
        ],
    }  # fmt: skip


def test_another_number_of_steps_is_another_ladder(tmp_path: Path) -> None:
    assert read(tmp_path, "t_index_list: [0, 2]\nnum_inference_steps: 4").stream == {"timesteps": [999, 499]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt: [[a cat, 1], [a dog, 2]]", {"prompts": [["a cat", 1], ["a dog", 2]]}),
        ("prompt: x\nprompt_blending: {prompt_list: [[a, 1]], interpolation_method: slerp}",
         {"prompts": [["a", 1]], "blend": "slerp"}),
        ("seed_blending: {seed_list: [[1, 0.5], [2, 0.5]]}", {"seeds": [[1, 0.5], [2, 0.5]]}),
    ],
)  # fmt: skip
def test_blends(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    assert read(tmp_path, text).stream == expected


def test_settings_of_the_embedded_model_make_a_stream(tmp_path: Path) -> None:
    settings = read(
        tmp_path, "model_id: tiny\nuse_lcm_lora: true\nprompt: a cactus\nt_index_list: [20, 35]\ndevice: cpu"
    )
    assert settings.model is not None
    with nativesd.stream(model=settings.model, **settings.loading, **settings.stream) as stream:
        assert (stream.timesteps, stream.notes) == ((599, 299), ())


def test_ip_adapters(tmp_path: Path) -> None:
    """Under both names; a picture lies beside the settings, and h94/IP-Adapter stands for what it has for SD1.5."""
    (tmp_path / "gold.png").touch()
    settings = read(
        tmp_path,
        """
        ipadapters:
          - ipadapter_model_path: h94/IP-Adapter
            image_encoder_path: h94/IP-Adapter
            style_image: gold.png
            scale: 0.7
            enabled: true
            num_image_tokens: 4
            type: regular
          - ipadapter_model_path: plus.safetensors
            style_image: elsewhere.png
            weight_type: style transfer
          - ipadapter_model_path: third.safetensors
            enabled: false
        """,
    )
    first, second = settings.stream["image_prompts"]
    assert (first.adapter, first.picture) == ("h94/IP-Adapter/models/ip-adapter_sd15.bin", tmp_path / "gold.png")
    assert (first.scale, first.layers, first.weight_type) == (0.7, None, "linear")
    assert (second.adapter, second.picture, second.layers) == ("plus.safetensors", "elsewhere.png", "style")
    assert settings.stream["image_encoder"] == "h94/IP-Adapter/models/image_encoder"
    one = read(tmp_path, "ipadapter_config: {ipadapter_model_path: x.bin, style_image: y.png, weight_type: ease out}")
    assert one.stream["image_prompts"][0].weight_type == "ease out"
    assert "image_prompts" not in read(tmp_path, "use_ipadapter: false\nipadapters: [{ipadapter_model_path: x}]").stream


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle_id: x", "modle_id is no setting: did you mean model_id?"),
        ("controlnets: [{model_id: x, scale: 1}]", "controlnets: scale is no setting"),
        ("controlnets: [{preprocessor: canny}]", "must each have a model_id"),
        ("controlnets: [{model_id: x, preprocessor_params: {low: 1}}]", "preprocessor_params cannot be set"),
        ("frame_buffer_size: 2", "frame_buffer_size = 2 is not supported: a stream takes frames one by one"),
        ("use_denoising_batch: false", "a stream is a batch"),
        ("use_lcm_lora: true", "name it with lcm_lora_id"),
        ("acceleration: [1]", "acceleration must be one of"),
        ("mode: video", "mode must be one of"),
        ("ipadapter_config: {x: 1}", "ipadapters must each have an ipadapter_model_path"),
        ("ipadapters: [{ipadapter_model_path: x}]", "must each have a style_image"),
        ("ipadapters: [{ipadapter_model_path: x, style_img: y}]", "style_img is no setting: did you mean style_image?"),
        ("ipadapters: [{ipadapter_model_path: x, style_image: y, type: faceid}]", "no face recogniser is here"),
        ("ipadapters: [{ipadapter_model_path: x, style_image: y, weight_type: 3}]", "must be one of linear, ease in"),
        (
            "ipadapters: [{ipadapter_model_path: x, style_image: y, image_encoder_path: a},"
            " {ipadapter_model_path: x, style_image: y, image_encoder_path: b}]",
            "must have one image_encoder_path",
        ),
        ("t_index_list: x\nnum_inference_steps: 4", "must be whole numbers"),
        ("t_index_list: x", "config.yaml: t_index_list must be whole numbers"),
        ("cfg_type: odd", "config.yaml: cfg_type must be self or"),
        ("do_add_noise: 3", "config.yaml: do_add_noise must be True or False"),
        ("seed: x", "config.yaml: seed must be a whole number"),
        ("prompt: 3", "config.yaml: prompt must be a text"),
        ("seed_blending: [[1, -1]]", "config.yaml: a weight of seed_blending must be"),
        ("controlnets: [{model_id: x, conditioning_scale: y}]", "config.yaml: the scale of a controlnet must be"),
        ("ipadapters: [{ipadapter_model_path: x, style_image: y, scale: z}]", "the scale of ipadapters must be"),
        ("prompt_blending: {prompts: []}", "must be pairs, or have prompt_list"),
        ("lora_dict: [a]", "files with their scales"),
        ("- a", "is no settings"),
        ("a: [", "is no YAML"),
        ("delta: 1\nprompt: a\ndelta: 2", "config.yaml is no YAML that can be read: it names 'delta' twice"),
        ("lora_dict: {a: 1, b: 1, a: 0.5}", "it names 'a' twice"),
        ("a: !!python/object/apply:os.system [true]", "is no YAML"),
        ("[" * 3000, "is no YAML"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(NativesdError) as caught:
        read(tmp_path, text)
    assert isinstance(caught.value, UsageError | SourceError)
    assert words in str(caught.value)


def test_a_name_that_is_merged_may_be_said_again(tmp_path: Path) -> None:
    """Also where what merges it is merged itself before it is read, and where two are merged."""
    settings = read(
        tmp_path,
        """
        controlnets:
          - &edges {<<: &all {model_id: edges, conditioning_scale: 1, control_guidance_end: 0.9}, conditioning_scale: 2}
        controlnet_config: {<<: *edges, <<: {preprocessor: canny}, conditioning_scale: 0.7}
        """,
    )
    assert settings.stream["control"] == [Control("edges", scale=0.7, end=0.9, preprocess="canny")]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (
            "ipadapters: [{ipadapter_model_path: x, style_image: y, is_faceid: true}]",
            [],
            "pass image_prompts= in Python",
        ),
        ("guidance_scale: x", [], "config.yaml: guidance_scale must be a number"),
        ("dtype: int3", [], "dtype must be"),
        ("dtype: fp16", ["--dtype", "int3"], "--dtype must be"),
        ("delta: 2", ["--steps", "0"], "--steps must be"),
        ("steps: 2", ["--steps", "0"], "config.yaml: steps is no setting"),
    ],
)
def test_the_command_line_tells_whose_words_were_wrong(
    text: str, options: list[str], words: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(f"model_id: tiny\n{text}", encoding="utf-8")
    done = run("stream", "--config", "config.yaml", "--frames", "1", "--device", "cpu", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert ("--" in words) == ("--" in done.stderr)
