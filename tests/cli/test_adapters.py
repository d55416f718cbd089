"""LoRAs that cannot be merged, through every command that takes one: the module is named, and nothing is written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import Run

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
UP, DOWN = torch.ones(224, 2), torch.ones(2, 224)
FAULTS = {
    "alpha": ({"lora_up.weight": UP, "lora_down.weight": DOWN, "alpha": torch.tensor(math.nan)}, "not finite"),
    "overflow": ({"lora_up.weight": UP * 1e30, "lora_down.weight": DOWN * 1e30}, "would not be finite"),
    "infinity": ({"lora_up.weight": UP * math.inf, "lora_down.weight": DOWN}, "not finite"),
    "rank 0": ({"lora_up.weight": UP[:, :0], "lora_down.weight": DOWN[:0]}, "without a number in it"),
    "mismatch": ({"lora_up.weight": UP, "lora_down.weight": torch.ones(3, 224)}, "2 columns, its down matrix 3 rows"),
    "half": ({"lora_up.weight": UP}, "its down matrix is missing"),
    "half a character": ({"lora_up.weight": UP, "lora_down.weight": DOWN}, "not valid UTF-8 or JSON"),
}
COMMANDS = {
    "merge": ("lora", "merge", "tiny", "lora.safetensors", "DEST"),
    "generate": ("generate", "a fox", "--steps", "1", "--lora", "lora.safetensors", "-o", "DEST.png"),
    "export": ("export", "onnx", "tiny", "DEST", "--component", "unet", "--lora", "lora.safetensors"),
    "audit": ("audit", "lora.safetensors"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_loras_that_cannot_be_merged(command: str, fault: str, run: Run, tmp_path: Path) -> None:
    parts, words = FAULTS[fault]
    file = tmp_path / "lora.safetensors"
    save_file({f"{MODULE}.{part}": tensor.contiguous() for part, tensor in parts.items()}, file)
    if fault == "half a character":
        file.write_bytes(file.read_bytes().replace(b"lora_unet_mid", b"lora_\\ud800id"))
    done = run(*COMMANDS[command])
    if command == "audit":
        assert done.returncode in (1, 3)
    else:
        assert done.returncode == 3, done.stderr
        assert words in done.stderr
        assert "attn1_to_q" in done.stderr or "attn1.to_q" in done.stderr or fault == "half a character"
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors"]
