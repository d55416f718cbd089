"""The shelf: models, LoRAs, ControlNets, IP-Adapters and embeddings by the names that clients say, and the one model
in use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import nativesd
from nativesd.diffusion.images.prompts import ImageAdapter
from nativesd.errors import NativesdError, UsageError
from nativesd.loading.image_prompts import find_image_encoder
from nativesd.pipeline.pipeline import Pipeline
from nativesd.pipeline.upscaling import SUFFIXES, UpscaleModel, load_upscaler
from nativesd.server.jobs.line import Line
from nativesd.server.settings import Settings
from nativesd.shipped import TINY

MODELS = (".safetensors", ".ckpt", ".gguf")
PARTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
IMAGE_ADAPTER = "ip-adapter"
"""What the names of IP-Adapters begin with, by which they are known among ControlNets, where A1111 has them."""
log = logging.getLogger("nativesd.server")


class Catalogue:
    """What there is by name. A client names; only what was named at the start, or lies in its folders, is opened."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.current = ""
        """The model of requests that name none."""
        self.refresh()
        self.current = next(iter(self.models))

    def refresh(self) -> None:
        """Look into the folders again. Raises UsageError where there is no model."""
        s = self._settings
        found = {file.stem: str(file) for folder in s.model_dirs for file in _files(folder, MODELS)}
        found |= {file.parent.name: str(file.parent) for d in s.model_dirs for file in d.rglob("model_index.json")}
        self.models: Mapping[str, str] = {
            **s.models,
            **{name: at for name, at in found.items() if name not in s.models},
        }
        if not self.models:
            raise UsageError(f"there is no model in {s.model_dirs[0]}")
        self.loras = {file.stem: str(file) for folder in s.lora_dirs for file in _files(folder, (".safetensors",))}
        self.embeddings = {file.stem: str(file) for folder in s.embedding_dirs for file in _files(folder, PARTS)}
        self.upscalers = {file.stem: str(file) for folder in s.upscaler_dirs for file in _files(folder, SUFFIXES)}
        controls = {file.stem: str(file) for folder in s.control_dirs for file in _files(folder, PARTS)}
        for folder in s.control_dirs:
            controls |= {file.parent.name: str(file.parent) for file in folder.rglob("config.json")}
        if "tiny" in self.models.values():
            controls = {"tiny": "tiny", **controls}
        adapters = {file.stem: str(file) for folder in s.image_adapter_dirs for file in _files(folder, PARTS)}
        among = {name: at for name, at in controls.items() if name.lower().startswith(IMAGE_ADAPTER)}
        self.controls: Mapping[str, str] = {name: at for name, at in controls.items() if name not in among}
        self.image_adapters: Mapping[str, str] = among | adapters
        encoders = {file.stem: str(file) for folder in s.image_encoder_dirs for file in _files(folder, PARTS)}
        for folder in s.image_encoder_dirs:
            for config in folder.rglob("config.json"):
                within = config.parent.relative_to(folder).as_posix()
                encoders[folder.name if within == "." else within] = str(config.parent)
        self.image_encoders: Mapping[str, str] = encoders

    def model(self, name: str | None) -> str:
        """A model's name as it is listed: in any case, with or without a suffix. Raises UsageError."""
        if name is None:
            return self.current
        return _named("model", name, self.models)

    def file(self, name: str) -> Path:
        """Where a model is."""
        source = self.models[self.model(name)]
        return TINY if source == "tiny" else Path(source)

    def lora(self, name: str) -> str:
        """A LoRA's file by its name. Raises UsageError."""
        return self.loras[_named("LoRA", name, self.loras)]

    def upscaler(self, name: str, plain: Sequence[str]) -> str:
        """How pictures are enlarged: one of `plain`, or a model's file by its name. Raises UsageError."""
        there = {**{each: each for each in plain}, **self.upscalers}
        return there[_named("upscaler", name, there)]

    def control(self, name: str) -> str:
        """A ControlNet's or T2I-Adapter's source by its name. Raises UsageError."""
        return self.controls[_named("ControlNet", name, self.controls)]

    def image_adapter(self, name: str) -> str:
        """An IP-Adapter's file by its name. Raises UsageError."""
        return self.image_adapters[_named("IP-Adapter", name, self.image_adapters)]

    def image_encoder(self, name: str) -> str:
        """A CLIP image encoder's file or folder by its name. Raises UsageError."""
        return self.image_encoders[_named("image encoder", name, self.image_encoders)]


