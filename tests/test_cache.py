"""What is kept to save time: written by many at once, killed, cut short or made up, it is whole or made anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nativesd.tuning import tune

WRITER = """
import sys
from pathlib import Path
from nativesd.cache import keep
while True:
    keep(Path(sys.argv[1]), (sys.argv[2] * 2_000_000).encode())
"""


def test_many_writers_that_are_killed_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "abc"]
    try:
        seen = set()
        while len(seen) < 2:
            assert all(writer.poll() is None for writer in writers)
            if path.exists():
                data = path.read_bytes()
                assert len(data) == 2_000_000
                assert data == data[:1] * 2_000_000
                seen.add(data[:1])
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert len({*path.read_bytes()}) == 1
    tune.keep(path, b"next")
    assert path.read_bytes() == b"next"
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: good[: len(good) // 2],
        lambda good: b"",
        lambda good: b"[" * 100_000,
        lambda good: b"\xff\x00",
        lambda good: json.dumps({key: {"linear": "no"} for key in json.loads(good)}).encode(),
        lambda good: json.dumps(dict.fromkeys(json.loads(good), 5)).encode(),
        lambda good: json.dumps({key.replace("probe", "older probe"): {} for key in json.loads(good)}).encode(),
    ],
)
def test_a_choice_that_is_kept_badly_is_made_anew(spoil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = tune.Tuning()
    probes = []
    monkeypatch.setattr(tune, "supported", lambda dtype: True)
    monkeypatch.setattr(tune, "_probe", lambda dtype: probes.append(dtype) or made)
    path = tmp_path / "nativesd" / "tuning.json"

    def choose() -> tune.Tuning:
        tune.best_tuning.cache_clear()
        return tune.best_tuning(torch.float32, torch.device("cpu"), 1)

    choose()
    good = path.read_bytes()
    assert choose() == made
    assert len(probes) == 1
    path.write_bytes(spoil(good))
    assert choose() == made
    assert len(probes) == 2
    assert json.loads(path.read_bytes()).items() >= json.loads(good).items()
    tune.best_tuning.cache_clear()
