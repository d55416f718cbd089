"""`nativesd generate`: its options, and from them to pictures in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from nativesd.cli.common import MODEL_HELP, RUNNING, SAVING, Border, Size, embedding_files, main, say, tell
from nativesd.cli.given import for_python, said_by
from nativesd.cli.help import as_flags, does_nothing, flags_of, section
from nativesd.text.syntax import Emphasis

if TYPE_CHECKING:
    from nativesd.pipeline.asked.arguments import GenerateOptions, LoadOptions

NEEDS = {
    **dict.fromkeys(("mask", "strength", "steps_as", "resize", "outpaint", "image_guidance_scale"), ("image",)),
    **dict.fromkeys(("churn_min", "churn_max"), ("churn",)),
    "variation_seed": ("variation_strength",), "mask_blur": ("mask", "outpaint"), "mask_fill": ("mask", "outpaint"),
    "only_masked": ("mask",), "soft_inpaint": ("mask", "outpaint"), "refiner_at": ("refiner",),
    "guess_mode": ("control",), "image_encoder": ("image_prompts",), "engines": ("backend",),
}  # fmt: skip
"""Options that do nothing without one of others; those whose names go on after another's (--hires-steps) need that."""
PASSED_AGAIN = {"--control": "control", "--image-prompt": "image_prompts"}
"""What a picture's parameters ask for again, which they name with their settings but do not hold."""


