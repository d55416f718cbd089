"""Settings of StreamDiffusion and its forks: every one is honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nativesd
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
        ("ipadapter_config: {x: 1}", "IP-Adapters are given as image_prompts="),
        ("t_index_list: x\nnum_inference_steps: 4", "must be whole numbers"),
        ("prompt_blending: {prompts: []}", "must be pairs, or have prompt_list"),
        ("lora_dict: [a]", "files with their scales"),
        ("- a", "is no settings"),
        ("a: [", "is no YAML"),
        ("a: !!python/object/apply:os.system [true]", "is no YAML"),
        ("[" * 3000, "is no YAML"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(NativesdError) as caught:
        read(tmp_path, text)
    assert isinstance(caught.value, UsageError | SourceError)
    assert words in str(caught.value)
