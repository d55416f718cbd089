"""`nativesd stream`: frames of a folder, a video or a pipe through a model, and pictures out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice, repeat
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from nativesd.cli.common import MODEL_HELP, RUNNING, Size, main, say
from nativesd.cli.help import as_flags, from_file, section
from nativesd.pipeline.asked.readers import lora_use

if TYPE_CHECKING:
    from PIL import Image

    from nativesd.streaming.frames import Frame
    from nativesd.streaming.stream import Stream

EVERY = 5.0  # seconds between lines where there is no terminal


class Numbers(click.ParamType[list[int]]):
    """Whole numbers with commas between them."""

    name = "N,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Parse, or fail with exit code 2."""
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() for part in parts):
            self.fail(f"{value!r} is not whole numbers such as 499,259", param, ctx)
        return [int(part) for part in parts]


@main.command()
@click.argument("prompt", required=False)
@section(
    "Frames and pictures",
    click.option("--source", help="A folder of pictures, a video, or - for one on stdin [default: none, from noise]."),
    click.option("--output", help="A folder, a video (.mp4, .mkv, .webm), or - for Matroska on stdout."),
    click.option("--frames", type=click.IntRange(1), help="Stop after so many frames."),
    click.option("--realtime", is_flag=True, help="As they come: what is stale is dropped, the newest kept."),
    click.option(
        "--fps", type=click.FloatRange(0.1, 1000), help="Of a folder and the output [default: the video's, 25]."
    ),
    click.option("--size", type=Size(), help="Pixels [default: the model's]."),
)
@section(
    "What it makes",
    click.option("--config", type=click.Path(path_type=Path), help="Settings in YAML, of StreamDiffusion's forks."),
    click.option("--negative-prompt", help="What the pictures should not show, where guidance asks for it."),
    click.option("--steps", type=int, help="Steps of a frame, and slots [default: 2]."),
    click.option("--strength", type=float, help="Of a frame to give up, 0 to 1 [default: 0.5]."),
    click.option("--timesteps", type=Numbers(), help="Noise levels instead, falling, such as 499,259."),
    click.option("--t-index-list", type=Numbers(), help="StreamDiffusion's indices instead, such as 32,45."),
    click.option("--guidance-scale", type=float, help="1 is off, the default."),
    click.option("--residual", type=click.Choice(["self", "initialize", "full", "none"]), help="Of guidance."),
    click.option("--delta", type=float, help="Factor on the carried noise [default: 1]."),
    click.option("--seed", type=int, help="Of the noise [default: 2]."),
    click.option("--skip-similar", is_flag=True, default=None, help="Skip frames that are like the last one."),
    click.option("--control", multiple=True, metavar="MODEL", help="ControlNet, T2I-Adapter; repeatable."),
    click.option("--control-preprocess", multiple=True, help="One per --control: canny, ..., or none [default]."),
    click.option("--control-scale", "control_scales", type=float, multiple=True, help="One per --control."),
    click.option(
        "--image-prompt", "image_prompts", nargs=2, multiple=True, metavar="ADAPTER PICTURE", help="IP-Adapter."
    ),
    click.option("--image-prompt-scale", type=float, multiple=True, help="One per --image-prompt [default: 1]."),
    click.option(
        "--image-encoder", metavar="ENCODER", help="CLIP image encoder [default: the one beside the adapter]."
    ),
)
@section(
    "The model",
    click.option("--model", help=f"{MODEL_HELP} [default: tiny, with its LCM-LoRA]."),
    click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE[:TEXT]]", help="LoRA to merge in; repeatable."),
    click.option("--vae", help="File or folder of a VAE to use instead of the model's, or taesd."),
    *RUNNING,
)
@click.pass_context
def stream(
    context: click.Context,
    /,
    prompt: str | None,
    source: str | None,
    output: str | None,
    frames: int | None,
    realtime: bool,
    fps: float | None,
    size: tuple[int, int] | None,
    config: Path | None,
    control: Sequence[str],
    control_preprocess: Sequence[str],
    **given: Any,
) -> None:
    """Take frames and make a picture of PROMPT of each, as they come."""
    if source is None and frames is None:
        raise click.UsageError("pass --source, or how many --frames to make from noise")
    if len(control_preprocess) > len(control):
        raise click.UsageError(f"{len(control_preprocess)} --control-preprocess for {len(control)} --control")
    import nativesd
    from nativesd.cli.given import image_prompts
    from nativesd.cli.progress import listening
    from nativesd.diffusion.control import Control
    from nativesd.streaming.config import Settings, read_settings
    from nativesd.streaming.options import WAYS
    from nativesd.streaming.video import FPS, Latest, check_output, open_sink, open_source

    settings = Settings() if config is None else read_settings(config)
    options = {name: value for name, value in given.items() if value not in (None, ())}
    model = options.pop("model", None) or settings.model or "tiny"
    if "loras" in options:
        options["loras"] = [lora_use(text) for text in options["loras"]]
    if size is not None:
        options["width"], options["height"] = size
    if control:
        how = dict(enumerate(control_preprocess))
        options["control"] = [
            Control(each, preprocess=None if how.get(i, "none") == "none" else how[i]) for i, each in enumerate(control)
        ]
    if prompts := image_prompts(options):
        options["image_prompts"] = prompts
    asked = {**settings.loading, **settings.stream}
    if any(name in options for way in WAYS for name in way):  # one way of saying the levels replaces the file's
        asked = {name: value for name, value in asked.items() if not any(name in way for way in WAYS)}
    if prompt is not None:
        asked.pop("prompts", None)
        asked["prompt"] = prompt
    from_file(context, asked.keys() - options.keys() - {"prompt"})
    if output is not None:
        check_output(output)
    with ExitStack() as stack:
        opened = None if source is None else stack.enter_context(open_source(source, fps))
        with listening():
            made = stack.enter_context(nativesd.stream(asked.pop("prompt", None), model, **asked | options))
        for note in made.notes:
            say(as_flags(note, context))
        rate = fps or (FPS if opened is None else opened.fps)
        sink = None if output is None else stack.enter_context(open_sink(output, rate))
        incoming: Iterable[Image.Image | None] = repeat(None) if opened is None else opened.frames
        latest = None
        if realtime and opened is not None:
            latest = Latest(opened)
            stack.callback(latest.close)
            incoming = latest
        told = _Told()
        try:
            for frame in _through(made, islice(incoming, frames)):
                told(made, frame)
                if sink is not None:
                    sink.write(frame.image)  # type: ignore[arg-type]
        except KeyboardInterrupt:  # the usual end of what has none; the output is whole
            say("stopped")
        told.end(made, 0 if latest is None else latest.dropped)


