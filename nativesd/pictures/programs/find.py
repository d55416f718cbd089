"""From a picture, or a .txt file, to the recipe of whichever program made it."""

from __future__ import annotations

from pathlib import Path

from nativesd.errors import SourceError
from nativesd.pictures.embedded import Texts, read_texts
from nativesd.pictures.programs import a1111, comfyui, fooocus, invokeai, novelai, swarmui
from nativesd.pictures.programs.recipe import Recipe, json_object

READERS = (swarmui.read, fooocus.read, a1111.read, invokeai.read, novelai.read, comfyui.read)
"""In this order, as several programs keep a text of A1111's form beside their own."""


def read_recipe(path: str | Path) -> Recipe:
    """How a picture was made. Raises SourceError, with what it holds instead, where nothing says so.

    Raises UsageError for a value that cannot be.
    """
    return recipe_of(read_texts(path))


def recipe_of(texts: Texts) -> Recipe:
    """How a picture with these texts was made. Raises what `read_recipe` raises."""
    for read in READERS:
        if (recipe := read(texts)) is not None:
            return recipe
    raise SourceError(f"{texts.where} {_what_it_holds(texts)}")


def _what_it_holds(texts: Texts) -> str:
    graph = json_object(texts.chunks.get("prompt", "")) or json_object(texts.parameters) or {}
    kinds = sorted({str(node.get("class_type")) for node in graph.values() if isinstance(node, dict)} - {"None"})
    if kinds:
        return f"holds a ComfyUI graph without a KSampler, which is not read: {', '.join(kinds[:8])}"
    if json_object(texts.chunks.get("workflow", "")) is not None:
        return "holds a ComfyUI workflow as it is edited, without the prompt as it was run, which alone is read"
    if json_object(texts.parameters) is not None:
        return "holds its parameters as JSON of a program that is not known here"
    if texts.parameters:
        return (
            "holds a text without any generation parameters: no line of it starts with Steps:, so nothing says that it "
            "is a prompt"
        )
    software = texts.chunks.get("Software") or texts.chunks.get("software")
    made = f" (made by {software})" if software else ""
    return (
        f"holds no generation parameters{made}: there is no PNG text chunk or EXIF UserComment of a program that is "
        f"known here, and no .txt file beside it"
    )
