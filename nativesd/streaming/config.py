"""The settings of StreamDiffusion and its forks, from their YAML to the options of a model and a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nativesd.diffusion.control import Control
from nativesd.diffusion.images.layers import PUBLISHED
from nativesd.diffusion.images.prompts import ImagePrompt
from nativesd.errors import SourceError, UsageError, install_line, quote, said_in
from nativesd.reading import read_bounded
from nativesd.sampling.published import SchedulerConfig
from nativesd.streaming.ladder import timesteps_of_indices
from nativesd.streaming.options import check_option
from nativesd.streaming.similar import Similar

MAX_BYTES = 1 << 20
MERGE = "tag:yaml.org,2002:merge"
"""Of the name `<<`, by which a mapping has all that others have."""
BACKENDS = {"none": "torch", "xformers": "torch", "tensorrt": "tensorrt"}
PASSED = {"passthrough", "none", "external", ""}
"""Preprocessors of theirs that do nothing."""


@dataclass
class Settings:
    """What a file asks for: the model, the options of `nativesd.load`, and those of `Pipeline.stream`."""

    model: str | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)


def read_settings(path: str | Path) -> Settings:
    """Read a file of settings. Raises SourceError for what is none, UsageError for a setting that cannot be."""
    try:
        import yaml
    except ImportError as error:
        raise UsageError(f"settings in YAML need PyYAML: {install_line('stream')}") from error

    class Loader(yaml.SafeLoader):
        """Refuses a name that stands twice, as YAML does (1.2.2, 3.2.1.1); of such PyYAML takes the last."""

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)  # what `<<` merges is not in it yet, and may be overridden
            counts = Counter(
                key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE
            )
            for name, count in counts.most_common(1):
                if count > 1:
                    raise yaml.MarkedYAMLError(problem=f"it names {quote(name)} twice", problem_mark=node.start_mark)
            return node

    with said_in(str(path)):
        raw = read_bounded(Path(path), MAX_BYTES, "file of settings")
        try:
            data = yaml.load(raw, Loader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            first = str(error).partition("\n")[0]
            raise SourceError(f"{path} is no YAML that can be read: {first}") from error
        if not isinstance(data, dict):
            raise SourceError(f"{path} is no settings: it must have names with values")
        return _Reader(str(path), data).settings()


def _same(name: str) -> Callable[[Settings, Any], None]:
    return lambda settings, value: settings.stream.update({name: value})


def _at_load(name: str) -> Callable[[Settings, Any], None]:
    return lambda settings, value: settings.loading.update({name: value})


def _placed(named: Any, what: str) -> str:
    """A path, or a place in a repository of the hub, of which h94/IP-Adapter stands for what it has for SD1.5."""
    return f"{named}/models/{what}" if named == "h94/IP-Adapter" else str(named)


class _Reader:
    """One file's settings."""

    def __init__(self, path: str, data: Mapping[Any, Any]) -> None:
        self.path, self.data = path, {str(key): value for key, value in data.items()}
        self.known: dict[str, Callable[[Settings, Any], None]] = {
            "model_id": self._model, "model_id_or_path": self._model,
            "prompt": self._prompt, "negative_prompt": _same("negative_prompt"), "width": _same("width"),
            "height": _same("height"), "guidance_scale": _same("guidance_scale"), "delta": _same("delta"),
            "seed": _same("seed"), "cfg_type": _same("residual"), "do_add_noise": _same("renoise"),
            "t_index_list": self._indices, "num_inference_steps": lambda *_: None,
            "device": _at_load("device"), "dtype": self._dtype, "acceleration": self._acceleration,
            "engine_dir": _at_load("engines"), "vae_id": _at_load("vae"),
            "use_tiny_vae": lambda settings, value: settings.loading.update({"vae": "taesd"} if value else {}),
            "use_lcm_lora": self._lcm, "lcm_lora_id": lambda *_: None, "lora_dict": self._loras,
            "use_denoising_batch": self._only("use_denoising_batch", True, "a stream is a batch of its steps"),
            "frame_buffer_size": self._only("frame_buffer_size", 1, "a stream takes frames one by one"),
            "use_safety_checker": self._only("use_safety_checker", False, "there is no safety checker"),
            "skip_diffusion": self._only("skip_diffusion", False, "a stream diffuses"),
            "mode": self._one_of("mode", "img2img", "txt2img"),
            "output_type": self._one_of("output_type", "pil", "np", "pt", "latent"),
            "warmup": lambda *_: None,
            "build_engines_if_missing": self._only("build_engines_if_missing", False, "they are built beforehand"),
            "enable_similar_image_filter": self._similar, "similar_image_filter_threshold": lambda *_: None,
            "similar_image_filter_max_skip_frame": lambda *_: None,
            "use_controlnet": lambda *_: None, "controlnets": self._controls, "controlnet_config": self._controls,
            "prompt_blending": self._blending, "seed_blending": self._seeds,
            "use_ipadapter": lambda *_: None, "ipadapters": self._adapters, "ipadapter_config": self._adapters,
        }  # fmt: skip

    def settings(self) -> Settings:
        """All of them."""
        out = Settings()
        for name, value in self.data.items():
            if name not in self.known:
                raise self._unknown(name, self.known)
            if value is None:
                continue
            before = dict(out.stream)
            self.known[name](out, value)
            for option, asked in out.stream.items():
                if asked is not before.get(option):
                    check_option(option, asked, name.removesuffix("s") if option == "control" else name)
        return out

    def _unknown(self, name: str, known: Collection[str], where: str = "") -> UsageError:
        close = get_close_matches(name, known, 1)
        return self._wrong(where + name, "is no setting" + (f": did you mean {close[0]}?" if close else ""))

    def _wrong(self, name: str, why: str) -> UsageError:
        return UsageError(f"{name} {why}")

    def _only(self, name: str, wanted: Any, why: str) -> Callable[[Settings, Any], None]:
        def check(_: Settings, value: Any) -> None:
            if value != wanted:
                raise self._wrong(name, f"= {quote(value)} is not supported: {why}")

        return check

    def _one_of(self, name: str, *words: str) -> Callable[[Settings, Any], None]:
        def check(_: Settings, value: Any) -> None:
            if value not in words:
                raise self._wrong(name, f"must be one of {', '.join(words)}, not {quote(value)}")

        return check

    def _model(self, settings: Settings, value: Any) -> None:
        settings.model = str(value)

    def _prompt(self, settings: Settings, value: Any) -> None:
        settings.stream["prompts" if isinstance(value, list) else "prompt"] = value

    def _indices(self, settings: Settings, value: Any) -> None:
        steps = self.data.get("num_inference_steps") or 50
        if steps == 50:
            settings.stream["t_index_list"] = value
            return
        if not isinstance(value, list) or not all(isinstance(each, int) for each in [*value, steps]):
            raise self._wrong("t_index_list", "must be whole numbers, and num_inference_steps one")
        settings.stream["timesteps"] = timesteps_of_indices(SchedulerConfig(), value, steps)

    def _dtype(self, settings: Settings, value: Any) -> None:
        short = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
        settings.loading["dtype"] = short.get(str(value), str(value))

    def _acceleration(self, settings: Settings, value: Any) -> None:
        if not isinstance(value, str) or value not in BACKENDS:
            raise self._wrong("acceleration", f"must be one of {', '.join(BACKENDS)}, not {quote(value)}")
        settings.loading["backend"] = BACKENDS[value]

    def _lcm(self, settings: Settings, value: Any) -> None:
        if not value:
            return
        tiny = self.data.get("model_id", self.data.get("model_id_or_path")) == "tiny"
        file = self.data.get("lcm_lora_id") or ("tiny-lcm" if tiny else None)
        if file is None:
            raise self._wrong("use_lcm_lora", "needs the LoRA's file here: name it with lcm_lora_id")
        settings.loading.setdefault("loras", []).append(str(file))

    def _loras(self, settings: Settings, value: Any) -> None:
        if not isinstance(value, dict):
            raise self._wrong("lora_dict", "must have files with their scales")
        settings.loading.setdefault("loras", []).extend((str(file), scale) for file, scale in value.items())

    def _similar(self, settings: Settings, value: Any) -> None:
        if value:
            settings.stream["skip_similar"] = Similar(
                threshold=self.data.get("similar_image_filter_threshold", 0.98),
                max_skip=self.data.get("similar_image_filter_max_skip_frame", 10), measure="cosine",
            )  # fmt: skip

    def _controls(self, settings: Settings, value: Any) -> None:
        if self.data.get("use_controlnet") is False:
            return
        each = value if isinstance(value, list) else [value]
        settings.stream["control"] = [control for one in each if (control := self._control(one)) is not None]

    def _control(self, value: Any) -> Control | None:
        known = {"model_id", "preprocessor", "preprocessor_params", "conditioning_scale", "enabled", "control_image",
                 "control_guidance_start", "control_guidance_end"}  # fmt: skip
        if not isinstance(value, dict) or "model_id" not in value:
            raise self._wrong("controlnets", "must each have a model_id")
        for name in value:
            if name not in known:
                raise self._unknown(str(name), known, "controlnets: ")
        if value.get("preprocessor_params"):
            raise self._wrong("controlnets: preprocessor_params", "cannot be set: they run with their own values")
        if value.get("enabled") is False:
            return None
        named = str(value.get("preprocessor") or "")
        return Control(
            str(value["model_id"]), value.get("control_image"), scale=value.get("conditioning_scale", 1.0),
            start=value.get("control_guidance_start", 0.0), end=value.get("control_guidance_end", 1.0),
            preprocess=None if named in PASSED else named,
        )  # fmt: skip

    def _adapters(self, settings: Settings, value: Any) -> None:
        if self.data.get("use_ipadapter") is False:
            return
        each = [self._adapter(one) for one in (value if isinstance(value, list) else [value])]
        asked = [one for one in each if one is not None]
        settings.stream["image_prompts"] = [prompt for prompt, _ in asked]
        encoders = {encoder for _, encoder in asked if encoder is not None}
        if len(encoders) > 1:
            raise self._wrong("ipadapters", "must have one image_encoder_path: a stream asks one image encoder")
        if encoders:
            settings.stream["image_encoder"] = encoders.pop()

    def _adapter(self, value: Any) -> tuple[ImagePrompt, str | None] | None:
        """An IP-Adapter with its picture, and its image encoder."""
        known = {"ipadapter_model_path", "image_encoder_path", "style_image", "scale", "weight_type", "enabled", "type",
                 "is_faceid", "num_image_tokens", "insightface_model_name", "style_image_key"}  # fmt: skip
        if not isinstance(value, dict) or "ipadapter_model_path" not in value:
            raise self._wrong("ipadapters", "must each have an ipadapter_model_path")
        for name in value:
            if name not in known:
                raise self._unknown(str(name), known, "ipadapters: ")
        if value.get("enabled") is False:
            return None
        if value.get("type", "regular") not in ("regular", "plus") or value.get("is_faceid"):
            raise self._wrong(
                "ipadapters", "cannot be of faces: no face recogniser is here; pass image_prompts= in Python"
            )
        if (picture := value.get("style_image")) is None:
            raise self._wrong("ipadapters", "must each have a style_image, the picture that they are shown")
        beside = Path(self.path).parent / str(picture)
        named = value.get("weight_type") or "linear"
        if not isinstance(named, str) or named not in PUBLISHED:
            raise self._wrong("ipadapters: weight_type", f"must be one of {', '.join(PUBLISHED)}, not {quote(named)}")
        weight_type, layers = PUBLISHED[named]
        encoder = value.get("image_encoder_path")
        prompt = ImagePrompt(
            _placed(value["ipadapter_model_path"], "ip-adapter_sd15.bin"), beside if beside.is_file() else str(picture),
            value.get("scale", 1.0), layers=layers, weight_type=weight_type,
        )  # fmt: skip
        return prompt, None if encoder is None else _placed(encoder, "image_encoder")

    def _blending(self, settings: Settings, value: Any) -> None:
        pairs, how = self._blend("prompt_blending", value, "prompt_list", "interpolation_method")
        settings.stream.pop("prompt", None)
        settings.stream["prompts"] = pairs
        if how is not None:
            settings.stream["blend"] = how

    def _seeds(self, settings: Settings, value: Any) -> None:
        settings.stream.pop("seed", None)
        settings.stream["seeds"], _ = self._blend("seed_blending", value, "seed_list", "interpolation_method")

    def _blend(self, name: str, value: Any, pairs: str, how: str) -> tuple[Any, Any]:
        if isinstance(value, list):
            return value, None
        if not isinstance(value, dict) or pairs not in value:
            raise self._wrong(name, f"must be pairs, or have {pairs}")
        known = {pairs, how, "enable_caching", "normalize_weights"}
        for each in value:
            if each not in known:
                raise self._unknown(str(each), known, f"{name}: ")
        return value[pairs], value.get(how)
