"""The README and docs/: every command and block runs, in the order of its page; links and names exist."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import pytest
import torch
from PIL import Image
from reading import PAGES, REASONS, ROOT, RUN, SHOWN, anchors, blocks, commands_of, links, spans
from safetensors.torch import load_file, save_file
from torch import nn

import nativesd
from conftest import Done, Run
from nativesd.cli.common import main
from nativesd.export import library
from nativesd.export.graphs import FILE
from nativesd.export.kept.store import Store
from nativesd.export.library import Part
from nativesd.export.sessions import OnnxRunner
from nativesd.streaming.options import StreamOptions
from oracles import published_manifests, sparse
from pipeline.test_pipeline import save_model

BY_NAME = [page.relative_to(ROOT).as_posix() for page in PAGES]
OWN_LOOP = ROOT / "docs" / "your-own-loop.md"
pytestmark = pytest.mark.filterwarnings("ignore:.* of no published form", "ignore:`torch.jit.script` is deprecated")
pages = pytest.mark.parametrize("page", PAGES, ids=BY_NAME)

Play = Callable[[Path], None]


# --- blocks


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages speak of.

    The embedded model as a single file, in safetensors and as torch.save writes it, and its UNet in TorchScript; a LoRA
    for it; the header of a published LoRA, and that of a UNet of SDXL with two faults.
    """
    folder = tmp_path_factory.mktemp("stand-ins")
    nativesd.convert("tiny", folder / "model.safetensors", layout="ldm")
    state = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    torch.save({"state_dict": state, "global_step": 1000}, folder / "old.ckpt")
    unet_only = {key: tensor for key, tensor in state.items() if key.startswith("model.diffusion_model.")}
    torch.jit.script(scripted(unet_only)).save(str(folder / "unet.pt"))
    generator = torch.Generator().manual_seed(0)
    key, width = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 144
    save_file(
        {
            f"{key}.lora_down.weight": torch.randn(4, width, generator=generator),
            f"{key}.lora_up.weight": torch.randn(width, 4, generator=generator) / width,
            f"{key}.alpha": torch.tensor(4.0),
        },
        folder / "style.safetensors",
    )
    published = published_manifests()
    sparse(published["lora-sd15.kohya"], folder / "published-lora.safetensors")
    sdxl = published["sdxl-base.checkpoint.sgm"]
    unet = {key: shape for key, shape in sdxl.shapes.items() if key.startswith("model.diffusion_model.")}
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight"
    unet[key.replace("weight", "wieght")] = unet.pop(key)
    unet["model.diffusion_model.surprise"] = (2, 3)
    sparse(replace(sdxl, shapes=unet), folder / "broken.safetensors")
    return folder


class Node(nn.Module):
    """A module for the sake of its name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def scripted(state: Mapping[str, torch.Tensor]) -> Node:
    """Modules of which this is the state, for TorchScript to write."""
    root = Node()
    for key, tensor in state.items():
        node, (*path, name) = root, key.split(".")
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = cast("Node", node._modules[part])
        node.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return root


@pytest.fixture
def workplace(stand_ins: Path, tmp_path: Path) -> Path:
    """An empty folder but for the stand-ins, the one that `run` goes to."""
    for file in stand_ins.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


@pytest.fixture
def play(workplace: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs a page's blocks in the workplace, one after the other."""

    def script(command: list[str]) -> Done:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command)
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        captured = capsys.readouterr()
        return Done(0, captured.out, captured.err)

    def play_page(page: Path) -> None:
        monkeypatch.chdir(workplace)
        namespace: dict[str, object] = {"__name__": page.stem}
        for block in blocks(page):
            if block.skipped is not None or block.language not in RUN:
                continue
            if block.language == "python":
                exec(compile(block.text, str(block), "exec"), namespace)
                capsys.readouterr()
                continue
            if block.language == "pycon":
                test = doctest.DocTestParser().get_doctest(block.text, namespace, str(block), None, block.line)
                said: list[str] = []
                failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
                assert not failed, "".join(said)
                continue
            commands = list(commands_of(block))
            for number, (command, wanted) in enumerate(commands):
                program, *arguments = shlex.split(command, comments=True)
                assert program in ("nativesd", "python"), f"{block}: {command}: only these two are run"
                done = run(*arguments) if program == "nativesd" else script(arguments)
                expected = block.exit_codes if number == len(commands) - 1 else (0,)
                assert done.returncode in expected, f"{block}: {command}\n{done.stdout}{done.stderr}"
                if block.language == "console":
                    same = doctest.OutputChecker().check_output(wanted, done.stdout, doctest.ELLIPSIS)
                    assert same, f"{block}: {command} prints\n{done.stdout}"

    return play_page


