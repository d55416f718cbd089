"""The LoRA that a FaceID IP-Adapter brings along, under the names that LoRA files have."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from nativesd.config import UNetConfig
from nativesd.weights.files.source import Member
from nativesd.weights.lora.file import LoraFile, group
from nativesd.weights.maps.keymap import load_tables

_KEY = re.compile(r"ip_adapter\.(\d+)\.(to_(?:q|k|v|out)_lora\.(?:down|up)\.weight)")
_PARTS = {"down": "down_blocks.{}.", "up": "up_blocks.{}.", "mid": "mid_block."}


def identity_lora(path: Path, member: Member, unet: UNetConfig) -> LoraFile:
    """The LoRA in an IP-Adapter's file. It numbers the UNet's attentions as diffusers' attn_processors are: the
    self-attention of every block, then its cross-attention, going down, going up, and in the middle."""
    names = {}
    for number, place in enumerate(unet.cross_attentions):
        block = f"attentions.{place.layer}.transformer_blocks.{place.block}."
        for second, attention in enumerate(("attn1", "attn2")):
            names[2 * number + second] = f"{_PARTS[place.part].format(place.stage)}{block}{attention}.processor."
    found = {key: match for key in member.tensors if (match := _KEY.fullmatch(key))}
    renamed = {f"unet.{names[int(match[1])]}{match[2]}": key for key, match in found.items() if int(match[1]) in names}
    own = replace(
        member,
        tensors={name: member.tensors[key] for name, key in renamed.items()},
        files={name: member.files[key] for name, key in renamed.items()},
    )
    groups, unplaced = group(renamed, load_tables())
    written = max(file.stat().st_mtime_ns for file in member.data_starts)
    return LoraFile(path, own, tuple(groups), unplaced, written)
