"""Numbers of the commands beside `generate` (of those see test_evening.py): each has a range, refused beyond it."""

from __future__ import annotations

import pytest

from conftest import Run

ONNX = ("export", "onnx", "tiny", "DEST", "--component", "unet")
ENGINE = ("export", "tensorrt", "tiny", "--component", "unet", "--for", "sm86", "--engines", "DEST")
HUGE = str(10**12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*ONNX, "--static", "0x0"), "between 1 and 4096"),
        ((*ONNX, "--static", "13x13"), "multiples of 4"),
        ((*ONNX, "--static", "1000000x1000000"), "between 1 and 4096"),
        ((*ONNX, "--static", f"{HUGE}x8"), "not a size"),
        ((*ONNX, "--static", "5" * 5000 + "x8"), "not a size"),
        ((*ONNX, "--static", "64x64", "--batch", "0"), "0 rows"),
        ((*ONNX, "--static", "64x64", "--batch", HUGE), "rows, which must be between 1 and 2000"),
        ((*ONNX, "--static", "64x64", "--chunks", HUGE), "chunks of a prompt, which must be between 1 and 500"),
        ((*ONNX, "--batch", "2"), "pass --static too"),
        ((*ONNX, "--chunks", "2"), "pass --static too"),
        ((*ONNX, "--opset", HUGE), "opset"),
        ((*ONNX, "--tolerance", "nan"), "--tolerance must be a finite number"),
        ((*ONNX, "--tolerance", "inf"), "--tolerance must be a finite number"),
        ((*ENGINE, "--tolerance", "nan"), "--tolerance must be a finite number"),
        ((*ENGINE, "--profile", HUGE), "is not a profile"),
        ((*ENGINE, "--profile", "99999996x8"), "between 1 and 4096"),
        ((*ENGINE, "--profile", "512-b9999999"), "rows, which must be between 1 and 2000"),
        ((*ENGINE, "--profile", "512-s99999"), "rows, which must be between 1 and 2000"),
        ((*ENGINE, "--profile", "512-c99999"), "chunks of a prompt, which must be between 1 and 500"),
        ((*ENGINE, "--stream", "9"), "1<=x<=8"),
        (("bench", "--threads", HUGE), "--threads must be between 1 and"),
        (("bench", "--rounds", HUGE), "1<=x<=1000"),
        (("serve", "--port", HUGE), "--port"),
        (("serve", "--queue", HUGE), "--queue"),
    ],
)
def test_numbers_have_ranges(arguments: tuple[str, ...], words: str, run: Run) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
