"""From a prompt, and maybe a picture, to pictures: what a call can ask for, checked and put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from nativesd.diffusion.control import ControlModel
from nativesd.diffusion.guiding.combine import Guidance
from nativesd.diffusion.guiding.guiders import check_guiders
from nativesd.diffusion.model import Job
from nativesd.diffusion.prompting import SDXL
from nativesd.diffusion.start import Start
from nativesd.diffusion.turns import take_turns
from nativesd.errors import Interrupted, UsageError
from nativesd.latents.preview import Step
from nativesd.pictures import images
from nativesd.pictures.result import Result
from nativesd.pictures.soft import SoftMask
from nativesd.pipeline.asked.arguments import CallOptions, Checked, Prompt, check, signed
from nativesd.pipeline.asked.chosen import choose, recorded
from nativesd.pipeline.asked.hires import Hires
from nativesd.pipeline.asked.inputs import read_inputs, require_combined
from nativesd.pipeline.asked.placed import placed
from nativesd.pipeline.asked.tagged import tagged_prompts
from nativesd.pipeline.each import by_prompt, finished, joined
from nativesd.pipeline.plan import Plan
from nativesd.pipeline.twice import Twice
from nativesd.tuning.memory import memory_explained

if TYPE_CHECKING:
    from nativesd.export.library import BackendName
    from nativesd.streaming.options import StreamOptions
    from nativesd.streaming.stream import Stream

STRENGTH = 0.8  # of image-to-image where none is asked for, as in diffusers


class Pipeline(Twice):
    """A loaded model that makes pictures when it is called. See `Diffusion` for what it consists of."""

    _ending: Event | None = None
    """Set to end the call that is running; None where none is."""

    @signed(CallOptions)
    @memory_explained()
    @torch.inference_mode()
    def __call__(self, prompt: Prompt, **options: Unpack[CallOptions]) -> Result:
        """Make pictures of `prompt`, or of each of several.

        width, height   pixels, multiples of the VAE's factor (8 as published); default: the size of `image`, else what
                        the model was trained on
        steps           default 20 (few-step models: 4)
        guidance_scale  classifier-free guidance; 1 and below: off. Default 7.5, SDXL 5, few-step models off, "tiny" 3
        guidance        more of it: one or several of PAG, SEG, SLG, APG, TCFG, DynamicThreshold, Interval, FreeU, or
                        their texts, such as "pag:3"
        savings         less time for a little of the picture: `DeepCache`, `TokenMerging`, `HyperTile`, or a text
                        such as "deepcache:2"
        sampler         such as "Euler a", "DPM++ 2M Karras" or a published class's name; default: the model's own
        schedule        such as "karras"; default: the model's own. `nativesd samplers` lists both
        negative_prompt what the pictures should not show: a text, or one for each prompt
        regions         prompts for parts of the picture: `Region`s, with boxes or masks
        tiling          "xy", "x" or "y": the picture joins with itself along these axes
        tiles           work window by window: `Tiles`, or a window's pixels; for pictures larger than a model makes
        seed            of the first picture, picture i has seed + i; or one for each picture. Default, and -1: random
        num_images      pictures of each prompt; all are made as one batch. Default 1, or as many as seeds are listed
        latents         clean latents to begin from instead of `image`, as `Result.latents` has them
        image           a picture to begin from (PIL, array, path): image-to-image, inpainting, an edit for an
                        instruct-pix2pix model; or a list with one for each prompt
        mask            white where `image` is painted anew; or a list
        strength        how much of `image` is given up, 0 to 1. Default 0.8; with a mask or an outpainted border 1
        steps_as        how `strength` counts steps: as "diffusers" (the default), as "a1111", which takes one more; or
                        "all" of `steps` are taken whatever it is
        image_guidance_scale  how much an instruct-pix2pix model keeps to `image`
        resize          how `image` comes to another size: "resize", "crop" (the middle) or "fill" (a border)
        outpaint        pixels to add to `image` on the left, top, right and bottom
        mask_blur       pixels over which the repainted part fades into the picture
        mask_fill       what is under `mask` at first: "original", "fill" (the colours around it), "noise" or "nothing"
        only_masked     repaint only what `mask` covers, and so many pixels around it, at `width` x `height`, and put it
                        back into the whole picture
        soft_inpaint    paint the greys of `mask` by degrees, and blend by what changed: True, or a `SoftInpaint`
        hires           a second pass at a larger size: a `Hires`, or its scale
        refiner         an SDXL refiner, loaded, which takes the last steps
        refiner_at      from how far on it takes them, 0 to 1. Default 0.8
        loras           files, or (file, scale), or (file, scale of the UNet's part, of the text encoders'): merged into
                        the weights for this call and taken out, to the bit, when a later one does not name them.
                        Default: those named at load
        partial         apply LoRAs of which only a part fits, and name the rest in a warning; default: refuse them
        lora_dirs       folders in which LoRAs are that prompts name, as <lora:name:0.8>
        control         ControlNets and T2I-Adapters with their pictures, as `Control`; they add up
        guess_mode      ControlNets act for the prompt only, and the deeper the stronger
        image_prompts   pictures as prompts, by IP-Adapters, each an `ImagePrompt`; they add up
        image_encoder   the CLIP image encoder that they need: a file, a folder, or a loaded one. Default: the one that
                        lies where the adapter is published with it
        guidance_rescale  0 to 1: against the contrast of strong guidance (for zero-terminal-SNR models 0.7)
        sampling        noise on the way, and the ends of a schedule: a `Sampling`
        eta             0 to 1: how much noise a sampler adds again; default: the sampler's own
        clip_skip       layers of the text encoder from the end, 1 is the last; default: as the model was trained
        emphasis        how prompts weigh words: A1111's "original", "no norm", "ignore" or "none", or "comfyui"
        literal         take the prompts as they stand: no weights, no BREAK
        force           make pictures that seem too large for the memory; default: refuse them
        noise           "cpu", as diffusers; "cuda", as A1111 on an NVIDIA card; or "comfyui", as ComfyUI on one
        sdxl            what SDXL is told beside the prompt: an `SDXL`, with the second encoder's prompts, and sizes
        variation       noise that departs from the seed's: a `Variation`
        on_step         called with a `Step` at every step

        None stands for the default of each. Calls on the same weights take turns, from whatever threads they come.
        Raises UsageError for an option that cannot be, Interrupted where `interrupt` ended it, NoMemoryError, and what
        `on_step` raises.
        """
        asked = check(prompt, options)
        models = {self.turns, *(() if asked.refiner is None else (asked.refiner.turns,))}
        given = [control.model for control in asked.control if isinstance(control.model, ControlModel)]
        with take_turns(models, {model.turns for model in given}):
            self._ending = Event()
            try:
                return self._make_each(asked, _ending(asked.on_step, self._ending))
            finally:
                self._ending = None

    def interrupt(self) -> bool:
        """End the call of this pipeline that is running, after its step, with `Interrupted`; from any thread.

        Returns whether one was. Calls that wait for their turn are not ended, nor one that only has to be decoded.
        """
        ending = self._ending
        if ending is None:
            return False
        ending.set()
        return True

    def _make_each(self, asked: Checked, on_step: Callable[[Step], object]) -> Result:
        """What a call does in its turn, for each prompt where these have pictures of their own."""
        done: list[Result] = []
        plans = [self._planned(part) for part in by_prompt(asked)]  # all is read before anything is painted
        if len({plan.size for plan in plans}) > 1:
            raise UsageError("the pictures of a call must be of one size: pass width and height")
        hires = None if asked.hires is None else self._with_upscaler(asked.hires)
        for plan in plans:
            try:
                done.append(self._make(plan, hires, on_step))
            except Interrupted as ended:
                if done and ended.finish is not None:
                    ended.finish = partial(finished, asked, done, ended.finish)
                raise
        return joined(asked, done) if len(done) > 1 else done[0]

    def _planned(self, asked: Checked) -> Plan:
        """A call whose prompts have all else in common, with what it names read and checked."""
        config = self.config
        chosen = choose(config, asked)
        require_combined(config, asked, chosen.choice.sampler)
        inputs = read_inputs(config, asked)
        size = (inputs.width, inputs.height)
        larger = () if asked.hires is None else asked.hires.enlarged(*size, config.vae.factor).size(config.vae.factor)
        for side in (*size, *larger):
            if side < config.smallest:
                raise UsageError(
                    f"{config.name} makes pictures of {config.smallest} pixels a side and more, not of {side}"
                )
        for model in (self, *(() if asked.refiner is None else (asked.refiner,))):
            check_guiders(asked.guidance, model.config.unet, model.config.name)
        if not asked.force:
            for each in (size, larger or size):
                self.require_room(len(asked.seeds), each, None if asked.tiles is None else asked.tiles.size)
        prompts, loras = asked.prompts, self.own_loras if asked.loras is None else asked.loras
        if not asked.literal:
            prompts, loras = tagged_prompts(prompts, loras, asked.lora_dirs)
        return Plan(asked, chosen, inputs, placed(asked, inputs), prompts, loras)

    def _make(self, plan: Plan, hires: Hires | None, on_step: Callable[[Step], object]) -> Result:
        """The pictures of a plan; `hires` has its upscaler loaded."""
        config, asked, chosen, inputs, given = self.config, plan.asked, plan.chosen, plan.inputs, plan.given
        image_prompts = self.adapted(given.image_prompts)
        identities = self.identity_loras(image_prompts)
        self.merge([*plan.loras, *identities], partial=asked.partial or self.own_partial)
        job = Job(
            prompts=plan.prompts,
            negatives=asked.negative_prompt,
            syntax=asked.syntax,
            clip_skip=asked.clip_skip,
            seeds=asked.seeds,
            sdxl=asked.sdxl or SDXL(),
            noise=asked.noise,
            variation=asked.variation,
            variation_seeds=asked.variation_seeds,
            guidance=Guidance(
                chosen.choice.scale(chosen.guidance_scale),
                asked.guidance_rescale,
                asked.image_guidance_scale,
                self.sequential,
                always=chosen.choice.sampler.plus_plus,
            ),
            guiders=asked.guidance,
            regions=given.regions,
            tiling=asked.tiling,
            tiles=asked.tiles,
            savings=asked.savings,
            choice=chosen.choice,
            kind=chosen.kind,
            eta=asked.eta,
            sampling=asked.sampling,
            control=[self.loaded(each) for each in given.control],
            guess=asked.guess_mode,
            refiner=asked.refiner,
            refiner_at=asked.refiner_at,
            on_step=on_step,
            image_prompts=self.prepared(image_prompts, asked.image_encoder),
        )

        start, soft = None, None
        if inputs.picture is not None:
            soft = None if asked.soft_inpaint is None else SoftMask(asked.soft_inpaint)
            strength = asked.strength
            if strength is None:
                strength = STRENGTH if inputs.mask is None else 1.0
            start = Start(
                strength,
                images.to_tensor([inputs.picture]).to(self.device),
                mask=inputs.mask,
                steps_as=asked.steps_as,
                fill=asked.mask_fill,
                soft=soft,
            )
        elif asked.latents is not None:
            known = asked.latents.to(self.device, torch.float32)
            start = Start(
                STRENGTH if asked.strength is None else asked.strength, latents=known, steps_as=asked.steps_as
            )
        own = {key for key, _, _ in identities}
        uses = [use for use in self.uses() if str(use.lora.path) not in own]
        parameters = recorded(config, asked, inputs, chosen, start, uses, self.words)
        parameters["notes"] += given.notes

        def finish(latents: Tensor, *notes: str) -> Result:
            covers = repeat(None) if soft is None else soft.composites(latents, config.vae.factor)
            return Result(
                images=[*map(inputs.finished, self.decode(latents, tiling=asked.tiling), covers)],
                seeds=list(asked.seeds),
                latents=latents,
                parameters=parameters | {"notes": [*parameters["notes"], *notes]},
            )

        try:
            second = None if hires is None else self._second(job, hires)
            latents = self.run(job, chosen.steps, plan.size, start)
            if hires is not None and second is not None:
                latents = self._enlarge(second, chosen.steps, latents, hires)
        except Interrupted as ended:
            ended.finish = partial(finish, ended.latents, str(ended))
            raise
        return finish(latents)

    @memory_explained()
    def accelerate(
        self,
        backend: BackendName = "onnx",
        *,
        engines: str | Path | None = None,
        components: Sequence[str] | None = None,
        refit: bool = False,
        weight_budget: int | None = None,
        image_prompts: bool = True,
    ) -> Pipeline:
        """This pipeline with its components run by another backend; it shares the weights of this one, which stays.

        backend     onnx (ONNX Runtime; CPU, or CUDA with onnxruntime-gpu), openvino (CPU), tensorrt or tensorrt-rtx
                    (CUDA); cudagraphs (CUDA): PyTorch itself, a step's thousands of launches recorded as one
        engines     the folder of graphs and engines; default: nativesd/engines in the user's cache. ONNX graphs that
                    are not in it are exported to it and checked, which takes time once; TensorRT engines are built
                    with `nativesd export tensorrt`
        components  what is accelerated, of text_encoder, unet, controlnet (those that controls name), and vae;
                    default: all, and with cudagraphs unet and controlnet
        refit       where other LoRAs are in the weights at a call, find their graphs, or make them (ONNX Runtime and
                    OpenVINO), which takes time once; without, PyTorch runs what they are in
        weight_budget  bytes of weights that stay on the GPU, of engines that were built with --weight-streaming;
                    default: what there is room for
        image_prompts  whether the UNet's graph has inputs for image prompts, which it then takes from any adapter;
                    without, PyTorch runs a call that has some. TensorRT takes an engine of either kind

        LoRAs that are merged now are in the graphs (cudagraphs takes any later). Weights that are written to afterwards
        (not through `.data`) are noticed, and PyTorch runs them. What a graph has no input for
        (T2I-Adapters, textual inversions, other LoRAs, sizes outside an engine's profiles) is run by PyTorch, with a
        warning that says why. Raises UsageError for what cannot be, NativesdError where a graph does not compute what
        PyTorch does.
        """
        from nativesd.pipeline.acceleration import accelerate

        with self.turns.wait():
            return accelerate(
                self, backend, engines=engines, components=components, refit=refit, weight_budget=weight_budget,
                image_prompts=image_prompts,
            )  # fmt: skip

    def stream(self, prompt: str | None = None, **options: Unpack[StreamOptions]) -> Stream:
        """Open a stream: frames in, pictures of `prompt` out, several frames at work at once, each at a noise level.

        timesteps       of the slots, at most 8, falling; 999 is noise alone. Or t_index_list: StreamDiffusion's, of 50.
                        Or steps and strength: so many, from how much of a frame is given up. Default 2 and 0.5
        negative_prompt what pictures should not show, where guidance asks for it
        prompts         pairs of a text and its weight instead of the prompt, blended as `blend` says
        width, height   pixels; default: what the model was trained on
        guidance_scale  1 and below: off, the default
        residual        where guidance takes the answer without the prompt from: "self", a noise that is carried along
                        (no rows; the default); "initialize", which begins with a row of the newest frame; "full", as
                        many rows again; "none": no guidance
        delta           factor on the carried noise. Default 1
        seed            of the noise, which is the same for every frame. Default 2. Or seeds: pairs of one and its
                        weight
        blend           "linear", the default, or "slerp"
        renoise         put noise on a frame again between its steps. Default True
        control         ControlNets and T2I-Adapters; one without a picture is steered by every frame itself
        control_scales  one number for each control, instead of its own
        image_prompts   pictures as prompts, as in a call, with image_encoder; they can be changed between frames
        skip_similar    True, or a `Similar`: frames like the last one are skipped. Default False
        loras           as in a call; few steps need an LCM-LoRA or a model that was made for them
        output          "pil", "array" or "tensor"

        None stands for the default of each. docs/stream.md explains the choices. Raises UsageError for what cannot be.
        """
        # the one word upward: a stream is opened on a model, and so is this room's method, and stands on it
        from nativesd.streaming.options import check_stream
        from nativesd.streaming.stream import Stream

        return Stream(self, check_stream({"prompt": prompt, **options}))

    def close(self) -> int:
        """Free what an accelerated pipeline's backend holds; returns how many bytes that was, as far as it is known."""
        with self.turns.wait():
            return 0 if self.acceleration is None else self.acceleration.close()


def _ending(on_step: Callable[[Step], object] | None, ending: Event) -> Callable[[Step], object]:
    """`on_step`, and after it the call's end where that is asked for."""

    def report(step: Step) -> None:
        if on_step is not None:
            on_step(step)
        if ending.is_set():
            raise Interrupted(f"interrupted after step {step.index + 1} of {step.total}", step.denoised)

    return report
