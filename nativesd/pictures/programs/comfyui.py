"""ComfyUI's graphs: the common nodes between a sampler and what it is given; others are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nativesd.pictures.embedded import Texts
from nativesd.pictures.infotext import IMAGE_MODULE, write_unit
from nativesd.pictures.programs.parts import unit
from nativesd.pictures.programs.recipe import Recipe, integer, json_object, lora_tag, real

SAMPLERS = ("KSampler", "KSamplerAdvanced")
CHECKPOINTS = ("CheckpointLoaderSimple", "CheckpointLoader", "unCLIPCheckpointLoader", "ImageOnlyCheckpointLoader")
PASSED = (
    "VAEDecode", "VAEDecodeTiled", "Reroute", "SaveImage", "PreviewImage", "EmptyLatentImage", "VAELoader",
    "IPAdapterUnifiedLoader",
)  # fmt: skip
LAYERS = ("style transfer", "composition", "style and composition")
WEIGHT_TYPES = {"standard": None, "linear": None, "None": None, "prompt is more important": "ease out"}
"""Of cubiq/ComfyUI_IPAdapter_plus: weight types that say where a picture acts, and such as have other names here."""
UPSCALES = {"nearest-exact": "latent (nearest-exact)", "bilinear": "latent", "bicubic": "latent (bicubic)"}


@dataclass
class Graph:
    """The nodes of a prompt by their numbers, and those that were met and not understood."""

    nodes: Mapping[str, Any]
    strange: list[str] = field(default_factory=list)

    def kind(self, number: str) -> str:
        """The class of a node."""
        node = self.nodes.get(number)
        return str(node.get("class_type", "")) if isinstance(node, dict) else ""

    def inputs(self, number: str) -> dict[str, Any]:
        """A node's inputs: values, and links as [node, output]."""
        node = self.nodes.get(number)
        inputs = node.get("inputs") if isinstance(node, dict) else None
        return inputs if isinstance(inputs, dict) else {}

    def link(self, number: str, name: str) -> str:
        """The node that an input comes from; empty where it is a value or not there."""
        value = self.inputs(number).get(name)
        return str(value[0]) if isinstance(value, list) and len(value) == 2 else ""

    def value(self, number: str, name: str) -> Any:
        """An input's value, of the node of its own that it may come from (primitives, strings, seeds)."""
        seen: set[str] = set()
        while source := self.link(number, name):
            inputs = self.inputs(source)
            options = [each for each in (name, "value", "text", "string", "seed", "Value") if each in inputs]
            if source in seen or not options:
                self.strange.append(self.kind(source))
                return None
            seen.add(source)
            number, name = source, options[0]
        return self.inputs(number).get(name)

    def above(self, number: str) -> Iterator[str]:
        """All nodes that one depends on, the nearest first."""
        waiting, seen = [number], {number}
        while waiting:
            current = waiting.pop(0)
            for name in self.inputs(current):
                source = self.link(current, name)
                if source and source not in seen:
                    seen.add(source)
                    waiting.append(source)
                    yield source


def read(texts: Texts) -> Recipe | None:
    """The recipe of the last pass; None: there is no graph with a common sampler."""
    nodes = json_object(texts.chunks.get("prompt", "")) or json_object(texts.parameters)
    if nodes is None:
        return None
    graph = Graph(nodes)
    samplers = [number for number in nodes if graph.kind(number) in SAMPLERS]
    earlier = {above for number in samplers for above in graph.above(number)}
    last = [number for number in samplers if number not in earlier]
    if not last:
        return None
    recipe = Recipe("ComfyUI", options={"noise": "comfyui", "emphasis": "comfyui"})
    if len(last) > 1:
        recipe.unheeded.append(f"{len(last)} pictures of one graph (taken: the first)")
    final = last[0]
    first = _first_pass(graph, final)
    _read_pass(graph, first, recipe)
    if first != final:
        _read_second(graph, final, recipe)
    recipe.unheeded += [kind for kind in dict.fromkeys(graph.strange) if kind]
    return recipe


def _first_pass(graph: Graph, final: str) -> str:
    """The sampler whose latents the last one enlarges; itself where it begins from an empty latent or a picture."""
    source = graph.link(final, "latent_image")
    while graph.kind(source) in ("LatentUpscale", "LatentUpscaleBy", "Reroute"):
        source = graph.link(source, "samples") or next(graph.above(source), "")
    return source if graph.kind(source) in SAMPLERS else final


def _read_pass(graph: Graph, number: str, recipe: Recipe) -> None:
    options = recipe.options
    options["seed"] = integer("seed", graph.value(number, "seed") or graph.value(number, "noise_seed") or 0)
    for name, option in (("steps", "steps"), ("cfg", "guidance_scale"), ("sampler_name", "sampler"),
                         ("scheduler", "schedule")):  # fmt: skip
        if (value := graph.value(number, name)) is not None:
            options[option] = value
    if graph.kind(number) == "KSamplerAdvanced":
        recipe.unheeded.append("start_at_step and end_at_step of KSamplerAdvanced (taken: all steps)")
    recipe.prompt = _text(graph, graph.link(number, "positive"))
    recipe.negative_prompt = _text(graph, graph.link(number, "negative"))
    latents = graph.link(number, "latent_image")
    if graph.kind(latents).startswith("Empty"):
        options |= {side: integer(side, graph.value(latents, side) or 512) for side in ("width", "height")}
        if (pictures := integer("batch_size", graph.value(latents, "batch_size") or 1)) > 1:
            options["num_images"] = pictures
    elif "VAEEncode" in graph.kind(latents):
        recipe.need_picture(graph.value(number, "denoise") or 1.0, "all")
    elif latents:
        graph.strange.append(graph.kind(latents))
    _read_model(graph, number, recipe)