@main.command()
@click.argument("prompt", required=False)
@section(
    "The picture",
    click.option("-o", "--output", type=click.Path(path_type=Path), help="File [default: nativesd-SEED.png]."),
    click.option("--size", type=Size(), help="Pixels, such as 512x768 [default: the model's, or the image's]."),
    click.option("--width", type=int, help="Pixels, instead of --size."),
    click.option("--height", type=int, help="The same."),
    click.option("--steps", "--num-inference-steps", type=int, help="Sampling steps [default: 20; few-step models 4]."),
    click.option(
        "--guidance-scale",
        "--cfg-scale",
        type=float,
        help="1 is off [default: the family's].",
    ),
    click.option("--negative-prompt", help="What the picture should not show."),
    click.option("--seed", type=int, help="Seed of the first picture [default, and -1: random]."),
    click.option("--num-images", type=int, help="Pictures, with seeds counting up [default: 1]."),
    click.option(
        "--region",
        "regions",
        nargs=2,
        multiple=True,
        metavar="WHERE PROMPT",
        help="Prompt of a part: LEFT,TOP,RIGHT,BOTTOM as shares of the picture, or a mask's file; repeatable.",
    ),
    click.option(
        "--tiling", type=click.Choice(["xy", "x", "y"]), help="Join the picture with itself along these axes."
    ),
    click.option("--tiles", type=int, metavar="PIXELS", help="Work window by window, of so many pixels a side."),
    click.option("--preview", type=click.Path(path_type=Path), help="File that shows the state, at every step."),
    click.option("--from", "picture", metavar="PICTURE", help="Repeat a picture; options override its parameters."),
)
@section(
    "The model",
    click.option("--model", help=f"{MODEL_HELP} [default: tiny]."),
    click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE[:TEXT]]", help="LoRA to merge in; repeatable."),
    click.option("--lora-dir", "lora_dirs", type=click.Path(), multiple=True, help="Folder of LoRAs for prompts."),
    click.option("--lora-partial", "partial", is_flag=True, default=None, help="Apply what fits of a LoRA."),
    click.option(
        "--embedding", "embeddings", multiple=True, metavar="FILE[,FILE]", help="Textual inversion; repeatable."
    ),
    click.option("--unet", type=click.Path(), help="File or folder of a UNet to use instead of the model's."),
    click.option("--vae", type=click.Path(), help="File or folder of a VAE to use instead of the model's, or taesd."),
    click.option("--text-encoder", "text_encoders", type=click.Path(), multiple=True, help="The same; repeatable."),
    click.option("--prediction", help="epsilon, v or sample, where the model says it wrong or not at all."),
    click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override."),
)
@section(
    "A picture to begin from",
    click.option("--image", type=click.Path(), help="Picture to begin from: image-to-image, inpainting, edits."),
    click.option("--mask", type=click.Path(), help="White where --image is painted anew."),
    click.option("--strength", type=float, help="Of --image to give up, 0 to 1 [default: 0.8; with a mask 1]."),
    click.option(
        "--steps-as",
        type=click.Choice(["diffusers", "a1111", "all"]),
        help="How --strength counts steps [default: diffusers].",
    ),
    click.option("--resize", type=click.Choice(["resize", "crop", "fill"]), help="How --image comes to --size."),
    click.option("--outpaint", type=Border(), help="Pixels to add to --image, such as 0,0,128,0."),
    click.option("--mask-blur", type=int, help="Pixels over which a repainted part fades in [default: 4]."),
    click.option(
        "--mask-fill",
        type=click.Choice(["original", "fill", "noise", "nothing"]),
        help="What is under --mask at first [default: original].",
    ),
    click.option("--only-masked", type=int, metavar="PIXELS", help="Repaint only --mask and so many pixels around it."),
    click.option(
        "--soft-inpaint",
        metavar="SETTINGS",
        help='Paint the greys of --mask by degrees: "default", or such as mask_blend_scale=1,mask_blend_power=2.',
    ),
    click.option("--image-guidance-scale", type=float, help="How much an instruct-pix2pix model keeps [default: 1.5]."),
)
@section(
    "Control",
    click.option(
        "--control", nargs=2, multiple=True, metavar="MODEL IMAGE", help="ControlNet, T2I-Adapter; repeatable."
    ),
    click.option("--control-scale", type=float, multiple=True, help="One per --control, in its order [default: 1]."),
    click.option("--control-start", type=float, multiple=True, help="From which part of the steps on [default: 0]."),
    click.option("--control-end", type=float, multiple=True, help="Up to which part of the steps [default: 1]."),
    click.option("--control-preprocess", multiple=True, help="canny, one of controlnet_aux, or none [default]."),
    click.option("--control-kind", multiple=True, help="For a ControlNetUnion: what the hint is, such as depth."),
    click.option("--guess-mode", is_flag=True, default=None, help="ControlNets act for the prompt only."),
)
@section(
    "Pictures as prompts",
    click.option(
        "--image-prompt",
        "image_prompts",
        nargs=2,
        multiple=True,
        metavar="ADAPTER PICTURE",
        help="IP-Adapter (tiny, or a file), and a picture or saved embeddings; repeatable.",
    ),
    click.option("--image-prompt-scale", type=float, multiple=True, help="One per --image-prompt [default: 1]."),
    click.option(
        "--image-prompt-start", type=float, multiple=True, help="From which part of the steps on [default: 0]."
    ),
    click.option("--image-prompt-end", type=float, multiple=True, help="Up to which part of the steps [default: 1]."),
    click.option("--image-prompt-layers", multiple=True, help='style, layout, "0=1 2=0.5", or none [default: all].'),
    click.option("--image-prompt-weight-type", multiple=True, help="linear [default], ease in, weak input, ..."),
    click.option("--image-prompt-mask", multiple=True, help="White where it acts, or none [default: everywhere]."),
    click.option("--image-prompt-crop", multiple=True, help="center [default], top, bottom, left, right or pad."),
    click.option("--image-encoder", type=click.Path(), help="CLIP image encoder [default: beside the adapter]."),
)
@section(
    "A second pass",
    click.option("--hires", type=float, help='Second pass at so many times the size ("hires fix").'),
    click.option("--hires-strength", type=float, help="How much the second pass repaints [default: 0.7]."),
    click.option("--hires-steps", type=int, help="Steps of the second pass [default: the same]."),
    click.option(
        "--hires-upscaler", help='"latent" (or "latent (bicubic)", ...), lanczos, or a file [default: latent].'
    ),
    click.option("--hires-sampler", help="Sampler of the second pass [default: the same]."),
    click.option("--hires-schedule", help="Schedule of the second pass [default: the same]."),
    click.option("--hires-prompt", help="Prompt of the second pass [default: the same]."),
    click.option("--hires-negative-prompt", help="Negative prompt of the second pass [default: the same]."),
    click.option("--hires-guidance-scale", type=float, help="Guidance of the second pass [default: the same]."),
    click.option("--refiner", help="SDXL refiner for the last steps: a folder, a file, or a hub id."),
    click.option("--refiner-at", type=float, help="How far on the refiner takes over [default: 0.8]."),
)
@section(
    "Sampling",
    click.option("--sampler", help='Such as "DPM++ 2M Karras": see nativesd samplers [default: the model\'s own].'),
    click.option("--schedule", help="Such as karras or ays: see nativesd samplers [default: the model's own]."),
    click.option("--eta", type=float, help="0 to 1, the noise that a sampler adds again [default: the sampler's]."),
    click.option(
        "--guidance",
        multiple=True,
        metavar="NAME[:VALUE]",
        help="pag, seg, slg, apg, tcfg, threshold, interval or freeu, such as pag:3 or freeu:b1=1.3; repeatable.",
    ),
    click.option(
        "--saving", "savings", multiple=True, metavar="NAME[:N]", help="deepcache:2, tome:0.5, hypertile:256."
    ),
    click.option("--guidance-rescale", type=float, help="0 to 1, against strong guidance's contrast [default: 0]."),
    click.option("--churn", type=float, help="Noise that Euler, Heun and DPM2 add before steps [default: 0]."),
    click.option("--churn-min", type=float, help="The smallest sigma of --churn [default: 0]."),
    click.option("--churn-max", type=float, help="The largest sigma of --churn [default: all]."),
    click.option("--noise-scale", type=float, help="Factor on the noise that samplers add [default: 1]."),
    click.option("--sigma-min", type=float, help="Smallest sigma of a schedule by formula [default: the model's]."),
    click.option("--sigma-max", type=float, help="Largest sigma of a schedule by formula [default: the model's]."),
    click.option("--rho", type=float, help="How much Karras's sigmas crowd at the small end [default: 7]."),
    click.option(
        "--noise",
        type=click.Choice(["cpu", "cuda", "comfyui"]),
        help="Whose: the CPU's, an NVIDIA card's (A1111), or ComfyUI's on one.",
    ),
    click.option("--prompt-2", help="SDXL: the prompt of the second text encoder [default: the same]."),
    click.option("--negative-prompt-2", help="SDXL: its negative prompt [default: the same]."),
    click.option("--original-size", type=Size(), help="SDXL: the picture's before it was scaled [default: its own]."),
    click.option("--crop-top-left", type=Size(), help="SDXL: what was cut off, as LEFTxTOP [default: 0x0]."),
    click.option("--target-size", type=Size(), help="SDXL: the picture's after it was scaled [default: its own]."),
    click.option("--variation-strength", type=float, help="Of another seed's noise to mix in, 0 to 1 [default: 0]."),
    click.option("--variation-seed", type=int, help="That other seed [default, and -1: random]."),
    click.option("--seed-resize", type=Size(), help="Size whose noise is to stand in the middle, such as 512x512."),
    click.option("--ensd", type=int, help="Added to the seed for the noise of the steps (A1111's) [default: 0]."),
    click.option("--clip-skip", type=int, help="Layer of the text encoder from the end; 1 is the last."),
    click.option(
        "--emphasis",
        type=click.Choice(get_args(Emphasis), case_sensitive=False),
        help="How prompts weigh words: as A1111, or as ComfyUI [default: original].",
    ),
    click.option("--literal", is_flag=True, default=None, help="Take the prompts as they stand: no weights, no BREAK."),
)
@section(
    "This machine",
    click.option("--force", is_flag=True, default=None, help="Try pictures that seem too large for the memory."),
    *RUNNING,
    *SAVING,
    click.option(
        "--no-mmap",
        "mapped",
        flag_value=False,
        type=bool,
        default=None,
        help="Read the weights, so that their files may change or go while the model is used.",
    ),
)
@click.option("-v", "--verbose", is_flag=True, help="Say what was chosen without being told, and from what.")
@click.pass_context
def generate(
    context: click.Context,
    /,
    prompt: str | None,
    picture: str | None,
    output: Path | None,
    size: tuple[int, int] | None,
    preview: Path | None,
    embeddings: Sequence[str],
    verbose: bool,
    **given: Any,
) -> None:
    """Make pictures of PROMPT; prints the path of each."""
    options = {name: value for name, value in given.items() if value not in (None, ())}
    if size is not None:
        if "width" in options or "height" in options:
            raise click.UsageError("--size says what --width and --height say: pass either")
        options["width"], options["height"] = size
    if prompt is not None:
        options["prompt"] = prompt
    repeated = {} if picture is None else _repeated(picture, options)
    _require_needed(context, options, {**said_by(repeated), **options})
    options = {**repeated, **for_python(options, repeated)}
    if "prompt" not in options:
        raise click.UsageError("pass a prompt, or a picture to repeat with --from")

    import nativesd
    from nativesd.cli.progress import listening, progress
    from nativesd.latents.preview import Step
    from nativesd.pictures.result import check_target, write_picture
    from nativesd.pipeline.asked.arguments import check, split

    for path in filter(None, (output or Path("nativesd.png"), preview)):
        check_target(path)  # before anything is loaded
    model, text, refiner = options.pop("model", "tiny"), options.pop("prompt"), options.pop("refiner", None)
    loading, asked = split(cast("GenerateOptions", options))
    check(text, asked)
    start = perf_counter()
    with listening():
        pipeline = nativesd.load(model, **loading)
    for embedding in embeddings:
        pipeline.load_embedding(embedding_files(embedding))
    if refiner is not None:
        asked["refiner"] = nativesd.load(
            refiner, **cast("LoadOptions", {**loading, "unet": None, "vae": None, "loras": None})
        )
    if pipeline.offload and pipeline.device.type == "cpu":
        say("--offload does nothing on a CPU")
    if verbose:
        say(f"{pipeline!r} loaded in {perf_counter() - start:.1f} s")
    with progress(pipeline.device) as taken:

        def on_step(step: Step) -> None:
            taken(step)
            if preview is not None:
                write_picture(step.preview(), preview)

        asked["on_step"] = on_step
        result = pipeline(text, **asked)
    for note in result.parameters["notes"]:
        say(as_flags(note, context))
    if verbose:
        for what, reason in result.parameters["inferred"].items():
            tell(f"{what}: {reason}")
    for path in result.save(output or Path(f"nativesd-{result.seeds[0]}.png")):
        click.echo(path)


