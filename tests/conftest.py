"""What several files of tests share: the console script, the markers, and the cores.

Real sizes, GPU tests and those of Ray run when their marker is asked for (-m full, -m gpu, -m ray), and say so
otherwise. Of several
processes (-n) each computes with one thread.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nativesd import cli

pytest_plugins = ["server.fixtures"]
REASONS = {"full": "real sizes: run with -m full", "gpu": "needs a CUDA device: run with -m gpu",
           "ray": "needs Ray, 600 MB: install .[ray], run with -m ray"}  # fmt: skip

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("markexpr")
    for item in items:
        for marker, reason in REASONS.items():
            if marker in item.keywords and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for graphs of the embedded model: each is exported once for all tests, by the first that needs it."""
    return tmp_path_factory.mktemp("graphs")


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The console script in this process, in an empty folder: code, stdout, stderr."""

    def invoke(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["nativesd", *arguments])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back what the script replaces
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            cli.run()
        captured = capsys.readouterr()
        return Done(int(end.value.code or 0), captured.out, captured.err)

    return invoke
