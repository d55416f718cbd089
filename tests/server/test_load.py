"""Many clients at once; `python tools/load_server.py` tries 1,000 requests."""

from __future__ import annotations

import numpy as np
import pytest

import load_server
import nativesd
from load_server import PROMPT, SEEDS, Load, under_load
from server.fixtures import Running, serving


@pytest.fixture(scope="module")
def wanted(pipe: nativesd.Pipeline) -> list[np.ndarray]:
    """The library's pictures by their seeds."""
    return [np.asarray(pipe(PROMPT, seed=seed, steps=1).images[0]) for seed in range(SEEDS)]


def test_nobody_is_answered_wrong_and_nothing_is_left(
    wanted: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_server, "GIVEN_UP", 0.3)
    with serving(queue=4) as running:  # which is full most of the time
        load = Load(running.port, 1, wanted)
        assert under_load(load, 48, 16)
    given_up = sum(number for what, number in load.counts.items() if what.startswith("given up"))
    assert given_up
    assert load.counts["right"] == 48 - given_up
    assert load.counts["told to come back"]


def test_a_wrong_picture_is_seen(server: Running, wanted: list[np.ndarray]) -> None:
    load = Load(server.port, 1, wanted[::-1])
    assert not under_load(load, 4, 2)
    assert load.counts["wrong: another picture"]