class Shelf:
    """A worker's models: one is loaded at a time."""

    def __init__(self, catalogue: Catalogue, settings: Settings, device: str | None) -> None:
        self.catalogue = catalogue
        self.log_prompts = settings.log_prompts
        self.limits = settings.limits
        self.device = device
        self.line = Line()
        """Held by who works with the models."""
        self.name = ""
        """Of the model that is loaded."""
        self.refused: dict[str, str] = {}
        """Embeddings that do not fit it, and why."""
        self._settings = settings
        self._pipeline: Pipeline | None = None
        self._refiner: tuple[str, Pipeline] | None = None
        self._upscaler: tuple[str, UpscaleModel] | None = None
        self._lock = threading.Lock()

    @property
    def loaded(self) -> Pipeline | None:
        """The pipeline that is loaded."""
        return self._pipeline

    def pipeline(self, name: str | None) -> Pipeline:
        """The pipeline of a model, which is loaded where it is not the one in use. Raises what `nativesd.load` raises.

        Where loading fails, the model before it is loaded when it is asked for again.
        """
        name = self.catalogue.model(name)
        with self._lock:
            if self._pipeline is None or self.name != name:
                self._close()
                self._pipeline = self._load(name)
                self.name = name
                self._read_embeddings(self._pipeline)
            return self._pipeline

    def refiner(self, name: str) -> Pipeline:
        """The pipeline of a refiner, which stays loaded beside the model until another one is asked for."""
        name = self.catalogue.model(name)
        with self._lock:
            if self._refiner is None or self._refiner[0] != name:
                self._refiner = None
                self._refiner = (name, self._load(name))
            return self._refiner[1]

    def upscaler(self, file: str) -> UpscaleModel:
        """A model that enlarges pictures, by its file; the last one stays loaded. Raises what `load_upscaler` does."""
        with self._lock:
            if self._upscaler is None or self._upscaler[0] != file:
                self._upscaler = None
                self._upscaler = (file, load_upscaler(file, device=self.device))
            return self._upscaler[1]

    def _load(self, name: str) -> Pipeline:
        log.info("loading %s", name)
        pipeline = nativesd.load(self.catalogue.models[name], device=self.device, **dict(self._settings.loading))
        pipeline.find_image_encoder = self._image_encoder
        return pipeline

    def _image_encoder(self, adapter: ImageAdapter) -> Path | None:
        """The image encoder that serves an IP-Adapter: beside it, or else of the catalogue."""
        return find_image_encoder(adapter, list(self.catalogue.image_encoders.values()))

    def _close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
        self._pipeline, self.name = None, ""

    def _read_embeddings(self, pipeline: Pipeline) -> None:
        self.refused = {}
        for name, file in self.catalogue.embeddings.items():
            try:
                pipeline.load_embedding(file)
            except NativesdError as error:
                self.refused[name] = str(error)


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files of some suffixes in a folder and those below it, but not the parts of model folders."""
    models = {file.parent for name in ("model_index.json", "config.json") for file in folder.rglob(name)}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in suffixes and file.is_file() and models.isdisjoint(file.parents):
            yield file


def _named(what: str, name: str, there: Mapping[str, str]) -> str:
    """The name that is meant: in any case, with a suffix, a folder before it, or A1111's hash behind it."""
    path = name.strip().partition(" [")[0].replace("\\", "/")
    asked = "" if path.startswith("/") or ".." in path.split("/") else path.rpartition("/")[2]
    names = {each.lower(): each for each in there}
    for each in (name, asked, asked.rpartition(".")[0]):
        if each and each.lower() in names:
            return names[each.lower()]
    close = get_close_matches(asked.lower(), names, 1)
    hint = f": did you mean {names[close[0]]}?" if close else f": there is {', '.join(there) or 'none'}"
    raise UsageError(f"there is no {what} {name[:100]!r}{hint}")
