"""What others wrote: nothing hangs or grows, and every fault is one sentence with file, field and what is allowed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nativesd.errors import SourceError
from nativesd.reading import is_name, open_regular, parse_json, read_bounded, read_json
from nativesd.schema import REQUIRED, Field, either, many, number, one_of, read_fields, text, truth, whole


def test_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"whole")
    (tmp_path / "link").symlink_to("x")
    assert read_bounded(tmp_path / "x", 5) == read_bounded(tmp_path / "link", 5) == b"whole"
    with pytest.raises(SourceError, match="has 5 bytes, more than the 4"):
        read_bounded(tmp_path / "x", 4)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for path, words in (
        (tmp_path / "pipe", "a device or pipe"), (Path("/dev/zero"), "a device or pipe"), (tmp_path, "a folder"),
        (tmp_path / "loop", "cannot be read"), (tmp_path / "gone", "a link to nothing"),
        (tmp_path / "absent", "is missing"), (tmp_path / ("x" * 300), "cannot be read"),
        (Path("a\0b"), "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=words):
            open_regular(path)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(SourceError, match="more than the 32000000 of any JSON file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "Expecting value"), (b"[]", "holds list"), (b'{"a": 1, "a": 2}', "names 'a' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "names 'b' twice"), (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"), (b'{"a": 1e999}', "more than a number can hold"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper"), (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper"),
        (b"\xff\xfe{", "cannot be read as JSON"), (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
    ],
)  # fmt: skip
def test_json_that_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        parse_json(raw, "x.json")


def test_json_that_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, {"b": true}]}', "x") == {"a": [1, 2.5, None, {"b": True}]}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "c:", "a\0", "\ud800", "x" * 256, "a\nb", "../x"])
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not is_name(name)
    assert is_name("model-00001-of-00002.safetensors")


SCHEMA = (
    Field("width", whole(1, 8), REQUIRED),
    Field("scale", number(0, 1), 0.5),
    Field("kind", one_of("a", "b"), "a"),
    Field("on", truth(), False),
    Field("widths", either(whole(1, 8), many(whole(1, 8), 3)), 2),
    Field("name", text(4)),
)


def test_fields_and_their_defaults() -> None:
    usual = {"width": 3, "scale": 0.5, "kind": "a", "on": False, "widths": 2, "name": None}
    assert read_fields({"width": 3, "other": object()}, SCHEMA, "x") == usual
    assert read_fields({"width": 3.0, "scale": None, "widths": [1, 2]}, SCHEMA, "x") == {**usual, "widths": (1, 2)}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *[("width", value, "a whole number from 1 to 8") for value in (0, 9, 2.5, True, "3", [3], {}, 10**400)],
        *[("scale", value, "a number from 0 to 1") for value in (-0.1, 1.1, float("nan"), False, "1", [], 10**400)],
        *[("kind", value, "'a' or 'b'") for value in ("c", 1, ["a"], {"a": 1})],
        *[("on", value, "true or false") for value in (1, 0, "true", [])],
        *[("widths", value, "a list of 1 to 3") for value in ([], [1] * 4, [9], [[1]], "12", 0)],
        *[("name", value, "a text of at most 4") for value in ("abcde", "a\nb", 3, [])],
    ],
)  # fmt: skip
def test_what_a_field_cannot_hold_is_said(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(SourceError, match=rf"config\.json: {field} = ") as refused:
        read_fields({"width": 1, field: value}, SCHEMA, "config.json")
    assert allowed in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_field_that_is_missing() -> None:
    with pytest.raises(SourceError, match=r"config\.json lacks the field 'width', which must be a whole number"):
        read_fields({}, SCHEMA, "config.json")
    assert json.dumps(read_fields({"width": 1}, SCHEMA, "x"))
