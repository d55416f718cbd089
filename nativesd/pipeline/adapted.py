"""What is added to a loaded model later: LoRAs, learnt words, and the models that steer it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from nativesd.diffusion.control import Control, ControlModel
from nativesd.diffusion.images.prompts import (
    ImageAdapter,
    ImageEmbeddings,
    ImageEncoder,
    ImagePrompt,
    Prepared,
    encode_pictures,
    one_or_several,
    prepare,
)
from nativesd.diffusion.model import Diffusion
from nativesd.errors import NativesdError, NativesdWarning, UsageError
from nativesd.pictures.clip import Crop
from nativesd.pictures.images import ImageSource, read_image
from nativesd.pipeline.asked.arguments import Lora
from nativesd.pipeline.asked.records import read_loras
from nativesd.text.embedding import Embedding, read_embeddings, words_of
from nativesd.tuning.fp8 import is_fp8
from nativesd.weights.lora.file import LoraFile, read_lora
from nativesd.weights.lora.identity import identity_lora
from nativesd.weights.lora.merge import set_loras
from nativesd.weights.lora.resolve import Use, reasons


class Adapted(Diffusion):
    """A loaded model to which LoRAs, textual inversions and controls are added. See `Diffusion` for the rest."""

    def load_embedding(self, path: str | Path | Sequence[str | Path], name: str | None = None) -> str:
        """Take in a textual inversion; returns what prompts call it by.

        path  a file, or SDXL's two, one for each text encoder; a LoRA's file that brings learnt words is one, too
        name  the word, where the file has one; default: what the file says (diffusers' `<cat>`), else its own name

        Of a file with several words all are taken, and returned with spaces between them. Raises SourceError for what
        cannot be read, UsageError where it fits other text encoders.
        """
        found = read_embeddings(path, name)
        for embedding in found:
            embedding.fit(self._widths())
        with self.turns.wait():
            self.embeddings |= {embedding.name: embedding for embedding in found}
        return " ".join(embedding.name for embedding in found)

    def _widths(self) -> list[int]:
        return [encoder.config.width for encoder in self.text_encoders]

    def set_loras(self, loras: Lora | Sequence[Lora], *, partial: bool = False) -> None:
        """Make these the LoRAs in the weights. Raises WeightsError where one does not fit, or not as a whole.

        With `partial` one of which a part fits is applied so far, and a NativesdWarning names the rest.
        """
        with self.turns.call():
            self.merge(read_loras("loras", loras), partial=partial)

    def merge(self, wanted: Sequence[tuple[str, float, float]], *, partial: bool) -> None:
        """`set_loras` in a turn that has been taken, of what has been read: file, the UNet's scale, the encoders'."""
        if self.lora_state is None:
            if wanted:
                raise UsageError("LoRAs are merged from the model's files: load it with nativesd.load()")
            return
        if wanted and is_fp8(self.unet):
            raise UsageError("LoRAs cannot be merged into float8 weights: load the model without fp8=True")
        for file, _, _ in wanted:
            if file not in self._loras:
                self._loras[file] = read_lora(file)
        uses = [Use(self._loras[file], unet, text_encoder) for file, unet, text_encoder in wanted]
        before = self.lora_state.resolutions
        resolutions = set_loras(self.lora_state, uses, partial=partial)
        if resolutions is before:
            return
        self._lora_words = {word.name: word for use in uses if use.lora.words for word in self._brought(use.lora)}
        for use, resolution in zip(uses, resolutions, strict=True):
            if resolution.unplaced:
                what = f"{len(resolution.unplaced)} of its {len(use.lora.member.tensors)} keys found no place"
                warnings.warn(
                    f"{use.lora.path} is applied in part, as {what}:\n  " + "\n  ".join(reasons(resolution.unplaced)),
                    NativesdWarning,
                    stacklevel=4,
                )

    def _brought(self, lora: LoraFile) -> list[Embedding]:
        """The learnt words in a LoRA's file, as far as they fit: they are no reason to refuse it."""
        try:
            words = words_of(lora.member, lora.path)
            for word in words:
                word.fit(self._widths())
        except NativesdError as error:
            warnings.warn(f"the learnt words in {lora.path} are not used: {error}", NativesdWarning, stacklevel=5)
            return []
        return list(words)

    def encode_image(
        self,
        picture: ImageSource | Sequence[ImageSource],
        image_encoder: ImageEncoder | str | Path,
        *,
        crop: Crop = "center",
    ) -> ImageEmbeddings:
        """What an image encoder says of one picture or several, to be given in place of them, and to be saved.

        Raises what `ImagePrompt` does.
        """
        pictures = [read_image(each) for each in one_or_several(picture)]
        with self.turns.wait(), torch.inference_mode():
            encoder = self._image_encoder(image_encoder)
            with self._visiting(encoder.module):
                return encode_pictures(encoder, pictures, crop)

    def adapted(self, prompts: Sequence[ImagePrompt]) -> list[ImagePrompt]:
        """The image prompts with their adapters, which are loaded once for all calls."""
        out = []
        for prompt in prompts:
            key = str(prompt.adapter)
            if not isinstance(prompt.adapter, ImageAdapter) and key not in self._image_adapters:
                if self.load_image_adapter is None:
                    raise UsageError(f"{key}: load it first, with nativesd.load_image_adapter()")
                self._image_adapters[key] = self.load_image_adapter(prompt.adapter)
            loaded = prompt.adapter if isinstance(prompt.adapter, ImageAdapter) else self._image_adapters[key]
            out.append(replace(prompt, adapter=loaded))
        return out

    def prepared(
        self, prompts: Sequence[ImagePrompt], image_encoder: ImageEncoder | str | Path | None
    ) -> list[Prepared]:
        """Image prompts, whose adapters are loaded, made ready. Raises UsageError for what does not fit."""

        @contextmanager
        def encoder(adapter: ImageAdapter) -> Iterator[ImageEncoder]:
            found = self._image_encoder(self._near(adapter) if image_encoder is None else image_encoder)
            with self._visiting(found.module):
                yield found

        return [prepare(prompt, self.config.unet, encoder) for prompt in prompts]

    def identity_loras(self, prompts: Sequence[ImagePrompt]) -> list[tuple[str, float, float]]:
        """The LoRAs that come in FaceID adapters, once for each, as `merge` takes them.

        Raises UsageError where prompts of one adapter ask for different scales of its LoRA, or it has none.
        """
        scales: dict[str, float] = {}
        for prompt in prompts:
            adapter = prompt.adapter
            assert isinstance(adapter, ImageAdapter)  # `adapted` has loaded it
            if adapter.module.config.lora is None:
                if prompt.lora_scale != ImagePrompt.lora_scale:
                    raise UsageError(f"{adapter.name} has no LoRA of its own, which lora_scale is for: leave it out")
                continue
            key = str(adapter.path.resolve())
            if scales.setdefault(key, prompt.lora_scale) != prompt.lora_scale:
                raise UsageError(
                    f"{adapter.name} has one LoRA, which its image prompts share: give them one lora_scale, not "
                    f"{scales[key]} and {prompt.lora_scale}"
                )
            if prompt.lora_scale and key not in self._loras:
                self._loras[key] = identity_lora(adapter.path, adapter.member, self.config.unet)
        return [(key, scale, 0.0) for key, scale in scales.items() if scale]

    def _image_encoder(self, source: ImageEncoder | str | Path) -> ImageEncoder:
        if isinstance(source, ImageEncoder):
            return source
        key = str(source)
        if key not in self._image_encoders:
            if self.load_image_encoder is None:
                raise UsageError(f"{key}: load it first, with nativesd.load_image_encoder()")
            self._image_encoders[key] = self.load_image_encoder(source)
        return self._image_encoders[key]

    def _near(self, adapter: ImageAdapter) -> Path:
        """The image encoder that lies where an adapter's should. Raises UsageError where none does."""
        found = None if self.find_image_encoder is None else self.find_image_encoder(adapter)
        if found is None:
            raise UsageError(
                f"{adapter.name} needs an image encoder, and none lies beside it (image_encoder/): pass image_encoder="
            )
        return found

    def uses(self) -> tuple[Use, ...]:
        """The LoRAs that are in the weights now."""
        return () if self.lora_state is None else self.lora_state.uses

    def loaded(self, control: Control) -> Control:
        """The control with its model, which is loaded once for all calls."""
        if isinstance(control.model, ControlModel):
            return control
        key = str(control.model)
        if key not in self._controls:
            if self.load_control is None:
                raise UsageError(f"{key}: load it first, with nativesd.load_control()")
            self._controls[key] = self.load_control(control.model)
        return replace(control, model=self._controls[key])
