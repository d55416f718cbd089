"""The tables of docs/coming-from.md: every name in them is what it is said to be."""

from __future__ import annotations

import inspect
import re

import diffusers
import pytest
from reading import ROOT, tables

from nativesd.pipeline.asked.arguments import CallOptions
from nativesd.pipeline.asked.elsewhere import ELSEWHERE
from nativesd.sampling.names import find_sampler, find_schedule

TABLES = tables(ROOT / "docs" / "coming-from.md")
PIPELINES = (
    diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline,
    diffusers.StableDiffusionInpaintPipeline, diffusers.StableDiffusionXLPipeline,
    diffusers.StableDiffusionXLImg2ImgPipeline, diffusers.StableDiffusionControlNetPipeline,
    diffusers.StableDiffusionInstructPix2PixPipeline,
)  # fmt: skip
METHODS = {"load_lora_weights", "set_adapters", "scheduler"}  # of a pipeline, where the others are arguments


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("row", TABLES["A call"], ids=lambda row: row[0])
def test_options(row: list[str]) -> None:
    ours, diffusers_names, a1111, comfyui = row
    assert set(code(ours)) <= set(CallOptions.__annotations__)
    known = {name for pipeline in PIPELINES for name in inspect.signature(pipeline.__call__).parameters}
    assert set(code(diffusers_names)) <= known | METHODS
    for name in {*code(diffusers_names), *code(a1111), *code(comfyui)} & ELSEWHERE.keys() - set(code(ours)):
        assert any(own in ELSEWHERE[name].lower() for own in code(ours)), f"{name}: the hint is {ELSEWHERE[name]}"


@pytest.mark.parametrize("row", TABLES["Samplers"], ids=lambda row: row[0])
def test_samplers(row: list[str]) -> None:
    ours, *others = row
    for name in filter(None, re.split(", ", ", ".join(others))):
        assert find_sampler(name).sampler.name == ours, name
    assert not others[0] or hasattr(diffusers, others[0])


@pytest.mark.parametrize("row", TABLES["Schedules"], ids=lambda row: row[0])
def test_schedules(row: list[str]) -> None:
    ours, of_diffusers, *others = row
    for name in filter(None, re.split(", ", ", ".join(others))):
        assert find_schedule(name) == ours, name
    for name in ours.split(", "):
        assert find_schedule(name) == name
    arguments = inspect.signature(diffusers.DPMSolverMultistepScheduler).parameters
    assert {name for name in code(of_diffusers) if "." not in name} <= set(arguments)


def test_loading() -> None:
    """The methods of diffusers' pipelines that are named."""
    named = [name for row in TABLES["Loading"] for name in code(row[1]) if re.fullmatch("[a-z_]+", name)]
    methods = [name for name in named if name.startswith(("from_", "enable_", "load_"))]
    assert len(methods) == 4
    assert all(hasattr(diffusers.StableDiffusionPipeline, name) for name in methods)
