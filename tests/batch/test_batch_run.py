"""`nativesd batch`: every row once, whatever the shards, the size of batches and what went wrong before."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nativesd
from conftest import Run as Command
from nativesd.batch import studio
from nativesd.batch.columns import Columns
from nativesd.batch.plan import Plan
from nativesd.batch.results import read_results
from nativesd.batch.run import Run, Tally
from nativesd.batch.shards import Shard
from nativesd.batch.studio import FAULTS, BrokenError, Setting
from nativesd.cli import batch as told
from nativesd.errors import NoMemoryError, SourceError, UsageError
from nativesd.pictures.result import Result

ROWS: list[dict[str, Any]] = [
    {"id": "strawberry", "prompt": "a strawberry on a yellow background", "caption": "kept"},
    {"id": "fox", "prompt": "a fox on a green background", "negative_prompt": "red"},
    {"id": "wide", "prompt": "a small cactus on a pink background", "width": 96},
    {"id": "cactus", "prompt": "a small cactus on the left on a pink background", "seed": 3},
    {"id": "long", "prompt": "a fox " * 60, "sampler": "Euler a"},
    {"prompt": "a strawberry on a blue background"},
    {"id": "both", "prompt": "a fox", "num_images": 2},
]
PICTURES = len(ROWS) + 1


class Stub:
    """In place of a pipeline: pictures that tell their prompts and seeds apart, at no cost."""

    def __init__(self, fails: Callable[[Sequence[str]], None] | None = None) -> None:
        self.calls: list[list[str]] = []
        self._fails = fails

    def __call__(self, prompts: Sequence[str], *, seed: Sequence[int], **options: Any) -> Result:
        self.calls.append(list(prompts))
        if self._fails is not None:
            self._fails(prompts)
        images = [
            Image.new("RGB", (8, 8), tuple(hashlib.sha256(f"{prompt} {each}".encode()).digest()[:3]))
            for prompt, each in zip(prompts, seed, strict=True)
        ]
        parameters = {
            "prompt": list(prompts), "negative_prompt": "", "steps": 1, "sampler": "Euler", "schedule": "normal",
            "guidance_scale": 1.0, "width": 8, "height": 8, "model": "stub",
        }  # fmt: skip
        return Result(images, list(seed), parameters, torch.zeros(1))

    def close(self) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(studio, "load", lambda *_, **__: made)
    return made


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    return written(tmp_path / "jobs.jsonl", ROWS)


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


WHOLE = Shard()


def paint(
    jobs: Path, out: Path, *, shard: Shard = WHOLE, told: Callable[[Tally], object] = lambda _: None, **options: Any
) -> Tally:  # fmt: skip
    defaults = {"steps": 2} | options.pop("defaults", {})
    setting = Setting(suffix=options.pop("suffix", "png"), folder=jobs.parent)
    columns = Columns(defaults=defaults)
    with Plan.of(jobs, columns, (shard.index, shard.count)) as plan:
        return Run(plan, out, setting, shard, **options)(told=told)


def hashes(out: Path) -> dict[str, str]:
    """The pixels of every picture, by its id; and the results agree with them."""
    found = {}
    for line in read_results(out):
        assert line["id"] not in found, f"{line['id']} has two lines"
        assert line["error"] is None
        image = Image.open(out / line["file"])
        assert line["sha256"] == hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        assert (line["width"], line["height"]) == image.size
        found[line["id"]] = line["sha256"]
    return found


def lines(out: Path) -> dict[str, Any]:
    return {line["id"]: line for line in read_results(out)}


# --- the same pictures


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every picture, painted alone."""
    folder = tmp_path_factory.mktemp("whole")
    tally = paint(written(folder / "jobs.jsonl", ROWS), folder / "out", size=1)
    assert (tally.painted, tally.failed) == (PICTURES, 0)
    return folder / "out"


def pixels(out: Path) -> dict[str, np.ndarray]:
    return {line["id"]: np.asarray(Image.open(out / line["file"]), dtype=np.int16) for line in read_results(out)}


