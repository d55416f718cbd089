"""What clusters call: batches of columns in, pictures out; one bad row is an error, and no cluster is known of."""

from __future__ import annotations

import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nativesd
from nativesd.batch import Painter, studio
from nativesd.batch.columns import Columns
from nativesd.batch.files import Row
from nativesd.errors import NoMemoryError, UsageError

PROMPTS = ["a strawberry on a yellow background", "a fox on a green background", "a small cactus"]


def image(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)))


@pytest.fixture(scope="module")
def painter() -> Painter:
    """After a way through a pickle, as workers get it."""
    made: Painter = pickle.loads(pickle.dumps(Painter(steps=1)))
    return made


def test_a_batch_comes_back_with_pictures(painter: Painter) -> None:
    batch = {"prompt": np.array(PROMPTS, dtype=object), "seed": np.array([3, -1, 5]), "width": np.array([64, 96, 64]),
             "caption": np.array(["x", None, "y"], dtype=object)}  # fmt: skip
    done = painter(batch)
    assert list(done) == ["prompt", "seed", "width", "caption", "id", "image", "height", "error"]
    assert all(isinstance(column, np.ndarray) and len(column) == 3 for column in done.values())
    (job,) = Columns(defaults={"steps": 1}).jobs(Row(1, {"prompt": PROMPTS[1], "seed": -1, "width": 96}))
    assert (done["id"][1], done["seed"][1]) == (job.id, job.seed)
    assert list(done["width"]) == [64, 96, 64]
    assert list(done["error"]) == ["", "", ""]
    pipe = nativesd.load()
    for index, width in enumerate([64, 96, 64]):
        alone = pipe(PROMPTS[index], seed=int(done["seed"][index]), width=width, steps=1).images[0]
        found = image(done["image"][index])
        assert found.shape == (64, width, 3)
        assert np.abs(found.astype(int) - np.asarray(alone)).max() <= 1


def test_a_bad_row_is_an_error(painter: Painter) -> None:
    done = painter({"prompt": [*PROMPTS, None], "width": [64, 61, 0, float("nan")], "num_images": [1, 1, 1, 2]})
    assert [bool(data) for data in done["image"]] == [True, False, False, False]
    assert done["error"][0] == ""
    assert "multiples of 4 pixels" in done["error"][1]
    assert "width must be between 1 and" in done["error"][2]
    assert "num_images must be 1" in done["error"][3]


def test_data_frames(painter: Painter) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"prompt": PROMPTS[:2], "seed": [3, None], "image": [None, None]}, index=[7, 9])
    (done, empty) = painter.frames([frame, frame.iloc[:0]])
    assert list(done.index) == [7, 9]
    assert done["seed"][7] == 3
    assert image(done["image"][9]).shape == (64, 64, 3)
    assert len(empty) == 0
    assert set(empty) == set(done)


class Frame(dict[str, Any]):
    """What of a data frame is used, for where pandas is not installed."""

    def assign(self, **columns: Any) -> Frame:
        return Frame({**self, **columns})


def test_what_looks_like_a_data_frame(painter: Painter) -> None:
    (done,) = painter.frames([Frame(prompt=PROMPTS[:1], seed=[3])])
    assert isinstance(done, Frame)
    assert list(done) == ["prompt", "seed", "id", "image", "width", "height", "error"]


def test_pictures_to_begin_from(painter: Painter) -> None:
    """As tables hold them: bytes, what the hub's data sets have, arrays."""
    picture = Image.new("RGB", (64, 64), "red")
    data = BytesIO()
    picture.save(data, "PNG")
    forms = [data.getvalue(), {"bytes": data.getvalue(), "path": None}, np.asarray(picture), picture]
    done = painter({"prompt": ["a fox"] * 5, "seed": [1] * 5, "image": [*forms, b"none"], "strength": [0.9] * 5})
    assert len(set(done["image"][:4])) == 1
    assert "image: a picture of 4 bytes is not a picture" in done["error"][4]
    plain = painter({"prompt": ["a fox"], "seed": [1]})
    assert plain["image"][0] != done["image"][0]


