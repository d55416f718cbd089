"""A graph's run: what each node makes of its inputs, in the library's words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nativesd.config import SDXL_UNET
from nativesd.diffusion.control import Control
from nativesd.errors import UsageError
from nativesd.server.apis.comfy import adapters
from nativesd.server.apis.comfy.carried import Conditioning, Latents, ModelRef, Picture
from nativesd.server.apis.comfy.checking import Checked
from nativesd.server.apis.comfy.enlarging import by_model, followed, interpolated, require_within, resized, times
from nativesd.server.apis.comfy.files import Files
from nativesd.server.apis.comfy.masking import grown, holed
from nativesd.server.apis.comfy.nodes import NODES
from nativesd.server.jobs.job import Made
from nativesd.server.jobs.turn import PNG_LEVEL, Turn

if TYPE_CHECKING:
    from nativesd.pipeline.pipeline import Pipeline


@dataclass
class Prompt:
    """A graph as a job: what ComfyUI's queue and history tell of it. It is the work of the job."""

    number: int
    checked: Checked
    client: str
    extra: Mapping[str, Any]
    files: Files
    previews: bool
    outputs: dict[str, Any] = field(default_factory=dict)
    node: str | None = None
    """The one that runs, or failed."""

    def __call__(self, turn: Turn) -> None:
        """Run the graph."""
        graph = self.checked.graph
        kinds = [graph.kind(number) for number in self.checked.order]
        turn.plan(sum(kind.startswith("KSampler") for kind in kinds))
        run = _Run(self, turn)
        made: dict[str, Sequence[Any]] = {}
        for number, kind in zip(self.checked.order, kinds, strict=True):
            self.node = number
            turn.job.tell("node", node=number)
            inputs = {}
            for name, each in NODES[kind].inputs.items():
                if source := graph.link(number, name):
                    inputs[name] = made[source][graph.inputs(number)[name][1]]
                elif name in graph.inputs(number):
                    value = graph.inputs(number)[name]
                    inputs[name] = int(value) if each.kind == "INT" else value
            made[number] = RUN[kind](run, **inputs)
        self.node = None


