"""Making pictures, and what helps to ask for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.console import Console

from nativesd.cli.common import ENGINES_HELP, MODEL_HELP, Border, Size, lora_use, main

if TYPE_CHECKING:
    from nativesd.pipeline.arguments import GenerateOptions, LoadOptions
    from nativesd.pipeline.control import Control

BACKENDS = ["torch", "cudagraphs", "onnx", "openvino", "tensorrt", "tensorrt-rtx"]


@main.command()
@click.argument("prompt", required=False)
@click.option("--from", "picture", metavar="PICTURE", help="Repeat a picture by its parameters; options override them.")
@click.option("--model", help=f"{MODEL_HELP} [default: tiny].")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Picture to write [default: nativesd-SEED.png].")
@click.option("--steps", type=int, help="Sampling steps [default: 20; few-step models 4].")
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 is off [default: the model family's].")
@click.option("--seed", type=int, help="Seed of the first picture [default: random].")
@click.option("--sampler", help='Such as "DPM++ 2M Karras": see nativesd samplers [default: the model\'s own].')
@click.option("--schedule", help="Such as karras or ays: see nativesd samplers [default: the model's own].")
@click.option("--size", type=Size(), help="Pixels, such as 512x768 [default: the model's, or the image's].")
@click.option("--negative-prompt", help="What the picture should not show.")
@click.option("--num-images", type=int, help="Pictures, with seeds counting up [default: 1].")
@click.option("--image", type=click.Path(), help="Picture to begin from: image-to-image, inpainting, edits.")
@click.option("--mask", type=click.Path(), help="White where --image is painted anew.")
@click.option("--strength", type=float, help="How much of --image is given up, 0 to 1 [default: 0.8; with a mask 1].")
@click.option(
    "--steps-as",
    type=click.Choice(["diffusers", "a1111", "all"]),
    help="How --strength counts steps [default: diffusers].",
)
@click.option("--resize", type=click.Choice(["resize", "crop", "fill"]), help="How --image comes to --size.")
@click.option("--outpaint", type=Border(), help="Pixels to add to --image, such as 0,0,128,0.")
@click.option("--mask-blur", type=int, help="Pixels over which a repainted part fades in [default: 4].")
@click.option("--image-guidance-scale", type=float, help="How much an instruct-pix2pix model keeps [default: 1.5].")
@click.option("--hires", type=float, help='Second pass at so many times the size ("hires fix").')
@click.option("--hires-strength", type=float, help="How much the second pass repaints [default: 0.7].")
@click.option("--hires-steps", type=int, help="Steps of the second pass [default: the same].")
@click.option(
    "--hires-upscaler", help='"latent" (also with "(bicubic)", "(nearest)", ...) or lanczos [default: latent].'
)
@click.option("--hires-sampler", help="Sampler of the second pass [default: the same].")
@click.option("--hires-schedule", help="Schedule of the second pass [default: the same].")
@click.option("--hires-prompt", help="Prompt of the second pass [default: the same].")
@click.option("--hires-negative-prompt", help="Negative prompt of the second pass [default: the same].")
@click.option("--hires-guidance-scale", type=float, help="Guidance of the second pass [default: the same].")
@click.option("--refiner", help="SDXL refiner for the last steps: a folder, a file, or a hub id.")
@click.option("--refiner-at", type=float, help="How far on the refiner takes over [default: 0.8].")
@click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE[:TEXT]]", help="LoRA to merge in; repeatable.")
@click.option("--lora-dir", "lora_dirs", type=click.Path(), multiple=True, help="Folder of LoRAs that prompts name.")
@click.option("--control", nargs=2, multiple=True, metavar="MODEL IMAGE", help="ControlNet or T2I-Adapter; repeatable.")
@click.option("--control-scale", type=float, multiple=True, help="One per --control, in its order [default: 1].")
@click.option("--control-start", type=float, multiple=True, help="From which part of the steps on [default: 0].")
@click.option("--control-end", type=float, multiple=True, help="Up to which part of the steps [default: 1].")
@click.option("--control-preprocess", multiple=True, help="canny, a processor of controlnet_aux, or none [default].")
@click.option("--control-kind", multiple=True, help="For a ControlNetUnion: what the hint is, such as depth.")
@click.option("--guess-mode", is_flag=True, default=None, help="ControlNets act for the prompt only.")
@click.option("--guidance-rescale", type=float, help="0 to 1, against strong guidance's contrast [default: 0].")
@click.option("--eta", type=float, help="0 to 1, the noise that a sampler adds again [default: the sampler's].")
@click.option("--clip-skip", type=int, help="Layer of the text encoder from the end; 1 is the last.")
@click.option("--literal", is_flag=True, default=None, help="Take the prompts as they stand: no weights, no BREAK.")
@click.option("--noise", type=click.Choice(["cpu", "cuda"]), help="Whose: the CPU's, or an NVIDIA card's (A1111).")
@click.option("--embedding", "embeddings", type=click.Path(), multiple=True, help="Textual inversion; repeatable.")
@click.option("--preview", type=click.Path(path_type=Path), help="Picture file to show the state in, at every step.")
@click.option("--device", help="cpu, cuda, cuda:1, ... [default: cuda where there is one].")
@click.option("--dtype", help="float16, bfloat16 or float32 [default: float16 on CUDA, else float32].")
@click.option("--prediction", help="epsilon, v or sample, where the model says it wrong or not at all.")
@click.option("--unet", type=click.Path(), help="File or folder of a UNet to use instead of the model's.")
@click.option("--vae", type=click.Path(), help="File or folder of a VAE to use instead of the model's, or taesd.")
@click.option("--text-encoder", "text_encoders", type=click.Path(), multiple=True, help="The same; repeatable.")
@click.option("--offload", is_flag=True, default=None, help="Keep what is not in use in main memory.")
@click.option("--backend", type=click.Choice(BACKENDS), help="What runs the model [default: torch].")
@click.option("--fp8", is_flag=True, default=None, help="Transformer blocks in float8 (RTX 40, H100 and newer).")
@click.option("--engines", type=click.Path(path_type=Path), help=ENGINES_HELP)
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of weight maps to add or override.")
@click.option("-v", "--verbose", is_flag=True, help="Say what was chosen without being told, and from what.")
def generate(
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
    from tqdm import tqdm

    import nativesd
    from nativesd.pictures.result import picture_format, write_picture
    from nativesd.pipeline.arguments import split
    from nativesd.pipeline.diffusion import Step
    from nativesd.pipeline.hires import Hires

    options = {name: value for name, value in given.items() if value not in (None, ())}
    if size is not None:
        options["width"], options["height"] = size
    if prompt is not None:
        options["prompt"] = prompt
    if "loras" in options:
        options["loras"] = [lora_use(text) for text in options["loras"]]
    if control := _controls(options):
        options["control"] = control
    passes = {name.removeprefix("hires_"): options.pop(name) for name in list(options) if name.startswith("hires_")}
    if passes and "hires" not in options:
        raise click.UsageError("the options of the second pass need --hires")
    if "hires" in options:
        options["hires"] = Hires(options["hires"], **passes)
    if picture is not None:
        repeated, unheeded = nativesd.options_from(picture)
        if unheeded:
            click.echo(f"nativesd: {picture}: not repeated: {', '.join(unheeded)}", err=True)
        model = repeated.pop("model", None)
        if "model" not in options and model not in (None, "tiny"):
            raise click.UsageError(f"{picture} was made with the model {model}: pass it with --model")
        options = {**repeated, **options}
        if "strength" in repeated and "image" not in options:
            raise click.UsageError(f"{picture} was made from a picture: pass that with --image")
    if "prompt" not in options:
        raise click.UsageError("pass a prompt, or a picture to repeat with --from")
    for path in filter(None, (output, preview)):
        picture_format(path)  # before the model is loaded
    model, prompt = options.pop("model", "tiny"), options.pop("prompt")
    loading, asked = split(cast("GenerateOptions", options))
    pipeline = nativesd.load(model, **loading)
    for embedding in embeddings:
        pipeline.load_embedding(embedding)
    if "refiner" in options:
        asked["refiner"] = nativesd.load(
            options["refiner"], **cast("LoadOptions", {**loading, "unet": None, "vae": None, "loras": None})
        )
    with tqdm(file=sys.stderr, unit="step", leave=False, disable=None) as bar:

        def on_step(step: Step) -> None:
            bar.total = step.total
            bar.update()
            if preview is not None:
                write_picture(step.preview(), preview)

        asked["on_step"] = on_step
        result = pipeline(prompt, **asked)
    for note in result.parameters["notes"]:
        click.echo(f"nativesd: {note}", err=True)
    if verbose:
        for what, reason in result.parameters["inferred"].items():
            click.echo(f"{what}: {reason}", err=True)
    for path in result.save(output or Path(f"nativesd-{result.seeds[0]}.png")):
        click.echo(path)


def _controls(options: dict[str, Any]) -> list[Control]:
    """The --control options, taken out of `options`; those that go with them are matched by their order."""
    from nativesd.pipeline.control import Control

    controls = options.pop("control", ())
    settings: dict[str, tuple[Any, ...]] = {
        name: options.pop(f"control_{name}", ()) for name in ("scale", "start", "end", "preprocess", "kind")
    }
    for name, values in settings.items():
        if len(values) > len(controls):
            raise click.UsageError(f"{len(values)} --control-{name} for {len(controls)} --control")
    out = []
    for i, (model, image) in enumerate(controls):
        chosen = {name: values[i] for name, values in settings.items() if i < len(values) and values[i] != "none"}
        out.append(Control(model, image, **chosen))
    return out


@main.command()
def samplers() -> None:
    """List the samplers and schedules, with the names they are known by and their sources."""
    from rich.table import Table

    from nativesd.sampling.table import SAMPLERS, SCHEDULES

    table = Table("sampler", "also", "order", "noise", "calls", "source", box=None, pad_edge=False)
    for each in SAMPLERS:
        names = ", ".join(filter(None, (each.published, *each.aliases)))
        noise = "" if not each.noisy else "Brownian" if each.brownian else "every step"
        table.add_row(each.name, names, str(each.order), noise, str(each.evaluations), each.source)
    schedules = Table("schedule", "also", "source", box=None, pad_edge=False)
    for schedule in SCHEDULES:
        schedules.add_row(schedule.name, ", ".join(schedule.aliases), schedule.source)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print()
    console.print(schedules)


@main.command()
@click.argument("prompt")
@click.option("--literal", is_flag=True, help="Take the prompt as it stands: no weights, no BREAK.")
@click.option("--embedding", "embeddings", type=click.Path(), multiple=True, help="Textual inversion; repeatable.")
def tokens(prompt: str, literal: bool, embeddings: Sequence[str]) -> None:
    """Show the tokens of PROMPT, their weights, and where its chunks break."""
    from nativesd.text.embedding import read_embedding
    from nativesd.text.prompt import explain_tokens
    from nativesd.text.tokenizer import END_OF_TEXT, ClipTokenizer

    known = {embedding.name: embedding for embedding in map(read_embedding, embeddings)}
    chunks = explain_tokens(prompt, ClipTokenizer(pad=END_OF_TEXT), literal=literal, embeddings=known)
    for number, chunk in enumerate(chunks, 1):
        click.echo(f"chunk {number} of {len(chunks)}: {len(chunk.tokens)} of 75 tokens")
        for token in chunk.tokens:
            weight = "" if token.weight == 1 else f"  x {token.weight:g}"
            click.echo(f"  {token.id:>5}  {token.text}{weight}")
