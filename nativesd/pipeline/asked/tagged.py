"""From the LoRAs that prompts name to files: those that were passed, and those in the folders to look in."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from nativesd.errors import UsageError
from nativesd.shipped import LCM_LORA
from nativesd.text.tags import Tag, take_tags

LoraUse = tuple[str, float, float]
"""A file, and the scales of the UNet's part and of the text encoders'."""
SUFFIX = ".safetensors"


def tagged_prompts(
    prompts: Sequence[str], loras: Sequence[LoraUse], folders: Sequence[Path]
) -> tuple[list[str], list[LoraUse]]:
    """The prompts without their tags, and all LoRAs: a tag takes the scale of one that was passed, or adds one.

    Raises UsageError where prompts of one batch name different LoRAs, which are merged for all of it, for a name that
    is not found, or twice, and what `take_tags` raises.
    """
    bare, tags = zip(*map(take_tags, prompts), strict=True)
    if any(set(other) != set(tags[0]) for other in tags):
        raise UsageError("the prompts of a batch must name the same LoRAs, as these are merged for all of it")
    uses = list(loras)
    for name, tag in {tag.name.lower(): tag for tag in tags[0]}.items():
        passed = [place for place, (file, _, _) in enumerate(uses) if Path(file).stem.lower() == name]
        if len(passed) > 1:
            raise _several(tag, *(uses[place][0] for place in passed))
        if passed:
            uses[passed[0]] = (uses[passed[0]][0], tag.unet, tag.text)
        else:
            uses.append((_find(tag, folders, [Path(file).stem for file, _, _ in loras]), tag.unet, tag.text))
    return list(bare), uses


def _find(tag: Tag, folders: Sequence[Path], passed: Sequence[str]) -> str:
    if tag.name == LCM_LORA.stem:
        return str(LCM_LORA)
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"lora_dirs: {folder} is no folder")
    files = [file for folder in folders for file in sorted(folder.rglob(f"*{SUFFIX}"))]
    found = [file for file in files if file.stem.lower() == tag.name.lower()]
    if len(found) > 1:
        raise _several(tag, *found)
    if found:
        return str(found[0])
    close = get_close_matches(tag.name, [*passed, *(file.stem for file in files)], 1)
    raise UsageError(
        f"the prompt names the LoRA {tag.name}, which is not here: pass its file with loras=, or a folder that has "
        f"{tag.name}{SUFFIX} with lora_dirs=" + (f" (there is {close[0]})" if close else "")
    )


def _several(tag: Tag, first: str | Path, second: str | Path, *_: str | Path) -> UsageError:
    return UsageError(f"the prompt names the LoRA {tag.name}, and there are several: {first} and {second}")