def test_columns_that_are_misspelt_are_refused(painter: Painter) -> None:
    with pytest.raises(UsageError, match="did you mean prompt"):
        painter({"promt": ["a"]})
    with pytest.raises(UsageError, match="no column 'prompt'"):
        painter({"caption": ["a"]})
    with pytest.raises(UsageError, match="here it is num_images"):
        painter({"prompt": ["a"], "n": [1]})
    assert Painter(keep=["n"], steps=1)({"prompt": ["a fox"], "n": [1]})["n"] == [1]


def test_options_that_cannot_be_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match="steps must be"):
        Painter(steps=0)
    with pytest.raises(UsageError, match="no option 'stepps'"):
        Painter(stepps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seed": 3}, "seed is a row's own"), ({"num_images": 2}, "num_images is a row's own"),
     ({"on_step": print}, "on_step is of one call"), ({"latents": torch.zeros(1, 4, 8, 8)}, "latents is of one call"),
     ({"image": Image.new("RGB", (8, 8))}, "image must be a file's path"), ({"keep": ["seed"]}, "cannot be kept"),
     ({"guidance": nativesd.PAG(3)}, 'guidance must be texts here.*"pag:3"'),
     ({"savings": [nativesd.DeepCache()]}, "savings must be texts here")],
)  # fmt: skip
def test_options_that_are_no_rows_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Painter(**options)


def test_paths_are_options(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    made = Painter(steps=1, image=tmp_path / "red.png", strength=1.0, loras=[(tmp_path / "none.safetensors", 0.5)])
    done = made({"prompt": ["a fox", "a fox"], "loras": [None, []]})
    assert "none.safetensors" in done["error"][0]
    assert done["error"][1] == ""


def test_numbers_have_one_type(painter: Painter) -> None:
    """Whatever seeds a batch has: numpy makes floats of small and large ones together."""
    seeds = [3, (1 << 64) - 1]
    done = painter({"prompt": np.array(["a fox"] * 2, dtype=object), "seed": np.array(seeds, dtype=np.uint64)})
    assert [done[name].dtype for name in ("seed", "width", "height")] == [np.uint64, np.int64, np.int64]
    assert list(map(int, done["seed"])) == seeds


def test_options_of_rows_that_say_nothing(painter: Painter) -> None:
    """Records too, and a row's own go before them."""
    made = Painter(
        steps=1, hires=nativesd.Hires(1.5, steps=1), guidance_scale=1, guidance="pag:3",
        sampling=nativesd.Sampling(churn=1), sampler="Euler",
    )  # fmt: skip
    done = made({"prompt": ["a fox", "a fox"], "hires": [None, 2.0]})
    assert done["error"] == ["", ""]
    assert list(done["width"]) == [96, 128]


def test_an_empty_batch(painter: Painter) -> None:
    done = painter({"prompt": []})
    assert list(done) == ["prompt", "id", "image", "seed", "width", "height", "error"]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, sizes = nativesd.load(), list[int]()

    class Small:
        def __call__(self, prompts: list[str], **options: Any) -> nativesd.Result:
            sizes.append(len(prompts))
            if len(prompts) > 2:
                raise NoMemoryError("the GPU's memory does not do")
            return pipe(prompts, **options)

        def close(self) -> None:
            pass

    monkeypatch.setattr(studio, "load", lambda *_, **__: Small())
    done = Painter(steps=1)({"prompt": ["a fox"] * 4, "seed": [1, 2, 3, 4]})
    assert all(done["image"])
    assert sizes == [4, 2, 2]


def test_a_model_that_cannot_be_loaded_ends_it() -> None:
    with pytest.raises(nativesd.NativesdError, match="does not exist"):
        Painter("missing.safetensors")({"prompt": ["a"]})


def test_no_cluster_is_imported() -> None:
    code = "import nativesd, sys; nativesd.batch.Painter(); assert not {'ray', 'pyspark', 'pandas'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