def _read_model(graph: Graph, number: str, recipe: Recipe) -> None:
    """The checkpoint and what stands between it and the sampler."""
    tags = []
    source = graph.link(number, "model")
    while source:
        kind = graph.kind(source)
        if kind in CHECKPOINTS or kind == "UNETLoader":
            recipe.options["model"] = str(graph.value(source, "ckpt_name") or graph.value(source, "unet_name"))
            break
        if kind in ("LoraLoader", "LoraLoaderModelOnly"):
            unet = graph.value(source, "strength_model")
            text = graph.value(source, "strength_clip") if kind == "LoraLoader" else 0
            tags.append(lora_tag(graph.value(source, "lora_name"), unet, text))
        elif kind not in PASSED:
            graph.strange.append(_named(graph, source))
        source = graph.link(source, "model")
    recipe.prompt = " ".join([recipe.prompt, *reversed(tags)])
    for each in graph.above(graph.link(number, "positive")):
        if graph.kind(each) == "CLIPSetLastLayer":
            recipe.options["clip_skip"] = -integer("stop_at_clip_layer", graph.value(each, "stop_at_clip_layer"))


def _text(graph: Graph, number: str) -> str:
    """The prompt of a conditioning; what combines, places and changes several is named, and the nearest taken."""
    waiting, found = [number], list[str]()
    while waiting and not found:
        current = waiting.pop(0)
        kind = graph.kind(current)
        if kind in ("CLIPTextEncode", "CLIPTextEncodeSDXL"):
            name = "text" if kind == "CLIPTextEncode" else "text_g"
            found.append(str(graph.value(current, name) or "").strip())
        elif current:
            graph.strange.append(_named(graph, current))
            waiting += [graph.link(current, name) for name in graph.inputs(current) if "condition" in name]
    return found[0] if found else ""


def _named(graph: Graph, number: str) -> str:
    """A node by its class, with the options that do what it does where it acts by a picture."""
    kind = graph.kind(number)
    fields: dict[str, object] = {}
    if kind in ("IPAdapter", "IPAdapterAdvanced"):
        source = graph.link(number, "ipadapter")
        named = str(graph.value(number, "weight_type"))
        layers = named if named in LAYERS else None
        fields = {
            "Module": IMAGE_MODULE,
            "Model": graph.value(source, "ipadapter_file") or graph.value(source, "preset"),
            "Weight": _short(graph.value(number, "weight")),
            "Guidance Start": _short(graph.value(number, "start_at")),
            "Guidance End": _short(graph.value(number, "end_at")),
            "Layers": layers,
            "Weight Type": None if layers else WEIGHT_TYPES.get(named, named),
            "Masks": 1 if graph.link(number, "attn_mask") else None,
        }
    elif kind in ("ControlNetApply", "ControlNetApplyAdvanced"):
        fields = {
            "Module": "none",
            "Model": graph.value(graph.link(number, "control_net"), "control_net_name"),
            "Weight": _short(graph.value(number, "strength")),
            "Guidance Start": _short(graph.value(number, "start_percent")),
            "Guidance End": _short(graph.value(number, "end_percent")),
        }
    words = unit(write_unit(fields))
    return f"{kind}: {words}" if words else kind


def _short(value: Any) -> str | None:
    """A number in few digits; None where it is none."""
    return f"{value:g}" if isinstance(value, int | float) else None


def _read_second(graph: Graph, number: str, recipe: Recipe) -> None:
    """The pass over the enlarged latents: ComfyUI runs all its steps, the last of int(steps / denoise), as hires."""
    source = graph.link(number, "latent_image")
    method = str(graph.value(source, "upscale_method"))
    hires: dict[str, Any] = {
        "upscaler": UPSCALES.get(method, method), "strength": real("denoise", graph.value(number, "denoise") or 1.0),
        "steps": integer("steps", graph.value(number, "steps") or 20),
        "prompt": _text(graph, graph.link(number, "positive")),
        "negative_prompt": _text(graph, graph.link(number, "negative")),
    }  # fmt: skip
    same = {"sampler_name": "sampler", "scheduler": "schedule", "cfg": "guidance_scale"}
    hires |= {same[name]: value for name in same if (value := graph.value(number, name)) is not None}
    if graph.kind(source) == "LatentUpscaleBy":
        hires["upscale"] = real("scale_by", graph.value(source, "scale_by"))
    else:
        hires |= {side: integer(side, graph.value(source, side) or 0) for side in ("width", "height")}
    recipe.options["hires"] = hires
    recipe.unheeded.append("seed of the second pass (taken: that of the first)")
    model = Recipe("ComfyUI")
    _read_model(graph, number, model)
    if (other := model.options.get("model")) != recipe.options.get("model"):
        recipe.unheeded.append(f"model of the second pass {other} (taken: that of the first)")