def _repeated(picture: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a picture's parameters say; says which of these cannot be repeated."""
    import nativesd

    repeated, unheeded = nativesd.options_from(picture)
    model = repeated.pop("model", None)
    if "model" not in options and model not in (None, "tiny"):
        raise click.UsageError(f"{picture} was made with the model {model}: pass it with --model")
    if "strength" in repeated and "image" not in options:
        raise click.UsageError(f"{picture} was made from a picture: pass that with --image")
    for name in [name for name in repeated if name in NEEDS and not any(each in options for each in NEEDS[name])]:
        del repeated[name]
        unheeded.append(f"{name} (it needs --{NEEDS[name][0]})")
    again = [f"pass it again: {word} " for word, name in PASSED_AGAIN.items() if options.get(name)]
    unheeded = [each for each in unheeded if not any(words in each for words in again)]
    if unheeded:
        say(f"{picture}: not repeated: {', '.join(unheeded)}")
    return repeated


def _require_needed(context: click.Context, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse what was given where it does nothing, for want of another option."""
    flags = flags_of(context)
    for name in given:
        needed = NEEDS.get(name, ("hires",) if name.startswith("hires_") else ())
        kept = [each for each in needed if options.get(each) not in (None, "torch", "cudagraphs")]
        if needed and not kept:
            others = ("a --backend that keeps graphs" if each == "backend" else flags[each] for each in needed)
            raise does_nothing(flags[name], *others)
