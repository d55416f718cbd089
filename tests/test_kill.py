"""Some commands are killed at some moments; `python tools/kill.py --moments 100` kills many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kill


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the commands are forks")
def test_what_killed_commands_write_is_whole_or_absent() -> None:
    """In a process of its own, since threads do not survive a fork."""
    command = [sys.executable, str(Path(kill.__file__)), "--moments", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "merge folder" in done.stdout
