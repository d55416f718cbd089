"""A first evening at the command line: nothing is found out after the steps, nothing is silent, nothing is cut off."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click
import pytest
from PIL import Image
from rich.table import Table

import nativesd
from conftest import Run
from nativesd import cli
from nativesd.cli import common
from nativesd.cli.help import with_flags
from nativesd.errors import NativesdWarning, UsageError
from nativesd.machine import bench
from nativesd.sampling.table import SAMPLERS
from nativesd.shipped import TINY

SCRIPT = [sys.executable, "-m", "nativesd"]


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("nativesd.loading.load.load", load)


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-o", "nodir/x.png"], 3, "nodir/x.png cannot be written: there is no folder nodir"),
        (["-o", "x.xyz"], 2, ".xyz is not a picture format"),
        (["-o", "folder.png"], 3, "it is a folder"),
        (["--preview", "nodir/x.png"], 3, "there is no folder nodir"),
        (["--steps", "0"], 2, "--steps must be between 1 and 999, not 0"),
        (["--steps", "two"], 2, "'two' is not a valid integer"),
        (["--cfg-scale", "nan"], 2, "--guidance-scale must be between 0 and 1000"),
        (["--sampler", "Euler b"], 2, "no sampler 'Euler b'"),
        (["--hires", "0"], 2, "--hires must be above 0"),
        (["--hires", "nan"], 2, "--hires must be above 0"),
        (["--hires", "2", "--hires-steps", "0"], 2, "--hires-steps must be between"),
        (["--strength", "0.5"], 2, "--strength does nothing without --image"),
        (["--steps-as", "all"], 2, "--steps-as does nothing without --image"),
        (["--resize", "crop"], 2, "--resize does nothing without --image"),
        (["--image-guidance-scale", "2"], 2, "--image-guidance-scale does nothing without --image"),
        (["--mask", "x.png"], 2, "--mask does nothing without --image"),
        (["--outpaint", "1,1,1,1"], 2, "--outpaint does nothing without --image"),
        (["--mask-blur", "3", "--image", "x.png"], 2, "--mask-blur does nothing without --mask or --outpaint"),
        (["--refiner-at", "0.5"], 2, "--refiner-at does nothing without --refiner"),
        (["--guess-mode"], 2, "--guess-mode does nothing without --control"),
        (["--control-scale", "1"], 2, "1 --control-scale for 0 --control"),
        (["--hires-strength", "0.5"], 2, "--hires-strength does nothing without --hires"),
        (["--engines", "x"], 2, "--engines does nothing without a --backend"),
        (["--engines", "x", "--backend", "cudagraphs"], 2, "--engines does nothing without a --backend"),
        (["--size", "64x64", "--width", "64"], 2, "--size says what --width and --height say"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    run: Run, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    done = run("generate", "a fox", *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stdout == ""


def test_the_words_of_other_tools(run: Run, tmp_path: Path) -> None:
    """--cfg-scale, --num-inference-steps, --width and --height, --seed -1, and what does nothing with the model."""
    done = run("generate", "an astronaut", "--cfg-scale", "1", "--num-inference-steps", "2", "--width", "48", "--seed",
               "-1", "--negative-prompt", "fog", "--offload")  # fmt: skip
    assert done.returncode == 0, done.stderr
    picture = tmp_path / done.stdout.strip()
    assert Image.open(picture).size == (48, nativesd.load("tiny").config.size)
    text = Image.open(picture).text["parameters"]  # type: ignore[attr-defined]
    assert "Steps: 2," in text
    assert "CFG scale: 1," in text
    assert "nativesd: --negative-prompt is not used" in done.stderr
    assert "nativesd: the embedded model does not know astronaut:" in done.stderr
    assert "--offload does nothing on a CPU" in done.stderr or nativesd.load("tiny").device.type == "cuda"
    assert re.search(r"^nativesd: 2 steps in [\d.]+ s, peak memory [\d.]+ [MG]B$", done.stderr, re.MULTILINE)


def test_plain_lines_where_there_is_no_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from nativesd.cli import progress

    monkeypatch.setattr(progress, "EVERY", 0)
    done = run("generate", "a fox", "--steps", "2")
    lines = [line for line in done.stderr.splitlines() if "step" in line]
    assert lines[:2] == ["nativesd: step 1 of 2", "nativesd: step 2 of 2"]
    assert lines[2].startswith("nativesd: 2 steps in ")
    assert "\r" not in done.stderr


def test_what_a_picture_was_made_from_is_not_repeated_in_silence(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    assert run("generate", "a fox", "--image", "red.png", "--steps", "2", "-o", "first.png").returncode == 0
    done = run("generate", "--from", "first.png", "-o", "second.png")
    assert done.returncode == 2
    assert "first.png was made from a picture: pass that with --image" in done.stderr


def test_exporting_is_said_and_other_libraries_are_not_heard(run: Run, tmp_path: Path) -> None:
    done = run("generate", "a fox", "--steps", "1", "--backend", "onnx", "--engines", "graphs")
    assert done.returncode == 0, done.stderr
    assert "nativesd: exporting the unet once to graphs" in done.stderr
    assert all(line.startswith("nativesd: ") for line in done.stderr.splitlines()), done.stderr
    again = run("generate", "a fox", "--steps", "1", "--backend", "onnx", "--engines", "graphs")
    assert "exporting" not in again.stderr
    listed = run("engines", "list", "--engines", "graphs")
    rows = [line.split()[:2] for line in listed.stdout.splitlines()]
    assert ["unet", "tiny"] in rows


def test_our_warnings_are_shown_and_name_flags(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def make(*_: object, **__: object) -> None:
        warnings.warn("a library's", DeprecationWarning, stacklevel=1)
        warnings.warn("one of ours: pass vae= and text_encoders=", NativesdWarning, stacklevel=1)
        raise UsageError("load it with dtype='float32', without fp8=True")

    monkeypatch.setattr("nativesd.loading.load.load", make)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = run("generate", "a fox")
    assert done.stderr.splitlines() == [
        "nativesd: warning: one of ours: pass --vae and --text-encoder",
        "nativesd: load it with --dtype float32, without --fp8",
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("steps must be above 0", "--steps must be above 0"),
        ("width and height must be multiples", "--width and --height must be multiples"),
        ("hires.steps must be at least 1", "--hires-steps must be at least 1"),
        ("mask is for a picture: pass image= too", "--mask is for a picture: pass --image too"),
        ("load with device='cuda:1'", "load with --device cuda:1"),
        ("pass refiner=nativesd.load(...)", "pass refiner=nativesd.load(...)"),
        ("x/steps must be, a.steps=1, seeds must be", "x/--steps must be, a.steps=1, seeds must be"),
    ],
)
def test_messages_in_the_words_of_the_command_line(message: str, expected: str) -> None:
    generate = cli.main.commands["generate"]  # type: ignore[attr-defined]
    assert with_flags(message, generate.params) == expected


def test_help_has_sections_and_whole_sentences(run: Run) -> None:
    text = run("generate", "--help").stdout
    titles = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert titles[:2] == ["The picture", "The model"]
    assert titles[-1] == "Options"
    assert "--guidance-scale, --cfg-scale" in text
    generate = cli.main.commands["generate"]  # type: ignore[attr-defined]
    options = [param for param in generate.params if isinstance(param, click.Option)]
    assert all(text.count(f"  {option.opts[0]}") >= 1 for option in options)
    assert [option.name for option in options if not hasattr(option, "section")] == ["verbose"]
    for group in ("--help", "export --help", "engines --help", "lora --help"):
        shown = run(*group.split()).stdout
        assert "..." not in shown.partition("Commands:")[2]
        assert shown.rstrip().endswith(".")


def test_python_dash_m(tmp_path: Path) -> None:
    done = subprocess.run([*SCRIPT, "--version"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == f"nativesd, version {nativesd.__version__}\n"
    assert subprocess.run([*SCRIPT, "generate", "--nope"], capture_output=True, check=False).returncode == 2


def test_interrupted_by_the_keyboard(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("nativesd.loading.load.load", stop)
    done = run("generate", "a fox")
    signal.signal(signal.SIGINT, before)
    assert done.returncode == 130
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(("imported", "wait"), [("click", 0), ("torch.nn", 0), ("nativesd.cli.progress", 2)])
def test_a_signal_at_any_time(tmp_path: Path, imported: str, wait: float) -> None:
    """During our imports, torch's, or the steps: 130, and not a word."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "nativesd", "generate", "a fox", "--steps", "900"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        # a shell has what it runs in the background ignore the signal, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    while imported not in process.stderr.readline().split():  # what was imported last
        assert process.poll() is None
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    said = [line for line in re.split(r"[\r\n]+", err) if line.strip() and not line.startswith("import time:")]
    assert [line for line in said if not line.startswith("nativesd: step ")] == []
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def on_terminal(columns: int, *arguments: str) -> list[str]:
    """What a terminal of so many columns shows."""
    master, slave = pty.openpty()
    done = subprocess.Popen([*SCRIPT, *arguments], stdout=slave, stderr=subprocess.DEVNULL,
                            env=os.environ | {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "xterm"})  # fmt: skip
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    done.wait()
    os.close(master)
    return re.sub(r"\x1b\[[\d;]*m", "", b"".join(parts).decode()).splitlines()


