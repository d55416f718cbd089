"""On a Ray cluster of two workers: the same pictures, a planted failure, a killed worker, and Ray's own checkpoints."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import Run as Command
from nativesd.batch import Painter, cluster
from nativesd.batch.cluster import _resources
from nativesd.batch.jobs import Job
from nativesd.batch.results import read_results
from nativesd.batch.studio import Setting
from nativesd.errors import UsageError

SUBJECTS = ("a strawberry", "a fox", "a small cactus")
ROWS: list[dict[str, Any]] = [
    {"id": i, "prompt": f"{SUBJECTS[i % 3]} on a pink background", "steps": 1, "width": 96 if i % 5 == 0 else 64}
    for i in range(16)
]
PLANTED = 7
"""The row with a size that the model cannot paint."""


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    rows = [{**row, "width": 61} if row["id"] == PLANTED else row for row in ROWS]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "jobs.jsonl"


def hashes(out: Path) -> dict[str, str | None]:
    lines = list(read_results(out))
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["sha256"] for line in lines}


class Mortal(cluster.Worker):
    """A worker that is killed after it has saved a batch, once."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        done = super().__call__(batch)
        grave = self._out.parent / "grave"
        if "10" in {json.loads(body)["id"] for body in batch["body"]} and not grave.exists():
            grave.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return done


# --- without Ray


def test_a_worker_answers_lines(tmp_path: Path) -> None:
    rows = [
        Job(str(i), i, "tiny", "a fox", {"steps": 1, "width": width}, {}, {"more": i}, i)
        for i, width in enumerate([64, 61, 64])
    ]
    done = cluster.Worker(Setting(), str(tmp_path), str(Path.cwd()))({"body": [row.to_json() for row in rows]})
    lines = {answer["row"]: answer["line"] for answer in map(json.loads, done["answer"])}
    assert [lines[i]["more"] for i in range(3)] == [0, 1, 2]
    assert "multiples of 4" in lines[1]["error"]
    assert (tmp_path / lines[2]["file"]).stat().st_size == lines[2]["bytes"]


@pytest.mark.parametrize(
    ("there", "workers", "expected"),
    [
        ({"CPU": 2}, 2, (2, 0.5, None)),
        ({"CPU": 2}, None, (1, 1.0, None)),
        ({"CPU": 16}, None, (15, 1.0, None)),
        ({"CPU": 1}, 3, (3, 0.16, None)),
        ({"CPU": 64, "GPU": 8}, None, (8, 1.0, 1)),
        ({"CPU": 8, "GPU": 8}, None, (8, 0.87, 1)),
    ],
)
def test_a_cpu_is_left_to_readers(there: dict[str, float], workers: int | None, expected: tuple[Any, ...]) -> None:
    """Where workers hold all, Ray cannot read what they are to paint."""
    given = _resources(there, workers)
    assert (given["workers"], given["num_cpus"], given.get("num_gpus")) == expected
    assert given["workers"] * given["num_cpus"] < there["CPU"]


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match="9 workers need a GPU each"):
        _resources({"CPU": 64, "GPU": 8}, 9)


def test_options_that_do_not_go_together(run: Command, jobs: Path) -> None:
    assert "leave --shard out" in run("batch", "jobs.jsonl", "out", "--shard", "1/2", "--ray").stderr
    assert "does nothing without --ray" in run("batch", "jobs.jsonl", "out", "--workers", "2").stderr


# --- with it


@pytest.mark.ray
def test_the_same_pictures_with_a_killed_worker(
    run: Command, jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickles: Any = pytest.importorskip("ray.cloudpickle")
    pickles.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file
    alone = run("batch", "jobs.jsonl", "alone", "--batch-size", "1")
    assert alone.returncode == 1
    monkeypatch.setattr(cluster, "Worker", Mortal)
    done = run("batch", "jobs.jsonl", "out", "--batch-size", "1", "--workers", "2", "--ray")
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "grave").exists()
    assert "15 painted, 0 skipped, 1 failed" in done.stderr
    assert "multiples of 4" in done.stdout
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert hashes(tmp_path / "out")[str(PLANTED)] is None
    assert not list((tmp_path / "out").glob(".nativesd-*"))
    again = run("batch", "jobs.jsonl", "out", "--batch-size", "4")
    assert "0 painted, 15 skipped, 1 failed" in again.stderr


@pytest.mark.ray
def test_what_ends_a_worker_is_one_sentence(run: Command, jobs: Path) -> None:
    pytest.importorskip("ray")
    done = run("batch", "jobs.jsonl", "out", "--model", "missing.safetensors", "--ray")
    assert done.returncode == 3
    assert "nativesd: missing.safetensors does not exist; a model is" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_painters_and_checkpoints(tmp_path: Path) -> None:
    """What docs/batch.md shows: of rows that a run has written, the next one paints none again."""
    pytest.importorskip("ray")
    import ray.data
    from pyarrow import parquet
    from ray.data.checkpoint import CheckpointConfig

    ray.init(num_cpus=4, log_to_driver=False)  # one each: workers, readers, and the filter of what is done
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        (tmp_path / "in").mkdir()
        ray.data.from_items([{**row, "id": str(row["id"])} for row in ROWS]).write_parquet(str(tmp_path / "in"))
        context.checkpoint_config = CheckpointConfig(
            id_column="id", checkpoint_path=str(tmp_path / "done"), delete_checkpoint_on_success=False
        )

        def paint(out: str) -> list[dict[str, Any]]:
            rows = ray.data.read_parquet(str(tmp_path / "in"))
            rows.map_batches(
                Painter, fn_constructor_kwargs={"model": "tiny", "steps": 1}, batch_size=4, num_cpus=0.5,
                compute=ray.data.ActorPoolStrategy(size=2),
            ).write_parquet(str(tmp_path / out))  # fmt: skip
            found: list[dict[str, Any]] = []
            for path in (tmp_path / out).glob("*.parquet"):
                found += parquet.read_table(path).to_pylist()
            return found

        first = paint("first")
        assert {row["id"] for row in first} == {str(row["id"]) for row in ROWS}
        assert all(row["image"].startswith(b"\x89PNG") and row["error"] == "" for row in first)
        assert paint("second") == []
    finally:
        ray.data.DataContext.get_current().checkpoint_config = None
        ray.shutdown()