@pytest.mark.parametrize("page", [page for page in PAGES if page != OWN_LOOP], ids=lambda page: page.name)
def test_blocks_run(page: Path, play: Play) -> None:
    play(page)


def test_the_own_loop_paints_the_picture_of_generate(
    workplace: Path, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own blocks; then the same graphs in a pipeline, without control and with it: no value differs."""
    play(OWN_LOOP)
    assert len(OWN_LOOP.with_name("own_loop.py").read_text(encoding="utf-8").splitlines()) < 80
    pipe = exported_pipeline("tiny", workplace / "exported", monkeypatch)
    own, steered = (np.asarray(Image.open(name)) for name in ("own.png", "steered.png"))
    assert (np.asarray(pipe("a strawberry on a yellow background", **AS_OWN).images[0]) == own).all()
    edges = nativesd.Control("tiny", "edges.png")
    assert (np.asarray(pipe("a cactus on a blue background", control=[edges], **AS_OWN).images[0]) == steered).all()


@pytest.mark.full
@pytest.mark.parametrize(("form", "dtype"), [("sdxl", "float32"), ("sd15", "float16")])
def test_the_own_loop_of_other_families(form: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two text encoders, zeros for the empty negative prompt, noise prediction, float16."""
    save_model(form, tmp_path / "model")
    nativesd.export_onnx(tmp_path / "model", tmp_path / "exported", dtype=dtype)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["own_loop.py", "exported", "a cat", "own.png"])
    runpy.run_path(str(OWN_LOOP.with_name("own_loop.py")), run_name="__main__")
    pipe = exported_pipeline(tmp_path / "model", tmp_path / "exported", monkeypatch, dtype=dtype)
    assert (np.asarray(pipe("a cat", **AS_OWN).images[0]) == np.asarray(Image.open("own.png"))).all()


AS_OWN: dict[str, Any] = {"seed": 3, "noise": "cuda", "sampler": "DDIM"}
"""What own_loop.py has written into it."""


def exported_pipeline(
    source: str | Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> nativesd.Pipeline:
    """A model that ONNX Runtime runs by the graphs of an exported folder."""

    def exported(part: Part, store: Store, device: torch.device) -> OnnxRunner:
        graph = part.graph()
        return OnnxRunner(folder / part.name / FILE, graph.schema, graph.dtype, device)

    monkeypatch.setattr(library, "onnx_runner", exported)
    return nativesd.load(source, **options).accelerate("onnx", engines=folder / "none")


@pages
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in blocks(page):
        assert block.language in RUN | SHOWN, f"{block}: a block of {block.language or 'no language'}"
        if block.skipped is not None:
            assert block.language in RUN, f"{block}: {block.language} is never run"
            assert block.skipped.startswith(REASONS), f"{block}: {block.skipped!r} is no known reason"
        if block.language in SHOWN:
            assert not re.search(r"^(\$ |nativesd |python |pip )", block.text, re.M), f"{block}: holds a command"


def test_most_blocks_run() -> None:
    """A reason is for what cannot run here, not for what is a nuisance."""
    every = [block for page in PAGES for block in blocks(page) if block.language in RUN]
    assert sum(block.skipped is None for block in every) > len(every) / 2


# --- what sentences name


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}: no such heading"


