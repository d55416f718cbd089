"""A source (the embedded model, a folder, a hub id) to a Pipeline."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from nativesd.config import Prediction
from nativesd.errors import SourceError, UsageError
from nativesd.models.clip import TextEncoder
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.pipeline import Pipeline, PipelineConfig
from nativesd.sampling.schedule import SchedulerConfig
from nativesd.text.tokenizer import DEFAULT, ClipTokenizer, pad_id
from nativesd.weights.checkpoint import fill
from nativesd.weights.folder import Folder, local_weights, read_folder
from nativesd.weights.keymap import load_table

TINY = Path(__file__).parent / "tiny"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
END_OF_TEXT = 49407


def load(
    source: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    prediction: Prediction | None = None,
) -> Pipeline:
    """Load a model.

    source      "tiny" (the embedded model), a folder in the published layout, or a hub id such as "org/name"
    device      default: cuda where there is one, else cpu
    dtype       float16, bfloat16 or float32; default float16 on CUDA, float32 elsewhere
    prediction  "epsilon", "v" or "sample", where the model's scheduler_config.json is wrong

    With all files local no request is made. Raises SourceError and WeightsError for what cannot be read or does not
    fit, NetworkError for the hub, UsageError for an argument that cannot be.
    """
    place = _device(device)
    kind = _dtype(dtype, place)
    if prediction is not None and prediction not in get_args(Prediction):
        raise UsageError(f"prediction must be one of {', '.join(get_args(Prediction))}, not {prediction!r}")
    half = kind != torch.float32
    path = _locate(source, half=half)
    folder = read_folder(path)
    config = _config(str(source), folder, prediction)

    def make(module: nn.Module, component: str, table: str, dtype: torch.dtype) -> None:
        fill(module, local_weights(path, component, half=half), load_table(table).bind(), device=place, dtype=dtype)
        module.eval()

    with torch.device("meta"):
        unet, vae = UNet(folder.unet), VAE(folder.vae)
        encoders = tuple(TextEncoder(encoder) for encoder in folder.text_encoders.values())
    make(unet, "unet", "unet.diffusers", kind)
    upcast = folder.vae.force_upcast and kind == torch.float16
    make(vae, "vae", "vae.diffusers", torch.float32 if upcast else kind)
    for name, encoder in zip(folder.text_encoders, encoders, strict=True):
        make(encoder, name, "text_encoder.transformers", kind)
    return Pipeline(config, unet, vae, encoders, _tokenizers(folder), place, kind)


def _locate(source: str | Path, *, half: bool) -> Path:
    """The model's local folder."""
    if source == "tiny":
        return TINY
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        raise SourceError(f"{source} is a file: load takes a folder in the published layout, or a hub id")
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise SourceError(f"{source} does not exist; a model is 'tiny', a folder, or a hub id such as org/name")
    from nativesd.weights.hub import fetch  # the hub's client is not needed for local files

    return fetch(source, half=half)


def _config(name: str, folder: Folder, prediction: Prediction | None) -> PipelineConfig:
    added = folder.unet.added
    if added is not None:
        family = "refiner" if added.ids == 5 else "sdxl"
    else:
        family = "sd2" if folder.unet.linear_projection else "sd1"
    scheduler = SchedulerConfig.from_published(folder.scheduler)
    if prediction is not None:
        scheduler = replace(scheduler, prediction=prediction)
    sample_size = folder.sample_size or (128 if added is not None else 64)
    return PipelineConfig(
        name=Path(name).name,
        family=family,
        unet=folder.unet,
        vae=folder.vae,
        text_encoders=tuple(folder.text_encoders.values()),
        scheduler=scheduler,
        prediction=scheduler.prediction,
        size=sample_size * folder.vae.factor,
        zero_empty_negative=bool(folder.index.get("force_zeros_for_empty_prompt", family == "sdxl")),
    )


def _tokenizers(folder: Folder) -> tuple[ClipTokenizer, ...]:
    """The model's own tokenizer files, or the vocabulary in the package with the family's padding."""
    tokenizers = []
    for name, encoder in folder.text_encoders.items():
        own = folder.path / name.replace("text_encoder", "tokenizer")
        openclip = encoder.activation != "quick_gelu"  # SD2.x and bigG pad with "!"
        default = 0 if openclip else END_OF_TEXT
        has_own = own.is_dir() and ((own / "vocab.json").is_file() or (own / "tokenizer.json").is_file())
        tokenizers.append(
            ClipTokenizer(own, pad=pad_id(own, default), length=encoder.length)
            if has_own
            else ClipTokenizer(DEFAULT, pad=default, length=encoder.length)
        )
    return tuple(tokenizers)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"device {str(device)!r} cannot be used: {reason}") from error
    return place


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise UsageError(f"dtype must be float16, bfloat16 or float32, not {dtype}")
    return found