def test_any_shards_paint_the_same(jobs: Path, tmp_path: Path, whole: Path) -> None:
    """To the last bit, where the batches are the same."""
    tallies = [paint(jobs, tmp_path / "out", shard=Shard(i, 3), size=1) for i in range(3)]
    assert sum(tally.painted for tally in tallies) == PICTURES
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == [
        f"results.{i}-of-3.jsonl" for i in (1, 2, 3)
    ]
    assert hashes(tmp_path / "out") == hashes(whole)
    again = paint(jobs, tmp_path / "out", size=2)
    assert (again.painted, again.skipped) == (0, PICTURES)


def test_any_batches_paint_the_same(jobs: Path, tmp_path: Path, whole: Path) -> None:
    """Up to rounding, which is another one for a matrix of another height."""
    paint(jobs, tmp_path / "out", size=4)
    hashes(tmp_path / "out")
    alone = pixels(whole)
    for name, picture in pixels(tmp_path / "out").items():
        difference = np.abs(picture - alone[name])
        assert difference.max() <= 1, name
        assert (difference > 0).mean() < 0.01, name


def test_a_row_is_the_picture_of_a_call(whole: Path) -> None:
    """With the seed that the results say, where the row says none."""
    pipe = nativesd.load()
    found = lines(whole)
    for row in (ROWS[0], ROWS[3]):
        alone = pipe(row["prompt"], seed=found[row["id"]]["seed"], steps=2).images[0]
        assert hashlib.sha256(alone.tobytes()).hexdigest() == found[row["id"]]["sha256"]
    assert found["cactus"]["seed"] == 3
    assert found["strawberry"]["caption"] == "kept"


