"""Some commands are killed at some moments; `python tools/kill.py --moments 100` kills many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kill
import kill_batch


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the commands are forks")
def test_what_killed_commands_write_is_whole_or_absent() -> None:
    """In a process of its own, since threads do not survive a fork."""
    command = [sys.executable, str(Path(kill.__file__)), "--moments", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "merge folder" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the commands are forks")
def test_a_killed_batch_goes_on() -> None:
    """As above."""
    command = [sys.executable, str(Path(kill_batch.__file__)), "--rows", "15", "--moments", "3", "--seed", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "15 rows, 3 kills" in done.stdout