def test_wrapped_lines_keep_their_indent() -> None:
    lines = on_terminal(60, "audit", str(TINY))
    assert max(map(len, lines)) <= 60
    indent = " " * (common.LABEL + 2)
    wrapped = [line for line in lines if line.startswith(indent)]
    assert len(wrapped) > 3
    piped = subprocess.run([*SCRIPT, "audit", str(TINY)], capture_output=True, text=True, check=True).stdout
    assert " ".join(" ".join(lines).split()) == " ".join(piped.split())
    assert not any(line.startswith(indent) for line in piped.splitlines())


def test_no_name_is_cut_in_a_table() -> None:
    lines = on_terminal(80, "samplers")
    assert not any("…" in line for line in lines)
    assert max(map(len, lines)) <= 80
    names = [name for each in SAMPLERS for name in (each.name, each.published, *each.aliases) if name]
    assert set(" ".join(names).split()) <= set(" ".join(lines).split())
    assert "[order 3]" in subprocess.run([*SCRIPT, "samplers"], capture_output=True, text=True, check=True).stdout


def test_tables_are_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", box=None)
    table.add_row("x" * 300)
    common.print_tables(table)
    assert "x" * 300 in capsys.readouterr().out


def test_bench_says_what_it_will_take(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    case = bench.Case("vae", "sd", 1, "fp32", 1)
    monkeypatch.setitem(bench.CASES, case.name, case)
    done = run("bench", "--case", case.name, "--rounds", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert re.match(
        rf"nativesd: {case.name}: [\d.]+ GB of weights, 8 calls of [\d.]+ TFLOP: \d+ s at the rate", lines[0]
    )
    assert lines[1] == "nativesd: nativesd plain: call 1 of 4"
    assert len(lines) == 9


def test_a_folders_index_means_the_folder(run: Run, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    done = run("generate", "a fox", "--model", "model/model_index.json", "--steps", "1", "-o", "a.png")
    assert done.returncode == 0, done.stderr
    assert run("audit", "model/model_index.json").stdout == run("audit", "model").stdout


def test_types_travel_with_the_package() -> None:
    assert (Path(nativesd.__file__).parent / "py.typed").is_file()
    assert {"generate", "load", "NativesdWarning", "Interrupted", "Step"} <= set(dir(nativesd))
    assert all(hasattr(nativesd, name) for name in dir(nativesd))
