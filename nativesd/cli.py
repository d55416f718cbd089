"""The command line: the only file that knows about terminals.

Exit codes: 0 fine, 1 findings, 2 usage, 3 unreadable or unfit input, 4 network.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click

from nativesd.errors import NativesdError
from nativesd.version import __version__


class Size(click.ParamType[tuple[int, int]]):
    """WIDTHxHEIGHT in pixels."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse, or fail with exit code 2."""
        width, _, height = str(value).lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            self.fail(f"{value!r} is not a size such as 512x768", param, ctx)
        return int(width), int(height)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """A native PyTorch Stable Diffusion stack."""


@main.command()
@click.argument("prompt")
@click.option("--model", default="tiny", show_default=True, help="'tiny' (embedded), a model folder, or a hub id.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Picture to write [default: nativesd-SEED.png].")
@click.option("--steps", type=int, help="Sampling steps [default: 20; few-step models 4].")
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 is off [default: the model family's].")
@click.option("--seed", type=int, help="Seed of the first picture [default: random].")
@click.option("--sampler", help='Such as "Euler a" or "DPM++ 2M Karras" [default: the model\'s own].')
@click.option("--schedule", help="karras or automatic [default: the model's own].")
@click.option("--size", type=Size(), help="Pixels, such as 512x768 [default: the model's].")
@click.option("--negative-prompt", default="", help="What the picture should not show.")
@click.option("--num-images", type=int, default=1, show_default=True, help="Pictures, with seeds counting up.")
@click.option("--device", help="cpu, cuda, cuda:1, ... [default: cuda where there is one].")
@click.option("--dtype", help="float16, bfloat16 or float32 [default: float16 on CUDA, else float32].")
@click.option("--prediction", help="epsilon, v or sample, where the model's config is wrong.")
def generate(output: Path | None, model: str, size: tuple[int, int] | None, **options: Any) -> None:
    """Make pictures of PROMPT; prints the path of each."""
    from tqdm import tqdm

    import nativesd
    from nativesd.pipeline import Step

    width, height = size or (None, None)
    loading = {name: options.pop(name) for name in nativesd.LOAD_OPTIONS}
    pipeline = nativesd.load(model, **loading)
    with tqdm(file=sys.stderr, unit="step", leave=False, disable=None) as bar:

        def on_step(step: Step) -> None:
            bar.total = step.total
            bar.update()

        result = pipeline(width=width, height=height, on_step=on_step, **options)
    for path in result.save(output or Path(f"nativesd-{result.seeds[0]}.png")):
        click.echo(path)


def run() -> None:
    """The console script: errors are one sentence on stderr and an exit code."""
    warnings.showwarning = lambda message, *_, **__: click.echo(f"nativesd: warning: {message}", err=True)
    try:
        main()
    except NativesdError as error:
        click.echo(f"nativesd: {error}", err=True)
        sys.exit(error.exit_code)
