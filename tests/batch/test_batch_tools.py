"""What docs/batch.md says of costs: the formula is what a simulation finds, and memory does not grow with the rows."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bench_batch
from simulate_batch import Fleet, machines_for, simulate

FLEET = Fleet(
    pictures=1e6, machines=16, batch=8, load=30, call=0.4, row=2.1, mtbf=24, restart=300, price=2.5
)  # fmt: skip


@pytest.mark.parametrize(
    ("fleet", "within"),
    [
        (FLEET, 0.02),
        (replace(FLEET, mtbf=1e9), 0.01),
        (replace(FLEET, mtbf=2, load=300), 0.02),
        (replace(FLEET, pictures=1e9, machines=200), 0.01),
        (replace(FLEET, machines=1, pictures=1e5), 0.02),
        (replace(FLEET, pictures=1e4, machines=100, mtbf=2), 0.25),  # minutes, of which one failure is a large part
    ],
)
def test_the_formula_is_what_a_simulation_finds(fleet: Fleet, within: float) -> None:
    rng = np.random.default_rng(0)
    hours, dollars = np.mean([simulate(fleet, rng) for _ in range(30)], axis=0)
    assert fleet.hours == pytest.approx(hours, rel=within)
    assert fleet.dollars == pytest.approx(dollars, rel=min(within, 0.04))


def test_machines_for_a_year() -> None:
    year = replace(FLEET, pictures=1e9)
    count = machines_for(year, 8760)
    assert replace(year, machines=count).hours <= 8760 < replace(year, machines=count - 1).hours


def test_memory_does_not_grow_with_the_rows() -> None:
    """Pictures that were kept would be 30 MB; `python tools/bench_batch.py` paints 100,000."""
    command = [sys.executable, str(Path(bench_batch.__file__)), "--rows", "1200", "--side", "128"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.findall(r"^(\w+, \w+ run) +([\d.]+) ms a row, .* (\d+) MB", done.stdout, re.M)
    assert [name for name, *_ in found] == ["check, first run", "paint, first run", "check, second run",
                                            "paint, second run"]  # fmt: skip
    assert sum(int(grown) for *_, grown in found) < 28, done.stdout
