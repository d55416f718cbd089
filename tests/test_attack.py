"""A few hostile inputs of every kind; `python tools/attack.py --minutes 20` tries many. And what watches them."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks.kinds import CONTROLS, KINDS
from attacks.pool import attempt
from attacks.tables import toml
from attacks.values import VALUES, deeply_changed, spoiled
from nativesd.errors import SourceError
from nativesd.reading import parse_json
from nativesd.weights.maps.grammar import parse_toml
from nativesd.weights.maps.templates import TableError

TOOL = Path(__file__).parents[1] / "tools" / "attack.py"


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_is_read_or_refused(kind: str) -> None:
    outcomes = {seed: attempt(kind, seed) for seed in range(min(10 * KINDS[kind].share, 60))}
    assert {seed: each.what for seed, each in outcomes.items() if each.what not in ("ok", "refused")} == {}
    seen = {each.what for each in outcomes.values()}
    assert "ok" in seen or len(outcomes) < 30
    assert "refused" in seen or kind == "caches" or len(outcomes) < 30  # caches are made anew


def test_failures_are_seen() -> None:
    """A process that hangs is killed, one that grows is named, and the others go on."""
    only = [word for kind in (*CONTROLS, "scheduler") for word in ("--only", kind)]
    done = subprocess.run(
        [sys.executable, TOOL, "--count", "15", "--workers", "1", *only], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    for kind, words in (("hang", "over 0.5 s"), ("grow", "over 1 GB"), ("fail", "TypeError('a traceback')")):
        assert any(line.startswith(kind) and words in line for line in done.stderr.splitlines()), done.stderr
    rows = {line.split()[0]: line.split()[1:5] for line in done.stdout.splitlines()[1:-1]}
    assert rows["scheduler"][0] == "12"
    assert rows["scheduler"][3] == "0"


@given(rng=st.randoms(use_true_random=False))
def test_json_is_read_or_refused(rng: random.Random) -> None:
    """The same generators, whose draws hypothesis makes small where something fails."""
    good = b'{"a": [1, 2.5, {"b": null}], "c": "d"}'
    try:
        assert isinstance(parse_json(spoiled(rng, good), "x.json"), dict)
    except SourceError as error:
        assert "x.json" in str(error)  # noqa: PT017


@given(rng=st.randoms(use_true_random=False))
def test_what_the_tables_are_written_with_is_toml(rng: random.Random) -> None:
    values = [value for value in VALUES if value is not None and value != "\ud800"]
    data = deeply_changed(rng, {"a": {"b": [1, "x"], "c": True}}, values)
    if isinstance(data, dict) and all(isinstance(key, str) and key for key in data):
        text = "\n".join(f"{toml(name)} = {toml(value)}" for name, value in data.items())
        try:
            assert parse_toml(text, "x.toml").keys() == data.keys()
        except TableError as error:
            assert "x.toml" in str(error)  # noqa: PT017
