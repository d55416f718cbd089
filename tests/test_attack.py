"""A few hostile inputs of every kind; `python tools/attack.py --minutes 20` tries many."""

from __future__ import annotations

from attack import ATTACKS, attack


def test_every_input_is_read_or_refused() -> None:
    results = attack(list(ATTACKS), seed=0, count=40, seconds=None)
    assert {kind: found["failed"] for kind, found in results.items()} == dict.fromkeys(ATTACKS, 0)
    assert all(found["refused"] and found["ok"] for found in results.values())
