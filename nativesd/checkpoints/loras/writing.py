"""A LoRA's file, with all that its readers look for beside the tensors, or the folder of a peft adapter.

kohya      the metadata of kohya's scripts and the hashes of the tensors, by which A1111 knows a LoRA
peft       in one file the settings in the metadata, from where diffusers reads them from 0.34 on
           (`lora_adapter_metadata`, also of the layout diffusers); in a folder as PeftModel.save_pretrained writes it,
           adapter_model.safetensors and adapter_config.json, of several components one folder each, by their names
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nativesd.checkpoints.loras.naming import Named, Piece, Setting
from nativesd.errors import NativesdWarning, WeightsError
from nativesd.version import __version__
from nativesd.weights.entries import Entry
from nativesd.weights.files.hashes import SHORT, between, training_start
from nativesd.weights.files.tensors import NAMES, read_tensor
from nativesd.weights.formats.header import TensorInfo
from nativesd.weights.lora.file import LoraFile
from nativesd.weights.lora.settings import ADAPTERS, CONFIG, METADATA
from nativesd.weights.writing import write

VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""family -> kohya's ss_base_model_version (sd-scripts, library/model_util.py and sdxl_model_util.py)"""
TEXT = "text_model."
"""What the modules of a text encoder of transformers' begin with: of CLIPTextModel not from version 5 on."""


def keep_words(named: Named, loras: Iterable[LoraFile], layout: str) -> None:
    """Put in the textual inversions that come with LoRAs, as they are. Readers of the layouts but kohya's refuse keys
    of other kinds: there a NativesdWarning says that they are left out. Raises WeightsError for two of one name."""
    for lora in loras:
        if lora.words and layout != "kohya":
            warnings.warn(
                f"the learnt words in {lora.path} ({', '.join(lora.words)}) are left out, as {layout} has no names for "
                "them: load them from there as an embedding",
                NativesdWarning,
                stacklevel=4,
            )
            continue
        for key in lora.words:
            tensor = read_tensor(lora.member, key)
            if key in named.tensors and not torch.equal(named.tensors[key], tensor):
                raise WeightsError(f"{lora.path} has another {key} than the LoRA before it: one file holds one of them")
            named.tensors[key] = tensor


def network_metadata(pieces: Iterable[Piece], family: str) -> dict[str, str]:
    """What kohya's scripts say of a LoRA that A1111 and others show: its base, dimension and alpha."""
    plain = [piece for piece in pieces if piece.is_plain]
    ranks, alphas = {piece.rank for piece in plain}, {piece.alpha for piece in plain}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    alpha = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    version = {"ss_base_model_version": VERSIONS[family]} if family in VERSIONS else {}
    return {
        "ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alpha,
        "ss_v2": str(family == "sd2"), **version, "software": f"nativesd {__version__}",
    }  # fmt: skip


def write_lora(path: Path, named: Named, metadata: Mapping[str, str], *, folder: bool = False) -> None:
    """Write a LoRA, with the hashes of its tensors by which A1111 knows it (`sshs_model_hash`, `sshs_legacy_hash`).

    folder  write what peft reads: an adapter's two files, or for each of several components a folder of them
    """
    said = {key: value for key, value in metadata.items() if key not in (METADATA, *SSHS)}
    if not folder:
        stated = {
            f"{component}.{name}": value
            for component, modules in named.settings.items()
            if any(setting.alpha is not None for setting in modules.values())
            for name, value in _settings({name.removeprefix(TEXT): each for name, each in modules.items()}).items()
        }  # the ends of modules' names count, and those of transformers 5 begin without "text_model."
        _write_file(path, named.tensors, said | ({METADATA: json.dumps(stated, sort_keys=True)} if stated else {}))
        return
    for component, modules in named.settings.items():
        own = path / component if len(named.settings) > 1 else path
        own.mkdir(parents=True)
        gone = TEXT if component == "text_encoder" else ""
        tensors = {
            f"base_model.model.{key.removeprefix(f'{component}.').removeprefix(gone)}": tensor
            for key, tensor in named.tensors.items()
            if key.startswith(f"{component}.")
        }
        _write_file(own / ADAPTERS[0], tensors, said)
        config = _settings({name.removeprefix(gone): each for name, each in modules.items()})
        (own / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _settings(modules: Mapping[str, Setting]) -> dict[str, Any]:
    """peft's settings of one component (peft, tuners/lora/config.py): what is not the same everywhere by patterns."""
    ranks = {name: each.rank for name, each in modules.items()}
    alphas = {name: each.rank if each.alpha is None else each.alpha for name, each in modules.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": sorted(modules),
        **({"use_dora": True} if any(each.dora for each in modules.values()) else {}),
    }  # fmt: skip


def _write_file(path: Path, named: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    said = dict(metadata)
    ordered = sorted(named.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    raw = {key: tensor.contiguous().flatten().view(torch.uint8).numpy() for key, tensor in ordered}
    whole, at, infos = hashlib.sha256(), 0, dict[str, TensorInfo]()
    for key, tensor in ordered:
        whole.update(raw[key].data)
        infos[key] = TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape), at, at + len(raw[key]))
        at += len(raw[key])
    start = training_start(infos, said)
    said["sshs_model_hash"] = whole.hexdigest()
    if start <= SHORT[0]:
        legacy = hashlib.sha256()
        for key, data in raw.items():
            legacy.update(between(data.data, start + infos[key].start, *SHORT))
        said["sshs_legacy_hash"] = legacy.hexdigest()[:8]
    entries = {key: Entry(t.dtype, tuple(t.shape), partial(named.__getitem__, key)) for key, t in ordered}
    write(path, entries, said)


SSHS = ("sshs_model_hash", "sshs_legacy_hash")
