"""The stream itself: frames in, pictures out, and updates between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import RLock
from types import TracebackType
from typing import Unpack

import torch
from PIL import Image
from torch import Tensor

from nativesd.diffusion.control import ControlModel, hint_pixels
from nativesd.diffusion.turns import take_turns
from nativesd.errors import UsageError
from nativesd.latents import autoencoder
from nativesd.pictures.images import ImageSource, read_image
from nativesd.pictures.preprocess import preprocess
from nativesd.pipeline.asked.arguments import signed
from nativesd.pipeline.pipeline import Pipeline
from nativesd.sampling.noise import move_noise
from nativesd.streaming.batch import Batch
from nativesd.streaming.frames import Frame, FrameSource, Incoming, check_frame, outgoing
from nativesd.streaming.latency import Clock, Latency
from nativesd.streaming.options import Asked, UpdateOptions, check_update
from nativesd.streaming.setup import Setup, make_setup, require_streamable, stream_size
from nativesd.streaming.similar import SimilarFilter
from nativesd.streaming.steering import Steering
from nativesd.text.words import unknown_words
from nativesd.tuning.memory import memory_explained


class Stream:
    """A stream over a loaded model. `Pipeline.stream` opens one and explains its options.

    Call it with a frame for the picture of an earlier one. All of it may be called from any thread: calls wait for each
    other, and for other calls on the same weights.
    """

    @memory_explained()
    @torch.inference_mode()
    def __init__(self, pipeline: Pipeline, asked: Asked) -> None:
        require_streamable(pipeline)
        self.pipeline = pipeline
        self.size = stream_size(pipeline.config, asked)
        asked = replace(asked, control=[pipeline.loaded(control) for control in asked.control])
        for control in asked.control:
            if control.image is None and control.preprocess is not None:  # or a frame would say what is not installed
                preprocess(Image.new("RGB", self.size), control.preprocess)
        self._lock = RLock()
        self._turns = {control.model.turns for control in asked.control if isinstance(control.model, ControlModel)}
        self._room = pipeline.room((self.size[1], self.size[0]), 1)
        self._fixed: dict[int, Tensor] = {}
        self._closed = False
        with take_turns({pipeline.turns}, self._turns):
            self._begin(make_setup(pipeline, asked, self.size))
            self._merged = pipeline.uses()

    def _begin(self, setup: Setup) -> None:
        """With empty slots, at the first frame and the first of the seed's noise."""
        self._now = replace(setup, noises=setup.noises.again(setup.plan.noise.shape))
        self._count = 0
        self._last: Frame | None = None
        similar = setup.asked.skip_similar
        self._filter = None if similar is None else SimilarFilter(similar)
        self._clock = Clock(self.pipeline.device)
        self._checked = False
        self._empty()

    def _empty(self) -> None:
        """Begin to fill the slots anew."""
        now = self._now
        self._batch = Batch(now.plan)
        self._inside: deque[int | None] = deque([None] * (now.plan.slots - 1))
        self._steering = Steering(self.pipeline, now.asked.control, self.size, now.plan.slots)
        self._steering.adjust(now.plan.extra, now.asked.control_scales)

    @property
    def slots(self) -> int:
        """How many frames are at work at once: a picture comes as many frames less one after its own."""
        return self._now.plan.slots

    @property
    def rows(self) -> int:
        """Of every call of the UNet: the slots, and those of the negative prompt."""
        return self._now.plan.rows

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Of the slots, the newest frame's first."""
        return self._now.ladder.timesteps

    @property
    def asked(self) -> Asked:
        """What the stream is asked for now."""
        return self._now.asked

    @property
    def latency(self) -> Latency:
        """How long the last frames took, stage by stage."""
        with self._lock:
            return self._clock.latency()

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the options changes nothing, and what the model is not made for; a sentence each."""
        with self._lock:
            return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        config, now = self.pipeline.config, self._now
        if now.asked.negative_prompt and not now.plan.extra:
            yield (
                "negative_prompt is not used: it needs a guidance_scale above 1, and residual='initialize' or 'full'"
            )
        if not config.few_steps and not now.loras:
            yield (
                f"{config.name} was not made for {now.plan.slots} steps: pass an LCM-LoRA with loras=, or take a turbo "
                "or LCM model"
            )
        if config.words is not None:
            unknown = unknown_words(
                [text for text, _ in now.asked.prompts],
                {*config.words, *self.pipeline.words},
                beside_pictures=bool(now.asked.image_prompts),
            )
            if unknown:
                yield f"the embedded model does not know {', '.join(unknown)}"

    @memory_explained()
    @torch.inference_mode()
    def __call__(self, frame: FrameSource | None = None, *, control: Sequence[ImageSource | None] = ()) -> Frame | None:
        """Take a frame in and give the picture of the one that is done; None while the slots fill.

        frame    PIL, an array (H, W, 3) of uint8, or a tensor ([1, ]3, H, W), brought to the stream's size. None:
                 noise, so that the picture is of the prompt alone
        control  the frame's own pictures for the controls, in their order; None: the control's, or the frame itself

        Raises UsageError for a frame that is none. Where anything fails, the slots are empty afterwards.
        """
        given = None if frame is None else check_frame(frame)
        with self._lock:
            self._require_open()
            pictures = self._pictures(control, given is None)
            self._clock.start()
            incoming = None if given is None else Incoming(given, self.size, self.pipeline.device)
            if (last := self._skipped(incoming, pictures)) is not None:
                self._count += 1
                return last
            with take_turns({self.pipeline.turns}, self._turns), self._emptied_by_failure():
                self._merge_again()
                newest = self._newest(incoming)
                self._clock.mark("input")
                self._steering.push(partial(self._hint, incoming, pictures))
                self._clock.mark("control")
                made = self._advance(newest, self._count)
                self._count += 1
                return made

    def _merge_again(self) -> None:
        """Have this stream's LoRAs in the weights, where another call has put others there."""
        if self.pipeline.uses() is not self._merged:
            self.pipeline.merge(self._now.loras, partial=self.pipeline.own_partial)
            self._merged = self.pipeline.uses()

    @contextmanager
    def _emptied_by_failure(self) -> Iterator[None]:
        """Slots that a frame went through in part hold nothing that could go on."""
        try:
            yield
        except BaseException:
            self._empty()
            raise

    def _pictures(self, control: Sequence[ImageSource | None], alone: bool) -> list[ImageSource | None]:
        """The pictures of this frame for every control. Raises UsageError where one has none."""
        controls = self._now.asked.control
        if control and len(control) != len(controls):
            raise UsageError(f"control must be one picture for each of {len(controls)} controls, not {len(control)}")
        pictures = list(control) or [None] * len(controls)
        for picture, each in zip(pictures, controls, strict=True):
            if alone and picture is None and each.image is None:
                raise UsageError(
                    "a control without a picture is steered by the frame, and there is none: pass control="
                )
        return pictures

    def _skipped(self, incoming: Incoming | None, pictures: Sequence[ImageSource | None]) -> Frame | None:
        """The last picture again, where the frame is so similar that it is skipped; else None."""
        if self._filter is None or incoming is None or any(picture is not None for picture in pictures):
            return None
        if self._last is None or None in self._inside:  # they are to be filled first
            self._filter.keep(incoming.compared)
            return None
        if not self._filter.skips(incoming.compared):
            return None
        return replace(self._last, age=self._count - self._last.index, skipped=True)

    def _newest(self, incoming: Incoming | None) -> Tensor:
        """The frame's latents (1, C, h, w) at the first slot's noise; without one, noise alone."""
        pipeline = self.pipeline
        if incoming is None:
            return move_noise(self._now.noises.draw((1, *self._now.plan.noise.shape[1:])), pipeline.device)
        clean, _ = autoencoder.encode(
            pipeline.vae, incoming.pixels, scaling=pipeline.config.vae.scaling, name=pipeline.config.name,
            checked=not self._checked, **self._room,
        )  # fmt: skip
        return self._batch.noised(clean)

    def _hint(self, incoming: Incoming | None, pictures: Sequence[ImageSource | None], number: int) -> Tensor:
        """The newest frame's hint of a control by its number, (1, 3, H, W) in [0, 1]."""
        control, picture = self._now.asked.control[number], pictures[number]
        if picture is not None:
            return hint_pixels(control, read_image(picture), self.size)
        if control.image is None:
            assert incoming is not None  # else it was refused
            return incoming.hint(control.preprocess)
        assert not isinstance(control.image, list)  # it was refused
        if number not in self._fixed:
            self._fixed[number] = hint_pixels(control, read_image(control.image), self.size)
        return self._fixed[number]

    def _ask(self, latents: Tensor) -> Tensor:
        """The UNet's answers for latents (rows, C, h, w), float32."""
        self._clock.mark("slots")
        told, unet = self._now.told, self.pipeline.unet
        latents = latents.to(self.pipeline.dtype)
        residuals = self._steering.residuals(latents, told)
        adapter = self._steering.adapter()
        self._clock.mark("control")
        answer: Tensor = unet(
            latents, told.time, told.context, pooled=told.pooled, time_ids=told.time_ids, guidance=told.guidance,
            residuals=residuals, adapter=adapter, images=self._now.images,
        )  # fmt: skip
        self._clock.mark("unet")
        return answer.float()

    def _advance(self, newest: Tensor, index: int | None) -> Frame | None:
        """Move all slots on; `index` is the newest frame's, None of one that stands for none."""
        pipeline = self.pipeline
        clean = self._batch.advance(newest, self._ask)
        self._clock.mark("slots")
        self._inside.appendleft(index)
        done = self._inside.pop()
        if done is None:
            return None
        pixels = autoencoder.decode(
            pipeline.vae, clean, scaling=pipeline.config.vae.scaling, name=pipeline.config.name,
            checked=not self._checked, **self._room,
        )  # fmt: skip
        self._checked = True
        image = outgoing(pixels, self._now.asked.output)
        self._clock.mark("output")
        self._clock.end()
        self._last = Frame(image, done, (self._count if index is None else index) - done)
        return self._last

    @memory_explained()
    @torch.inference_mode()
    def flush(self) -> list[Frame]:
        """The pictures of the frames that are still at work, in their order; the slots are empty afterwards."""
        out = []
        with self._lock:
            self._require_open()
            with take_turns({self.pipeline.turns}, self._turns), self._emptied_by_failure():
                self._merge_again()
                nothing = torch.zeros_like(self._now.plan.noise[:1])
                while any(index is not None for index in self._inside):
                    self._clock.start()
                    self._steering.push(None)
                    made = self._advance(nothing, None)
                    out += [] if made is None else [replace(made, age=self._count - 1 - made.index)]
            self._empty()
        return out

    @signed(UpdateOptions)
    @memory_explained()
    @torch.inference_mode()
    def update(self, **changes: Unpack[UpdateOptions]) -> None:
        """Change what the stream makes, between two frames: all of it or, where anything cannot be, nothing.

        The options are those of `Pipeline.stream`, and control_scales, one number for each control; what is not named
        stays. Whatever changes holds for the next picture already, in all slots. Another number of slots begins with
        empty ones. Raises UsageError.
        """
        with self._lock:
            self._require_open()
            asked = check_update(self._now.asked, changes)
            with take_turns({self.pipeline.turns}, self._turns):
                setup = make_setup(self.pipeline, asked, self.size, self._now)
                before, self._now, self._merged = self._now, setup, self.pipeline.uses()
                if asked.skip_similar != before.asked.skip_similar:
                    self._filter = None if asked.skip_similar is None else SimilarFilter(asked.skip_similar)
                if setup.plan.slots != before.plan.slots:
                    self._empty()
                else:
                    self._batch.follow(setup.plan)
                    self._steering.adjust(setup.plan.extra, asked.control_scales)

    @torch.inference_mode()
    def reset(self) -> None:
        """Begin again as it was opened and updated: with empty slots, frame 0, and the seed's first noise."""
        with self._lock:
            self._require_open()
            with take_turns({self.pipeline.turns}, self._turns):
                self._begin(self._now)

    def close(self) -> None:
        """Give its memory back; the model stays. A stream that is closed takes no more frames."""
        with self._lock:
            if not self._closed:
                self._closed = True
                del self._batch, self._steering, self._fixed, self._last, self._filter

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        width, height = self.size
        steps = ", ".join(map(str, self.timesteps))
        return f"<Stream of {self.pipeline.config.name}, {width}x{height}, timesteps {steps}>"

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("the stream is closed: open another one")
