"""Frames from folders, videos and pipes, and `nativesd stream`."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from PIL import Image

import nativesd
from conftest import Run
from nativesd import ImageEmbeddings, ImagePrompt
from nativesd.errors import SourceError, UsageError
from nativesd.streaming.video import Latest, Source, open_sink, open_source
from oracles import adapter_of, drawn_adapter, save_adapter
from streaming.clips import clip

av = pytest.importorskip("av", reason='needs pip install ".[stream]"')


def frames_of(source: Path) -> list[Image.Image]:
    with open_source(str(source)) as opened:
        return list(opened.frames)


def test_a_folder_goes_by_numbers(tmp_path: Path) -> None:
    for number, frame in enumerate(clip(12)):
        frame.save(tmp_path / f"frame-{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = frames_of(tmp_path)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found, clip(12), strict=True))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.webm", "clip.avi"])
def test_a_video_there_and_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with open_sink(str(path), 12.0) as sink:
        for frame in clip(6):
            sink.write(frame)
        assert not path.exists()
    with open_source(str(path)) as opened:
        assert opened.fps == pytest.approx(12)
        found = list(opened.frames)
    assert len(found) == 6
    for a, b in zip(found, clip(6), strict=True):
        assert np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() < 12
    with pytest.raises(UsageError, match="exists"), open_sink(str(path), 12.0):
        pass


def test_a_video_that_fails_is_not_there(tmp_path: Path) -> None:
    def fail() -> None:
        with open_sink(str(tmp_path / "clip.mp4"), 12.0) as sink:
            sink.write(clip(1)[0])
            raise SourceError("no more")

    with pytest.raises(SourceError, match="no more"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    for name, words in (("empty", "no pictures"), ("none", "no such file"), ("noise.mp4", "no video that can be read")):
        with pytest.raises(SourceError, match=words), open_source(str(tmp_path / name)):
            pass
    with pytest.raises(UsageError, match="no video that can be written"), open_sink(str(tmp_path / "clip.gif"), 1):
        pass


def test_the_newest_is_kept_and_what_is_stale_dropped() -> None:
    """Whoever is slow gets the newest, not the oldest of a queue."""
    given = clip(30)

    def camera() -> Iterator[Image.Image]:
        for frame in given:
            sleep(0.005)
            yield frame

    latest, taken = Latest(Source(camera(), 200, live=True)), []
    for frame in latest:
        taken.append(next(i for i, each in enumerate(given) if each is frame))
        sleep(0.03)
    assert taken == sorted(set(taken))
    assert taken[-1] == 29
    assert len(taken) + latest.dropped == 30
    assert latest.dropped >= 10


def test_an_error_of_the_source_is_the_readers() -> None:
    def broken() -> Iterator[Image.Image]:
        yield clip(1)[0]
        raise SourceError("the camera is gone")

    with pytest.raises(SourceError, match="camera is gone"):
        list(Latest(Source(broken(), 100, live=True)))


def test_the_command(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, frame in enumerate(clip(5)):
        frame.save(tmp_path / "in" / f"{number}.png")
    done = run("stream", "a strawberry", "--source", "in", "--output", "out", "--strength", "0.6", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"frame-{i:06d}.png" for i in range(5)]
    assert "5 pictures in" in done.stderr
    again = run("stream", "a strawberry", "--source", "in", "--output", "out")
    assert again.returncode == 2
    assert "out exists, and is no empty folder" in again.stderr
    (tmp_path / "config.yaml").write_text("model_id: tiny\nuse_lcm_lora: true\nprompt: a fox\nt_index_list: [30]\n")
    control = ("--control", "tiny", "--control-preprocess", "canny", "--control-scale", "0.5")
    done = run("stream", "--config", "config.yaml", "--source", "in", "--output", "clip.mkv", "--frames", "3", *control)
    assert done.returncode == 0, done.stderr
    assert len(frames_of(tmp_path / "clip.mkv")) == 3
    noise = run("stream", "a fox", "--frames", "2", "--output", "noise", "--device", "cpu")
    assert noise.returncode == 0
    assert len(list((tmp_path / "noise").iterdir())) == 2
    for options, words in (
        ([], "pass --source"),
        (["--source", "in", "--timesteps", "1,2"], "must fall"),
        (["--source", "in", "--timesteps", "x"], "whole numbers such as"),
        (["--source", "in", "--steps", "1", "--timesteps", "9"], "pass one of timesteps"),
        (["--source", "none"], "no such file"),
    ):
        refused = run("stream", "a fox", *options)
        assert refused.returncode in (2, 3)
        assert words in refused.stderr


def test_pictures_as_prompts(run: Run, tmp_path: Path) -> None:
    """On the command line and in StreamDiffusion's settings: the frame is the library's."""
    unet = nativesd.load("tiny", device="cpu").config.unet
    adapter = save_adapter(drawn_adapter(adapter_of(unet, "base"))[1], tmp_path / "base.safetensors")
    told = ImageEmbeddings(torch.ones(1, 40)).save(tmp_path / "told.safetensors")
    with nativesd.stream("a fox", device="cpu", image_prompts=ImagePrompt(adapter, told, 0.5)) as stream:
        frame = stream.flush() if (first := stream()) is None else [first]
    written = f"ipadapters: [{{ipadapter_model_path: {adapter}, style_image: told.safetensors, scale: 0.5}}]\n"
    (tmp_path / "config.yaml").write_text(f"model_id: tiny\nuse_lcm_lora: true\n{written}")
    for out, options in (
        ("given", ("--image-prompt", str(adapter), str(told), "--image-prompt-scale", "0.5")),
        ("settings", ("--config", "config.yaml")),
    ):
        done = run("stream", "a fox", "--frames", "1", "--output", out, "--device", "cpu", *options)
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / out / "frame-000000.png") as found:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(frame[0].image))
    refused = run("stream", "a fox", "--frames", "1", "--image-prompt-scale", "0.5")
    assert "1 --image-prompt-scale for 0 --image-prompt" in refused.stderr


def test_a_pipe_in_and_out(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_sink(str(tmp_path / "clip.mkv"), 25.0) as sink:
        for frame in clip(4):
            sink.write(frame)

    class Pipe:
        def __init__(self, data: bytes = b"") -> None:
            self.buffer = io.BytesIO(data)
            self.buffer.close = lambda: None  # type: ignore[method-assign]

    taken, given = Pipe((tmp_path / "clip.mkv").read_bytes()), Pipe()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", taken)
        with open_source("-") as opened:
            assert opened.live
            found = list(opened.frames)
        patch.setattr(sys, "stdout", given)
        with open_sink("-", 25.0) as out:
            for frame in found:
                out.write(frame)
    given.buffer.seek(0)
    with av.open(given.buffer) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4
