"""A source (the embedded model, a folder, a single file, a hub id) to a Pipeline."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from nativesd.config import Prediction, TextEncoderConfig
from nativesd.errors import UsageError
from nativesd.loading.control import load_control
from nativesd.loading.image_prompts import find_image_encoder, load_image_adapter, load_image_encoder
from nativesd.loading.modules import build_modules, by_name, fill_modules, speed_up
from nativesd.loading.placement import compiles, find_placement
from nativesd.loading.settle import settle
from nativesd.pipeline.asked.arguments import Lora
from nativesd.pipeline.asked.records import read_loras
from nativesd.pipeline.pipeline import Pipeline
from nativesd.text.tokenizer import DEFAULT, ClipTokenizer, pad_id, pad_token
from nativesd.tuning.memory import memory_explained
from nativesd.weights.files.folder import folder_of
from nativesd.weights.files.locate import locate
from nativesd.weights.lora.merge import Merged, host
from nativesd.weights.maps.keymap import load_tables
from nativesd.weights.model import Model, choose, identify

if TYPE_CHECKING:
    from nativesd.export.library import BackendName


@memory_explained()
def load(
    source: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    prediction: Prediction | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoders: Sequence[str | Path] = (),
    preview: str | Path | None = None,
    loras: Lora | Sequence[Lora] | None = None,
    partial: bool | None = None,
    offload: bool = False,
    maps: str | Path | None = None,
    backend: Literal["torch"] | BackendName = "torch",
    engines: str | Path | None = None,
    fast: bool = True,
    compile: bool | Literal["auto"] = False,
    fp8: bool = False,
    quantize: Literal["int8"] | None = None,
    mapped: bool = True,
) -> Pipeline:
    """Load a model.

    source         "tiny" (the embedded model), a folder in the published layout, a single safetensors file of any
                   layout that the tables know, or a hub id such as "org/name"
    device         default: cuda where there is one, else cpu
    dtype          float16, bfloat16 or float32; default float16 on CUDA, float32 elsewhere
    prediction     "epsilon", "v" or "sample", where the source says it wrong or not at all
    unet, vae      files or folders with these components, instead of the source's; vae="taesd" is the family's TAESD
    text_encoders  the same for the text encoders; which is which is read off them
    preview        a TAESD ("taesd", or a file or folder) for the previews of `on_step`
    loras          LoRAs of every call that names none, as a call takes them; with a backend they are in its graphs
    partial        apply LoRAs of which only a part fits, and name the rest in a warning
    offload        keep the modules in main memory, and each on the device only while it is used
    maps           a folder of weight maps (*.toml) that add to the shipped ones or replace those of the same name
    backend        what runs the components: torch, or as in `Pipeline.accelerate`, which also says what engines is
    fast           compute by what a short probe finds faster here (`tuning.tune`): on a CPU other operators, on CUDA
                   maybe another layout of the weights
    compile        torch.compile the UNet's repeated block (`tuning.compile_blocks`), which the first picture waits for;
                   "auto": on CUDA, where Triton is installed. On a CPU `fast` alone is as fast
    fp8            keep and multiply the UNet's transformer blocks in float8 (`models.fp8`): less memory, larger errors,
                   no LoRAs. For GPUs of compute capability 8.9 (RTX 40, H100) and newer
    quantize       "int8" keeps the weights of the UNet and of ControlNets in 8 bits, half the memory of half precision
                   (`tuning.int8`). A CPU on which a probe finds products of 8 bits faster uses them; elsewhere every
                   weight is made a number when it is used, which a NativesdWarning says. LoRAs are merged into the
                   file's numbers, which are rounded again
    mapped         leave tensors that fit in the pages of their file: nothing is read before it is used, and processes
                   share them. False reads all: a file that is then cut short does not end the process (SIGBUS), nor
                   does one that is written over change the weights

    With all files local no request is made. Raises SourceError and WeightsError for what cannot be read or does not
    fit, NetworkError for the hub, UsageError for an argument that cannot be.
    """
    placement = find_placement(device, dtype, offload=offload, fp8=fp8, quantize=quantize)
    if placement.int8 and placement.device.type == "cpu" and compiles(compile, placement.device):
        raise UsageError(
            "compile=True computes with the weights as numbers, and on a CPU quantize saves time by products of 8 "
            "bits: leave one of them out"
        )
    if prediction is not None and prediction not in get_args(Prediction):
        raise UsageError(f"prediction must be one of {', '.join(get_args(Prediction))}, not {prediction!r}")
    own_loras = read_loras("loras", loras or ())
    tables = load_tables(None if maps is None else Path(maps))
    half = placement.half

    located = locate(source, unet=unet, vae=vae, text_encoders=text_encoders, preview=preview, half=half)
    model = choose(identify(located, tables, half=half))
    modules = build_modules(model)
    fill_modules(modules, model, placement, mapped=mapped)
    speed_up(modules, placement, fast=fast, compile=compile)
    named = folder_of(Path(source))
    name = named.stem if named.is_file() else named.name
    config = settle(model, modules, located, name, prediction)

    hosts = {part: host(module, *model.parts[part], tables) for part, module in by_name(modules, model).items()}
    fast = fast and placement.stays
    pipeline = Pipeline(
        config,
        modules.unet,
        modules.vae,
        modules.text_encoders,
        tuple(tokenizer(model, part) for part in model.text_encoders),
        placement.device,
        placement.dtype,
        offload=offload,
        own_loras=own_loras,
        own_partial=bool(partial),
        previewer=modules.previewer,
        lora_state=Merged(hosts),
        load_control=functools.partial(
            load_control,
            device=placement.home,
            dtype=placement.dtype,
            maps=maps,
            unet=modules.unet,
            fast=fast,
            quantize=quantize,
        ),
        load_image_adapter=functools.partial(
            load_image_adapter, device=placement.home, dtype=placement.dtype, maps=maps
        ),
        load_image_encoder=functools.partial(
            load_image_encoder, device=placement.home, dtype=placement.dtype, maps=maps
        ),
        find_image_encoder=find_image_encoder,
    )
    if own_loras:
        pipeline.set_loras(own_loras, partial=bool(partial))
    if backend == "torch":
        return pipeline
    from nativesd.pipeline.acceleration import accelerate

    return accelerate(pipeline, backend, engines=engines, away=True)


def tokenizer(model: Model, name: str) -> ClipTokenizer:
    """A text encoder's own tokenizer files, or the vocabulary in the package with the family's padding."""
    config = model.parts[name][1].config
    assert isinstance(config, TextEncoderConfig)
    own = model.path / name.replace("text_encoder", "tokenizer")
    default = pad_token(config)
    if (own / "vocab.json").is_file() or (own / "tokenizer.json").is_file():
        return ClipTokenizer(own, pad=pad_id(own, default), length=config.length)
    return ClipTokenizer(DEFAULT, pad=default, length=config.length)