class _Run:
    """The nodes, as functions."""

    def __init__(self, prompt: Prompt, turn: Turn) -> None:
        self.prompt, self.turn = prompt, turn

    def checkpoint(self, ckpt_name: str) -> Sequence[Any]:
        model = ModelRef(self.turn.shelf.catalogue.model(ckpt_name))
        return model, model, model

    def text(self, text: str, clip: ModelRef) -> Sequence[Any]:
        return (Conditioning(text, clip),)

    def empty(self, width: int, height: int, batch_size: int) -> Sequence[Any]:
        return (Latents(width, height, batch_size),)

    def lora(
        self, model: ModelRef, clip: ModelRef, lora_name: str, strength_model: float, strength_clip: float
    ) -> Sequence[Any]:
        file = self.turn.shelf.catalogue.lora(lora_name)
        if file in model.loras:
            raise UsageError(f"lora_name must be another one: {lora_name} is in the model already")
        return (
            replace(model, loras={**model.loras, file: strength_model}),
            replace(clip, loras={**clip.loras, file: strength_clip}),
        )

    def lora_of_model(self, model: ModelRef, lora_name: str, strength_model: float) -> Sequence[Any]:
        return self.lora(model, model, lora_name, strength_model, 0.0)[:1]

    def control(self, control_net_name: str) -> Sequence[Any]:
        return (self.turn.shelf.catalogue.control(control_net_name),)

    def steer(
        self,
        positive: Conditioning,
        negative: Conditioning,
        control_net: str,
        image: Sequence[Picture],
        strength: float,
        start_percent: float,
        end_percent: float,
        vae: ModelRef | None = None,
    ) -> Sequence[Any]:
        if start_percent > end_percent:
            raise UsageError("start_percent must be at most end_percent")
        control = Control(control_net, image[0].image, strength, start_percent, end_percent)
        return tuple(replace(each, controls=(*each.controls, control)) for each in (positive, negative))

    def encoder(self, clip_name: str) -> Sequence[Any]:
        return (self.turn.shelf.catalogue.image_encoder(clip_name),)

    def adapter(self, ipadapter_file: str) -> Sequence[Any]:
        return (self.turn.shelf.catalogue.image_adapter(ipadapter_file),)

    def preset(self, model: ModelRef, preset: str, ipadapter: str | None = None) -> Sequence[Any]:
        catalogue, unet = self.turn.shelf.catalogue, self._pipeline(model).config.unet
        name = adapters.preset_name(preset, list(catalogue.image_adapters), sdxl=unet.context == SDXL_UNET.context)
        return model, catalogue.image_adapter(name)

    def show(
        self, model: ModelRef, ipadapter: str, image: Sequence[Picture], weight: float, start_at: float, end_at: float,
        weight_type: str, attn_mask: Image.Image | None = None,
    ) -> Sequence[Any]:  # fmt: skip
        return self._shown(
            model, ipadapter, image, weight, start_at, end_at, adapters.SIMPLE[weight_type], attn_mask
        )  # fmt: skip

    def show_advanced(
        self, model: ModelRef, ipadapter: str, image: Sequence[Picture], weight: float, start_at: float, end_at: float,
        weight_type: str, combine_embeds: str, embeds_scaling: str, attn_mask: Image.Image | None = None,
        clip_vision: str | None = None,
    ) -> Sequence[Any]:  # fmt: skip
        if len(image) > 1 and combine_embeds != "concat":
            raise UsageError(f"combine_embeds must be concat for {len(image)} pictures")
        return self._shown(
            model, ipadapter, image, weight, start_at, end_at, adapters.ADVANCED[weight_type], attn_mask, clip_vision
        )

    def _shown(
        self, model: ModelRef, adapter: str, image: Sequence[Picture], weight: float, start: float, end: float,
        meaning: adapters.Meaning, mask: Image.Image | None, encoder: str | None = None,
    ) -> Sequence[Any]:  # fmt: skip
        pictures = [picture.image for picture in image]
        prompt = adapters.image_prompt(adapter, pictures, weight, start, end, meaning, mask)
        return (replace(model, image_prompts=(*model.image_prompts, (prompt, encoder))),)

    def cut(self, image: Sequence[Picture], interpolation: str, crop_position: str, sharpening: float) -> Sequence[Any]:
        return ([Picture(adapters.square(picture.image, crop_position, interpolation)) for picture in image],)

    def sample(
        self,
        model: ModelRef,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: Latents,
        denoise: float,
    ) -> Sequence[Any]:
        if denoise == 0:
            return (latent_image,)
        options: dict[str, Any] = {"strength": denoise, "steps_as": "all"}
        return self._sampled(
            model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, options
        )

    def sample_advanced(
        self, noise_seed: int, steps: int, start_at_step: int, add_noise: str, end_at_step: int,
        return_with_leftover_noise: str, **given: Any,
    ) -> Sequence[Any]:  # fmt: skip
        begins = (steps - start_at_step + 0.5) / steps  # of which `steps_as` "diffusers" takes the whole steps
        options: dict[str, Any] = {"strength": min(begins, 1.0), "steps_as": "diffusers"}
        if start_at_step and given["latent_image"].tensor is None and given["latent_image"].picture is None:
            raise UsageError("start_at_step must be 0 where latent_image is empty")
        return self._sampled(
            given["model"], noise_seed, steps, given["cfg"], given["sampler_name"], given["scheduler"],
            given["positive"], given["negative"], given["latent_image"], options,
        )  # fmt: skip

    def _sampled(
        self, model: ModelRef, seed: int, steps: int, cfg: float, sampler: str, scheduler: str,
        positive: Conditioning, negative: Conditioning, latents: Latents, start: dict[str, Any],
    ) -> Sequence[Any]:  # fmt: skip
        if replace(positive.clip, image_prompts=()) != replace(negative.clip, image_prompts=()):
            raise UsageError("positive and negative must come of one CLIP here, with the same LoRAs and last layer")
        if latents.tensor is not None and latents.mask is not None:
            raise UsageError("latent_image must be of VAEEncode where it has a mask, not of a sampler or larger")
        pipeline = self.turn.load(model.name)
        options: dict[str, Any] = {
            "negative_prompt": negative.text, "seed": seed, "num_images": latents.count, "steps": steps,
            "guidance_scale": cfg, "sampler": sampler, "schedule": scheduler, "noise": "comfyui",
            "emphasis": "comfyui", "clip_skip": positive.clip.clip_skip,
            "loras": [(file, scale, positive.clip.loras.get(file, 0.0)) for file, scale in model.loras.items()],
            "control": list(positive.controls), "lora_dirs": list(self.prompt.files.lora_dirs),
            **adapters.options_of(pipeline, model.image_prompts),
        }  # fmt: skip
        if latents.tensor is not None:
            options |= {"latents": latents.tensor, **start}
        elif latents.picture is not None:
            options |= {"image": latents.picture, **start}
            options |= {} if latents.mask is None else {"mask": latents.mask}
        else:
            factor = pipeline.config.vae.factor
            options |= {"width": latents.width // factor * factor, "height": latents.height // factor * factor}
        result = self.turn.make(pipeline, positive.text, **options)
        self.turn.job.notes += result.parameters["notes"]
        size = result.images[0].size
        return (Latents(*size, len(result.images), result.latents, mask=latents.mask, result=result),)

    def decode(self, samples: Latents, vae: ModelRef) -> Sequence[Any]:
        result = samples.result
        if result is not None:
            images = enumerate(result.images)
            return ([Picture(image, result.infotext(i), result.seeds[i]) for i, image in images],)
        if samples.picture is not None:
            return ([Picture(samples.picture)],)
        if samples.tensor is None:
            raise UsageError("samples must be latents of a sampler or a picture: an empty latent has no picture")
        return ([Picture(image) for image in self._pipeline(vae).decode(samples.tensor)],)

    def encode(self, pixels: Sequence[Picture], vae: ModelRef) -> Sequence[Any]:
        image = pixels[0].image.convert("RGB")
        return (Latents(*image.size, picture=image),)

    def encode_holed(
        self, pixels: Sequence[Picture], vae: ModelRef, mask: Image.Image, grow_mask_by: int
    ) -> Sequence[Any]:
        image = pixels[0].image.convert("RGB")
        return (Latents(*image.size, picture=holed(image, mask), mask=grown(mask, image.size, grow_mask_by)),)

    def set_mask(self, samples: Latents, mask: Image.Image) -> Sequence[Any]:
        if samples.picture is None:
            raise UsageError("samples must be of VAEEncode where they have a mask")
        return (replace(samples, mask=mask.resize(samples.picture.size, Image.Resampling.BILINEAR)),)

    def inpaint(
        self, positive: Conditioning, negative: Conditioning, vae: ModelRef, pixels: Sequence[Picture],
        mask: Image.Image, noise_mask: bool = True,
    ) -> Sequence[Any]:  # fmt: skip
        if not noise_mask:
            raise UsageError("noise_mask must be true here: what the mask leaves is kept")
        image = pixels[0].image.convert("RGB")
        return positive, negative, Latents(*image.size, picture=image, mask=grown(mask, image.size, 0))

    def load(self, image: str) -> Sequence[Any]:
        from nativesd.pictures.images import read_image

        picture = self.prompt.files.picture(image)
        return [Picture(read_image(picture))], adapters.channel(picture, "alpha")

    def mask(self, image: str, channel: str) -> Sequence[Any]:
        return (adapters.channel(self.prompt.files.picture(image), channel),)

    def upscale(self, samples: Latents, upscale_method: str, width: int, height: int, crop: str) -> Sequence[Any]:
        """As ComfyUI's nodes.py (LatentUpscale) and comfy/utils.py (common_upscale)."""
        if not width and not height:
            return (samples,)
        width, height = followed((samples.width, samples.height), width, height, 64)
        require_within((width, height), self.turn.shelf.limits.side)
        if samples.tensor is None and samples.picture is None:
            return (replace(samples, width=width, height=height),)
        tensor = samples.tensor
        if tensor is None:
            from nativesd.pictures.images import to_tensor

            assert samples.picture is not None
            tensor = self._pipeline(None).encode_tensor(to_tensor([samples.picture]))[0]
        rows, columns = tensor.shape[2:]
        cells = (max(height * rows // samples.height, 1), max(width * columns // samples.width, 1))
        larger = interpolated(tensor, cells, upscale_method, crop)
        return (Latents(width, height, len(larger), larger, mask=samples.mask),)

    def upscale_by(self, samples: Latents, upscale_method: str, scale_by: float) -> Sequence[Any]:
        return self.upscale(samples, upscale_method, *times((samples.width, samples.height), scale_by), "disabled")

    def upscaler(self, model_name: str) -> Sequence[Any]:
        return (self.turn.shelf.catalogue.upscaler(model_name, ()),)

    def enlarge(self, upscale_model: str, image: Sequence[Picture]) -> Sequence[Any]:
        return (by_model(self.turn, upscale_model, image),)

    def scale(self, image: Sequence[Picture], upscale_method: str, width: int, height: int, crop: str) -> Sequence[Any]:
        if not width and not height:
            return (image,)
        sizes = [followed(each.image.size, width, height, 1) for each in image]
        return (
            [resized(self.turn, each, upscale_method, size, crop) for each, size in zip(image, sizes, strict=True)],
        )

    def scale_by(self, image: Sequence[Picture], upscale_method: str, scale_by: float) -> Sequence[Any]:
        return (
            [resized(self.turn, each, upscale_method, times(each.image.size, scale_by), "disabled") for each in image],
        )

    def skip(self, clip: ModelRef, stop_at_clip_layer: int) -> Sequence[Any]:
        return (replace(clip, clip_skip=-stop_at_clip_layer),)

    def _pipeline(self, ref: ModelRef | None) -> Pipeline:
        return self.turn.load(None if ref is None else ref.name)

    def save(self, images: Sequence[Picture], filename_prefix: str = "ComfyUI", kind: str = "output") -> Sequence[Any]:
        graph = json.dumps(self.prompt.checked.graph.nodes)
        made = [_file(picture, graph) for picture in images]
        names = self.prompt.files.keep(made, filename_prefix, kind)
        self.turn.job.pictures += made
        node = self.prompt.node
        assert node is not None
        self.prompt.outputs[node] = {"images": [{"filename": n, "subfolder": "", "type": kind} for n in names]}
        self.turn.job.tell("output", node=node, output=self.prompt.outputs[node])
        return ()

    def preview(self, images: Sequence[Picture]) -> Sequence[Any]:
        return self.save(images, "ComfyUI_temp", "temp")


def _file(picture: Picture, graph: str) -> Made:
    """A PNG with the graph, as ComfyUI writes it, and A1111's text where a sampler made it."""
    chunk, data = PngInfo(), BytesIO()
    chunk.add_text("prompt", graph)
    if picture.infotext:
        chunk.add_text("parameters", picture.infotext)
    picture.image.save(data, format="PNG", pnginfo=chunk, compress_level=PNG_LEVEL)
    return Made(data.getvalue(), picture.infotext, picture.seed, *picture.image.size)


RUN: Mapping[str, Callable[..., Sequence[Any]]] = {
    "CheckpointLoaderSimple": _Run.checkpoint, "CLIPTextEncode": _Run.text, "EmptyLatentImage": _Run.empty,
    "KSampler": _Run.sample, "KSamplerAdvanced": _Run.sample_advanced, "VAEDecode": _Run.decode,
    "VAEEncode": _Run.encode, "LoadImage": _Run.load, "SaveImage": _Run.save, "PreviewImage": _Run.preview,
    "LoraLoader": _Run.lora, "ControlNetLoader": _Run.control, "ControlNetApplyAdvanced": _Run.steer,
    "LatentUpscale": _Run.upscale, "LoadImageMask": _Run.mask, "CLIPVisionLoader": _Run.encoder,
    "IPAdapterModelLoader": _Run.adapter, "IPAdapterUnifiedLoader": _Run.preset, "IPAdapter": _Run.show,
    "IPAdapterAdvanced": _Run.show_advanced, "PrepImageForClipVision": _Run.cut,
    "LatentUpscaleBy": _Run.upscale_by, "UpscaleModelLoader": _Run.upscaler,
    "ImageUpscaleWithModel": _Run.enlarge, "ImageScale": _Run.scale, "ImageScaleBy": _Run.scale_by,
    "VAEEncodeForInpaint": _Run.encode_holed, "SetLatentNoiseMask": _Run.set_mask,
    "InpaintModelConditioning": _Run.inpaint, "CLIPSetLastLayer": _Run.skip, "LoraLoaderModelOnly": _Run.lora_of_model,
}  # fmt: skip