def _through(stream: Stream, frames: Iterable[Image.Image | None]) -> Iterator[Frame]:
    """The pictures of frames, the last ones flushed out."""
    for frame in frames:
        picture = stream(frame)
        if picture is not None:
            yield picture
    yield from stream.flush()


class _Told:
    """How far it is: a bar on a terminal, else a line now and then, and one at the end."""

    def __init__(self) -> None:
        self._start = self._said = perf_counter()
        self._count = self._skipped = 0
        from tqdm import tqdm  # a tenth of what --help takes

        self._bar = tqdm(file=sys.stderr, unit="frame", leave=False, disable=None)

    def __call__(self, stream: Stream, frame: Frame) -> None:
        """A picture is there."""
        self._count += 1
        self._skipped += frame.skipped
        self._bar.update()
        if self._count % 16 == 0 and not self._bar.disable:
            self._bar.set_postfix_str(f"latency {stream.latency.median * 1000:.0f} ms")
        if self._bar.disable and perf_counter() - self._said >= EVERY:
            self._said = perf_counter()
            say(self._line(stream))

    def end(self, stream: Stream, dropped: int) -> None:
        """All are."""
        self._bar.close()
        more = "".join(
            f", {count} {what}" for count, what in ((self._skipped, "skipped"), (dropped, "dropped")) if count
        )
        say(self._line(stream) + more)

    def _line(self, stream: Stream) -> str:
        seconds, latency = perf_counter() - self._start, stream.latency
        rate = self._count / max(seconds, 1e-9)
        noun = "picture" if self._count == 1 else "pictures"
        return (
            f"{self._count} {noun} in {seconds:.1f} s, {rate:.1f} per second; a frame takes "
            f"{latency.median * 1000:.0f} ms (95 %: {latency.p95 * 1000:.0f} ms)"
        )
