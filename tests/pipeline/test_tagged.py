"""LoRAs that prompts name are those that were passed, or are found in folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from nativesd.errors import UsageError
from nativesd.pipeline.asked.tagged import tagged_prompts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ink.safetensors", "deep/Sea_v2.safetensors", "twice.safetensors", "deep/twice.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_tags_name_files(folder: Path) -> None:
    bare, uses = tagged_prompts(["a <lora:ink:0.5:0.25>, <lora:sea_v2:0.8>"], [("other.safetensors", 1, 1)], [folder])
    assert bare == ["a,"]
    assert uses == [
        ("other.safetensors", 1, 1),
        (str(folder / "ink.safetensors"), 0.25, 0.5),
        (str(folder / "deep/Sea_v2.safetensors"), 0.8, 0.8),
    ]
    assert tagged_prompts(["a <lora:ink:0.5>"], [("x/Ink.safetensors", 1, 1)], []) == (
        ["a"],
        [("x/Ink.safetensors", 0.5, 0.5)],
    )
    assert tagged_prompts(["a", "b"], [("x", 1, 1), ("y/x", 1, 1)], []) == (["a", "b"], [("x", 1, 1), ("y/x", 1, 1)])
    assert tagged_prompts(["<lora:z:2> <lora:Z:2>"], [("x", 1, 1), ("y/x", 1, 1), ("z", 1, 1)], []) == (
        [""],
        [("x", 1, 1), ("y/x", 1, 1), ("z", 2, 2)],
    )


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (["a <lora:inc:1>"], "names the LoRA inc, which is not here: pass its file .*there is ink"),
        (["a <lora:twice:1>"], "there are several: .*twice.safetensors and .*twice.safetensors"),
        (["a <lora:ink:1>", "b"], "must name the same LoRAs"),
        (["a <lora:ink:1> <lora:Ink:0.5>"], "names the LoRA Ink twice, with other scales: keep one of them"),
        (["a <lora:wax:1>"], "names the LoRA wax, and there are several: wax.safetensors and y/wax.safetensors"),
    ],
)
def test_what_tags_cannot_name(folder: Path, prompts: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        tagged_prompts(prompts, [("wax.safetensors", 1, 1), ("y/wax.safetensors", 1, 1)], [folder])


def test_a_folder_that_is_none() -> None:
    with pytest.raises(UsageError, match="lora_dirs: nowhere is no folder"):
        tagged_prompts(["<lora:a:1>"], [], [Path("nowhere")])