def test_pictures_carry_their_parameters(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp"):
        paint(jobs, tmp_path / suffix, suffix=suffix)
        found = lines(tmp_path / suffix)
        options, _ = nativesd.options_from(tmp_path / suffix / found["fox"]["file"])
        assert (options["prompt"], options["seed"]) == (ROWS[1]["prompt"], found["fox"]["seed"])
        assert paint(jobs, tmp_path / suffix, suffix=suffix).skipped == PICTURES


def test_rows_of_one_shape_share_a_batch(stub: Stub, tmp_path: Path) -> None:
    """However far they are from each other in the file; those of one model come one after the other."""
    rows = [{"prompt": f"{i}", "width": 8 if i % 2 else 16, "model": "ab"[i % 3 > 0]} for i in range(24)]
    paint(written(tmp_path / "jobs.jsonl", rows), tmp_path / "out", size=3)
    assert [len(call) for call in stub.calls] == [3, 1, 3, 1, 3, 3, 2, 3, 3, 2]
    models = [rows[int(prompt)]["model"] for call in stub.calls for prompt in call]
    assert models == sorted(models)


# --- what is there already


def test_a_second_run_paints_what_is_not_as_asked_for(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    paint(jobs, out)
    before = lines(out)
    (out / before["fox"]["file"]).unlink()
    wide = out / before["wide"]["file"]
    wide.write_bytes(wide.read_bytes()[:-20])
    Image.new("RGB", (8, 8)).save(out / before["cactus"]["file"])  # readable, and another picture
    changed = [{**row, "steps": 3} if row.get("id") == "strawberry" else row for row in ROWS]
    tally = paint(written(tmp_path / "jobs.jsonl", changed), out)
    assert (tally.skipped, tally.damaged, tally.changed, tally.painted) == (PICTURES - 4, 3, 1, 4)
    after = lines(out)
    hashes(out)
    assert {name for name in after if after[name] != before[name]} == {"fox", "wide", "cactus", "strawberry"}


def test_more_rows_and_other_files_may_follow(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    paint(jobs, tmp_path / "out")
    tally = paint(written(tmp_path / "more.jsonl", [{"prompt": "another", "id": "another"}]), tmp_path / "out")
    assert (tally.painted, tally.skipped) == (1, 0)
    assert len(hashes(tmp_path / "out")) == PICTURES + 1


def test_other_shards_lines_count(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    """Where one was painted again under another number of shards, the newer line does."""
    out = tmp_path / "out"
    paint(jobs, out)
    paint(jobs, out, shard=Shard(0, 1), defaults={"steps": 3})
    assert paint(jobs, out, shard=Shard(1, 2)).changed > 0
    again = [paint(jobs, out, shard=Shard(i, 2), defaults={"steps": 3}) for i in range(2)]
    assert again[0].skipped > 0
    assert again[1].changed > 0
    assert sum(tally.skipped + tally.painted for tally in again) == PICTURES


def test_a_torn_line_is_mended(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    paint(jobs, out)
    results = out / "results.1-of-1.jsonl"
    raw = results.read_bytes()
    for cut in (1, 30, len(raw.splitlines(keepends=True)[-1])):
        results.write_bytes(raw[:-cut])
        tally = paint(jobs, out)
        assert (tally.painted, tally.skipped) == (1, PICTURES - 1)
        assert len(hashes(out)) == PICTURES


def test_results_that_others_spoilt(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    """Lines that say too little, or what no run writes, are no reason to end."""
    out = tmp_path / "out"
    paint(jobs, out)
    results = out / "results.1-of-1.jsonl"
    fox = lines(out)["fox"]
    odd: list[Any] = [[], {}, {"id": 5}, {"id": "fox"}, {**fox, "file": "../../fox.png"}, {
        name: value for name, value in fox.items() if name != "sha256"}]  # fmt: skip
    for line in [json.dumps(each) for each in odd] + ["[" * 100_000, "\x00", "nonsense"]:
        results.write_text(results.read_text() + line + "\n")
        tally = paint(jobs, out)
        assert tally.skipped + tally.painted == PICTURES
        assert len(hashes(out)) == PICTURES


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_results_that_are_no_file(kind: str, stub: Stub, jobs: Path, tmp_path: Path) -> None:
    odd = tmp_path / "out" / "results.2-of-3.jsonl"
    paint(jobs, tmp_path / "out")
    {"folder": odd.mkdir, "link": lambda: odd.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(odd)}[kind]()
    with pytest.raises(
        SourceError, match=r"results\.2-of-3\.jsonl is (a folder|missing: it is a link|a device or pipe)"
    ):
        paint(jobs, tmp_path / "out")


def test_half_a_character_in_results_is_no_line(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    paint(jobs, tmp_path / "out")
    (tmp_path / "out" / "results.2-of-3.jsonl").write_text('{"id": "\\ud800"}\n{"id": "fox", "file": "\\udfff"}\n')
    assert paint(jobs, tmp_path / "out").skipped == PICTURES


def pictures(out: Path) -> set[str]:
    return {path.name for path in out.glob("??/*")}


def test_earlier_pictures_of_a_row_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of another format, and that of a row which now fails."""
    bad: list[str] = []

    def fails(prompts: Sequence[str]) -> None:
        if set(bad) & set(prompts):
            raise nativesd.NativesdError("no")

    monkeypatch.setattr(studio, "load", lambda *_, **__: Stub(fails))
    jobs = written(tmp_path / "jobs.jsonl", [{"id": "a", "prompt": "a"}, {"id": "b", "prompt": "b"}])
    paint(jobs, tmp_path / "out")
    assert pictures(tmp_path / "out") == {"a.png", "b.png"}
    paint(jobs, tmp_path / "out", suffix="jpg")
    assert pictures(tmp_path / "out") == {"a.jpg", "b.jpg"}
    bad.append("a")
    paint(jobs, tmp_path / "out", suffix="jpg", defaults={"steps": 3})
    assert pictures(tmp_path / "out") == {"b.jpg"}


def test_a_run_that_is_ended_while_it_looks_forgets_nothing(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    paint(jobs, tmp_path / "out")
    before = (tmp_path / "out" / "results.1-of-1.jsonl").read_bytes()
    ending = Event()
    ending.set()
    with Plan.of(jobs, Columns(defaults={"steps": 2})) as plan:
        tally = Run(plan, tmp_path / "out")(ending)
    assert (tally.painted, tally.left) == (0, PICTURES)
    assert (tmp_path / "out" / "results.1-of-1.jsonl").read_bytes() == before
    assert paint(jobs, tmp_path / "out").skipped == PICTURES


def test_two_processes_do_not_paint_one_shard(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    def second(_: Tally) -> None:
        with pytest.raises(UsageError, match=r"another process is writing .*results\.1-of-1"):
            paint(jobs, tmp_path / "out")

    paint(jobs, tmp_path / "out", told=second)


# --- what fails


def test_a_row_that_fails_is_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(prompts: Sequence[str]) -> None:
        if "5" in prompts:
            raise UsageError("no fives")
        if "6" in prompts:
            raise RuntimeError("a fault\nover lines")

    made = Stub(fails)
    monkeypatch.setattr(studio, "load", lambda *_, **__: made)
    jobs = written(tmp_path / "jobs.jsonl", [{"prompt": f"{i}", "id": i} for i in range(12)])
    tally = paint(jobs, tmp_path / "out", size=4)
    assert (tally.painted, tally.failed, tally.left) == (10, 2, 0)
    found = lines(tmp_path / "out")
    assert (found["5"]["error"], found["5"]["file"], found["5"]["seed"]) == ("no fives", None, found["5"]["seed"])
    assert found["6"]["error"] == "a fault of nativesd or of this machine: RuntimeError: a fault"
    assert {name for name, line in found.items() if line["error"] is None} == {str(i) for i in range(12)} - {"5", "6"}
    made._fails = None
    again = paint(jobs, tmp_path / "out", size=4)  # errors are tried again, and have no line any more
    assert (again.painted, again.skipped) == (2, 10)
    assert len(hashes(tmp_path / "out")) == 12


def test_stopping_at_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(prompts: Sequence[str]) -> None:
        if "5" in prompts:
            raise UsageError("no fives")

    monkeypatch.setattr(studio, "load", lambda *_, **__: Stub(fails))
    jobs = written(tmp_path / "jobs.jsonl", [{"prompt": f"{i}"} for i in range(12)])
    tally = paint(jobs, tmp_path / "out", size=4, on_error="stop")
    assert (tally.painted, tally.failed, tally.left) == (7, 1, 4)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And later ones of its shape are not tried at the size that did not fit."""

    def fails(prompts: Sequence[str]) -> None:
        if len(prompts) > 3:
            raise NoMemoryError("the GPU's memory does not do")

    made = Stub(fails)
    monkeypatch.setattr(studio, "load", lambda *_, **__: made)
    jobs = written(tmp_path / "jobs.jsonl", [{"prompt": f"{i}"} for i in range(20)])
    tally = paint(jobs, tmp_path / "out", size=8)
    assert (tally.painted, tally.failed) == (20, 0)
    assert [len(call) for call in made.calls] == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2, 2, 2]


def test_a_broken_machine_is_no_rows_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(prompts: Sequence[str]) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(studio, "load", lambda *_, **__: Stub(fails))
    jobs = written(tmp_path / "jobs.jsonl", [{"prompt": f"{i}"} for i in range(100)])
    with pytest.raises(BrokenError, match=f"{FAULTS} calls failed one after the other, the last by RuntimeError"):
        paint(jobs, tmp_path / "out", size=1)


@pytest.mark.parametrize("size", [1, 8])
def test_bad_rows_do_not_end_a_run(size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However many there are one after the other, as long as the model paints anything at all."""

    def fails(prompts: Sequence[str]) -> None:
        if any(prompt.startswith("bad") for prompt in prompts):
            raise RuntimeError("boom")

    monkeypatch.setattr(studio, "load", lambda *_, **__: Stub(fails))
    rows = [{"prompt": f"bad {i}"} for i in range(2 * FAULTS + 1)] + [{"prompt": f"{i}"} for i in range(9)]
    tally = paint(written(tmp_path / "jobs.jsonl", rows), tmp_path / "out", size=size)
    assert (tally.painted, tally.failed, tally.left) == (9, 2 * FAULTS + 1, 0)


def test_models_that_cannot_be_loaded(jobs: Path, tmp_path: Path) -> None:
    """That of the run ends it; one that a row names is that row's error, and the others are painted."""
    rows = [{"prompt": "a", "model": "missing.safetensors", "id": "a"}, {"prompt": "b", "id": "b"}]
    tally = paint(written(tmp_path / "some.jsonl", rows), tmp_path / "out")
    assert (tally.painted, tally.failed) == (1, 1)
    assert lines(tmp_path / "out")["a"]["error"].startswith("the model missing.safetensors cannot be loaded: ")
    with Plan.of(jobs, Columns(model="missing.safetensors")) as plan, pytest.raises(BrokenError, match="missing"):
        Run(plan, tmp_path / "none", Setting("missing.safetensors"))()
    assert list((tmp_path / "none").iterdir()) == []


def test_a_full_disk_ends_the_run(stub: Stub, jobs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(nativesd.NativesdError, match="cannot be a folder of results"):
        paint(jobs, out)


# --- the command


def test_the_command(run: Command, stub: Stub, jobs: Path, tmp_path: Path) -> None:
    done = run("batch", "jobs.jsonl", "out", "--steps", "2", "--batch-size", "3")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"{PICTURES} painted, 0 skipped, 0 failed" in done.stderr
    again = run("batch", "jobs.jsonl", "out", "--steps", "2", "--shard", "1/2")
    assert again.returncode == 0
    assert "of them in shard 1 of 2" in again.stderr
    assert "0 painted" in again.stderr
    changed = run("batch", "jobs.jsonl", "out", "--steps", "3", "--lora", "x.safetensors:0.5", "--size", "64x72")
    assert f"(again: {PICTURES} as other than asked for)" in changed.stderr
    assert len(hashes(tmp_path / "out")) == PICTURES


def test_a_table_of_reasons(run: Command, jobs: Path, tmp_path: Path) -> None:
    written(jobs, [{"prompt": "a fox", "width": 61, "id": "odd"}, {"prompt": "b", "image": "missing.png"}] * 1)
    done = run("batch", "jobs.jsonl", "out", "--steps", "1")
    assert done.returncode == 1
    assert "odd" in done.stdout
    assert "width and height must be positive multiples" in done.stdout
    assert "missing.png does not exist" in done.stdout
    assert "0 painted, 0 skipped, 2 failed" in done.stderr


def test_bad_files_are_refused_before_the_first_picture(run: Command, jobs: Path, tmp_path: Path) -> None:
    jobs.write_text(jobs.read_text() + '{"promt": "a"}\n')
    for more in ((), ("--check",), ("--shard", "1/2")):
        done = run("batch", "jobs.jsonl", "out", *more)
        assert (done.returncode, done.stdout) == (3, "")
        assert f"line {len(ROWS) + 1}: there is no column 'promt': did you mean prompt?" in done.stderr
        assert not (tmp_path / "out").exists()


def test_messages_tell_a_rows_words_from_the_command_lines(run: Command, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a fox", "steps": 0}\n')
    assert "jobs.jsonl, line 1: steps must be" in run("batch", "jobs.jsonl", "out", "--check").stderr
    assert "nativesd: --steps must be" in run("batch", "jobs.jsonl", "out", "--check", "--steps", "0").stderr


def test_progress_where_there_is_no_terminal(
    run: Command, stub: Stub, jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(told, "EVERY", 0.0)
    done = run("batch", "jobs.jsonl", "out", "--batch-size", "1", "--steps", "1")
    found = re.findall(r"(\d+) of 8 rows, 0 failed, [\d.]+ pictures per second, time left: \d+ min \d+ s", done.stderr)
    assert [int(number) for number in found] == [2, 3, 4, 5, 6, 7, 8]
    again = run("batch", "jobs.jsonl", "out", "--steps", "1")
    assert "pictures that are there already are looked at" in again.stderr


def test_checking_paints_nothing(run: Command, jobs: Path, tmp_path: Path) -> None:
    done = run("batch", "jobs.jsonl", "out", "--check")
    assert (done.returncode, done.stderr) == (0, f"nativesd: jobs.jsonl: {PICTURES} rows\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_batch(
    number: int, run: Command, monkeypatch: pytest.MonkeyPatch, jobs: Path, tmp_path: Path
) -> None:
    def signalled(_: Sequence[str]) -> None:
        if len(made.calls) == 2:
            os.kill(os.getpid(), number)

    made = Stub(signalled)
    monkeypatch.setattr(studio, "load", lambda *_, **__: made)
    before = signal.getsignal(number)
    done = run("batch", "jobs.jsonl", "out", "--batch-size", "1")
    assert done.returncode == 130
    assert "2 painted" in done.stderr
    assert f"{PICTURES - 2} rows left: the same command goes on" in done.stderr
    assert len(hashes(tmp_path / "out")) == 2
    assert signal.getsignal(number) is before
    made._fails = None
    assert run("batch", "jobs.jsonl", "out").returncode == 0
    assert len(hashes(tmp_path / "out")) == PICTURES