@pages
def test_files_exist(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*(/|\.py|\.toml|\.md)", span) and "/" in span:
            places = [folder / span for folder in (ROOT, ROOT / "nativesd", ROOT / "tests", ROOT / "nativesd/weights")]
            assert any(place.exists() for place in places), f"{page.name}: {span}"


def commands(group: click.Group = main) -> dict[str, click.Command]:
    """Every command by its words."""
    out: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        inner = commands(command) if isinstance(command, click.Group) else {"": command}
        out |= {f"{name} {rest}".strip(): each for rest, each in inner.items()} | {name: command}
    return out


def options(command: click.Command) -> set[str]:
    names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return names | {"--help", "--version"}


@pages
def test_commands_and_options_exist(page: Path) -> None:
    known = commands()
    tools = {match for file in ROOT.glob("tools/*.py") for match in re.findall(r'"(--[\w-]+)"', file.read_text())}
    every = {"--no-deps", "--no-half", "--medvram"}.union(tools, *(options(command) for command in known.values()))
    text = [*spans(page), *(line for block in blocks(page) if block.language in ("sh", "console")
                            for line, _ in commands_of(block))]  # fmt: skip
    for span in text:
        words = span.split()
        flags = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)}
        if words[:1] != ["nativesd"] or len(words) == 1:
            if span.startswith("--"):
                assert flags <= every, f"{page.name}: {span}"
            continue
        name = next((" ".join(words[1 : 1 + n]) for n in (2, 1) if " ".join(words[1 : 1 + n]) in known), None)
        if name is None and words[1].startswith("-"):
            continue
        assert name is not None, f"{page.name}: {span}: no such command"
        assert flags <= options(known[name]), f"{page.name}: {span}: {flags - options(known[name])}"


def arguments() -> set[str]:
    """The names of arguments that the public functions and records take."""
    public = [getattr(nativesd, name) for name in nativesd.__all__]
    functions = [each for each in public if callable(each)]
    functions += [nativesd.Pipeline.__call__, nativesd.Pipeline.accelerate, nativesd.Pipeline.load_embedding]
    functions += [nativesd.Stream.__call__, nativesd.Stream.update]
    out: set[str] = {*StreamOptions.__annotations__}
    for function in functions:
        try:
            out |= set(inspect.signature(function).parameters)
        except ValueError:  # an exception class
            continue
    return out


@pages
def test_arguments_and_public_names_exist(page: Path) -> None:
    known = arguments()
    for span in spans(page):
        if match := re.match(r"(\w+)=", span):
            assert match[1] in known, f"{page.name}: {span}"
        for name in re.findall(r"\bnativesd\.(\w+)", span):
            there = name in nativesd.__all__ or (ROOT / "nativesd" / name).exists()
            assert there or (ROOT / f"nativesd/{name}.py").exists(), f"{page.name}: {span}"


# --- the README's bounds


def test_the_readme_is_short_and_in_order() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert headings[:6] == [
        "Two commands", "Will it run here?", "Your own model", "What is in that file?", "What it does",
        "Where to read on",
    ]  # fmt: skip


def test_the_readme_leads_to_every_page() -> None:
    found = {(ROOT / target.partition("#")[0]).resolve() for target in links(PAGES[0])}
    assert set(PAGES[1:]) <= found


def test_ci_installs_what_the_readme_says() -> None:
    """A package that only one of them names is a test that only one of them runs."""
    named = [
        re.findall(r"^ *pip install (?:-q )?(--no-deps .*|\"\.\[test\]\")", (ROOT / file).read_text(), re.MULTILINE)
        for file in ("README.md", ".ci/run")
    ]
    assert [line.partition(" #")[0] for line in named[1]] == named[0] != []
