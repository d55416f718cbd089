"""Jobs files to jobs: what is read, and the one sentence with the line for what cannot be, before any picture."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from attacks.values import spoiled
from nativesd.batch.columns import DECLARED, READERS, Columns, options_of
from nativesd.batch.files import Row
from nativesd.batch.jobs import Job, seed_of
from nativesd.batch.plan import Plan
from nativesd.batch.shards import Shard, read_shard
from nativesd.cli.batch import _own_device
from nativesd.errors import NativesdError, SourceError, UsageError
from nativesd.pipeline.asked.arguments import Checked, check

ROWS: list[dict[str, Any]] = [
    {"prompt": "a fox, on a hill", "steps": 12, "seed": 7, "caption": "kept"},
    {"prompt": 'a "cat"\nand a dog', "negative_prompt": "red", "guidance_scale": 7.5, "literal": True},
    {"id": "third", "prompt": "", "outpaint": [0, 8, 0, 8],
     "image": "in.png", "loras": ["a.safetensors", ["b.safetensors", 0.5]]},
    {"id": "4", "prompt": "ä", "control": [{"model": "tiny", "image": "edges.png", "scale": 0.5}], "width": 64,
     "hires": {"scale": 1.5, "upscaler": "lanczos"}},
]  # fmt: skip


def read(path: Path, shard: tuple[int, int] = (0, 1), **options: Any) -> list[Job]:
    with Plan.of(path, Columns(**options), shard) as plan:
        return sorted(plan.jobs(), key=lambda job: job.line)


def asked(job: Job, folder: Path) -> Checked:
    return check(job.prompt, {**options_of(job.options, job.pictures, folder), "seed": job.seed})


def as_json_lines(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8-sig")


def as_csv(path: Path) -> None:
    import csv

    names = list(dict.fromkeys(name for row in ROWS for name in row))
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in ROWS:
            cells = {n: json.dumps(v) if isinstance(v, bool | list | dict) else v for n, v in row.items()}
            writer.writerow(cells)


def as_parquet(path: Path) -> None:
    """Records are columns of structs; lists of mixed types cannot be one, and go in as texts of JSON do not either."""
    rows = [{n: v for n, v in row.items() if n not in ("loras", "control")} for row in ROWS]
    parquet.write_table(arrow.Table.from_pylist(rows, schema=arrow.unify_schemas(
        [arrow.Table.from_pylist([row]).schema for row in rows])), path)  # fmt: skip


WRITERS = {".jsonl": as_json_lines, ".csv": as_csv, ".txt": as_json_lines, ".parquet": as_parquet}


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".csv"])
def test_formats_say_the_same(suffix: str, tmp_path: Path) -> None:
    """To the hashes that seeds and results depend on."""
    path = tmp_path / f"jobs{suffix}"
    (as_csv if suffix == ".csv" else as_json_lines)(path)
    first, second, third, fourth = read(path)
    assert (first.prompt, first.seed, first.options, first.extra) == (
        "a fox, on a hill", 7, {"steps": 12}, {"caption": "kept"}
    )  # fmt: skip
    assert second.prompt == 'a "cat"\nand a dog'
    assert second.options == {"negative_prompt": "red", "guidance_scale": 7.5, "literal": True}
    assert (third.id, third.seed) == ("third", seed_of("third"))
    checked = asked(third, tmp_path)
    assert checked.outpaint == (0, 8, 0, 8)
    assert checked.loras == [("a.safetensors", 1, 1), ("b.safetensors", 0.5, 0.5)]
    assert checked.image == tmp_path / "in.png"
    checked = asked(fourth, tmp_path)
    assert checked.hires is not None
    assert (checked.hires.scale, checked.hires.upscaler) == (1.5, "lanczos")
    (control,) = checked.control
    assert (control.model, control.image, control.scale) == ("tiny", tmp_path / "edges.png", 0.5)
    as_json_lines(tmp_path / "same.jsonl")
    assert [job.parameters for job in read(tmp_path / "same.jsonl")] == [
        job.parameters for job in (first, second, third, fourth)
    ]


def test_parquet(tmp_path: Path) -> None:
    as_parquet(tmp_path / "jobs.parquet")
    as_json_lines(tmp_path / "jobs.jsonl")
    first, second, third, fourth = read(tmp_path / "jobs.parquet")
    assert [first, second] == [
        Job(**{**job.__dict__, "line": row}) for row, job in enumerate(read(tmp_path / "jobs.jsonl")[:2], 1)
    ]
    assert asked(third, tmp_path).outpaint == (0, 8, 0, 8)
    hires = asked(fourth, tmp_path).hires
    assert hires is not None
    assert hires.scale == 1.5


def test_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "jobs.txt").write_bytes('\ufeffa fox\r\n\r\n# not a comment\na "cat", <b>'.encode())
    assert [(job.line, job.prompt) for job in read(tmp_path / "jobs.txt")] == [
        (1, "a fox"), (3, "# not a comment"), (4, 'a "cat", <b>')
    ]  # fmt: skip


BAD: list[tuple[str, str | bytes, str]] = [
    ("jobs.jsonl", '{"prompt": "a"}\n\n{"promt": "b"}',
     "jobs.jsonl, line 3: there is no column 'promt': did you mean prompt?"),
    ("jobs.jsonl", '{"prompt": "a"}\n{"prompt": "b", "steps": 0}', "line 2: steps must be between 1 and 999, not 0"),
    ("jobs.jsonl", '{"prompt": "a"}\n{"steps": 2}', "line 2: there is no column 'prompt': there is 'steps'"),
    ("jobs.jsonl", '{"prompt": "a", "id": "x"}\n{"prompt": "c"}\n{"prompt": "b", "id": "x"}',
     "line 1 and 3 have the same id 'x'"),
    ("jobs.jsonl", '{"prompt": "a"}\n{"prompt": "a"}', "line 1 and 2 have the same id"),
    ("jobs.jsonl", '{"prompt": "a"}\n{"prompt": "b"', "line 2 cannot be read as JSON"),
    ("jobs.jsonl", '{"prompt": "a"}\n["b"]', "line 2 holds list, not a JSON object"),
    ("jobs.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1 cannot be read as JSON: it names 'prompt' twice"),
    ("jobs.jsonl", '{"prompt": ["a", "b"]}', "line 1: prompt must be a text, not ['a', 'b']"),
    ("jobs.jsonl", '{"prompt": "\\ud800"}', "line 1: it holds what JSON cannot"),
    ("jobs.jsonl", '{"prompt": "a", "id": "a", "note": "\\ud800"}', "line 1: the column 'note' holds what JSON"),
    ("jobs.jsonl", '{"prompt": "a", "id": "../a"}',
     "line 1: id must be a whole number, or a text that can be a file's name"),
    ("jobs.jsonl", '{"prompt": "a", "id": ".a"}', "line 1: id must be"),
    ("jobs.jsonl", '{"prompt": "a", "seed": -2}', "line 1: seeds must be between 0"),
    ("jobs.jsonl", '{"prompt": "a", "seed": [1, 2]}', "line 1: seed must be a whole number"),
    ("jobs.jsonl", '{"prompt": "a", "sampler": "Eulr"}', "line 1: "),
    ("jobs.jsonl", '{"prompt": "a", "hires": {"scal": 2}}', "line 1: hires has no field 'scal'"),
    ("jobs.jsonl", '{"prompt": "a", "control": {"model": "tiny"}}', "line 1: a control steers by a picture"),
    ("jobs.jsonl", '{"prompt": "a", "control": [{"model": 1, "image": "x"}]}', "line 1: the model of a control"),
    ("jobs.jsonl", '{"prompt": "a", "control": [{"model": "tiny", "image": 3}]}', "line 1: the picture of a control"),
    ("jobs.jsonl", '{"prompt": "a", "control": [{"model": "tiny", "image": [3]}]}', "line 1: the picture of a control"),
    ("jobs.jsonl", '{"prompt": "a", "mask": "m.png"}', "line 1: mask is for a picture to begin from: pass image="),
    ("jobs.jsonl", '{"prompt": "a", "image_prompts": {"adapter": "face.bin"}}',
     "line 1: image_prompts: face is prompted by a picture: pass one"),
    ("jobs.jsonl", '{"prompt": "a", "image_prompts": [{"adapter": "x", "picture": []}]}', "by a picture: pass one"),
    ("jobs.jsonl", '{"prompt": "a", "image_prompts": [{"adapter": "x", "picture": 3}]}',
     "line 1: a picture of image_prompts must be"),
    ("jobs.jsonl", '{"prompt": "a", "image_prompts": [{"adapter": "x", "picture": "x", "start": 0.7, "end": 0.2}]}',
     "line 1: image_prompts: start and end must be"),
    ("jobs.jsonl", '{"prompt": "a", "control": [{"model": "x", "image": "x", "start": 0.7, "end": 0.2}]}',
     "line 1: a control: start and end must be"),
    ("jobs.jsonl", '{"prompt": "a", "control": [{"model": "tiny", "image": ["x", "y"]}]}',
     "line 1: the picture of a control must be one in a row, not a list of 2"),
    ("jobs.jsonl", '{"prompt": "a", "control": [{"model": "tiny", "preprocess": "inpaint"}]}',
     'line 1: a control with preprocess="inpaint" and no picture is for calls with image= and mask='),
    *(("jobs.jsonl", f'{{"prompt": "a", "{name}": {value}{image}}}', f"line 1: {name} is for a mask: pass mask= too")
      for name, value in (("only_masked", 8), ("mask_fill", '"noise"'), ("soft_inpaint", "true"))
      for image in ("", ', "image": "in.png"')),
    ("jobs.jsonl", '{"prompt": "a", "hires": 2, "image": "x"}', "line 1: hires makes a picture larger that was made"),
    ("jobs.jsonl", '{"prompt": "a", "tiles": 512, "tiling": "x"}', "line 1: tiles are windows with borders"),
    ("jobs.jsonl", '{"prompt": "a", "variation": {"seed": 1e99}}', "line 1: seeds must be between"),
    ("jobs.jsonl", '{"prompt": "a <lora:x:y>"}', "line 1: <lora:x:y>"),
    ("jobs.jsonl", '{"prompt": "a <lora:x:1> <lora:X:2>"}', "line 1: the prompt names the LoRA X twice, with other"),
    ("jobs.jsonl", '{"prompt": "a", "cfg_scale": 7}',
     "line 1: there is no column 'cfg_scale': here it is guidance_scale"),
    ("jobs.jsonl", '{"prompt": "a", "vae": "x"}', "line 1: 'vae' is of a whole run, not of a row"),
    ("jobs.jsonl", '{"prompt": "a", "file": "x"}', "line 1: the column 'file' is what the results call"),
    ("jobs.jsonl", "\n \n", "jobs.jsonl has no row"),
    ("jobs.jsonl", "", "jobs.jsonl has no row"),
    ("jobs.csv", "prompt,steps\n", "jobs.csv has no row"),
    ("jobs.csv", "", "jobs.csv has no row"),
    ("jobs.csv", 'prompt,steps\n"a\nb",2\nc', "jobs.csv, line 4 has 1 cells, and the header 2"),
    ("jobs.csv", 'prompt,steps\na,2\n"b,3\n', "line 3 cannot be read as CSV: unexpected end of data"),
    ("jobs.csv", "prompt,steps,steps\na,2,3\n", "line 1 names the column 'steps' twice"),
    ("jobs.csv", ",prompt\n0,a\n", "line 1: column 1 has no name"),
    ("jobs.csv", "prompt;steps\na;2\n", "there is no column 'prompt': there is 'prompt;steps'"),
    ("jobs.csv", "prompt,literal\na,yes\n", "line 2: literal must be true or false, not 'yes'"),
    ("jobs.csv", 'prompt,loras\na,"[""x"","\n', "line 2: loras cannot be read as JSON"),
    ("jobs.csv", b"prompt\na\n\xff\n", "jobs.csv, line 3 is not UTF-8, by its byte 1"),
    ("jobs.txt", "a fox\n".encode("utf-16"), "jobs.txt, line 1 is not UTF-8"),
    ("jobs.txt", "a" * (1 << 21), "line 1 has more than 1048576 bytes"),
    ("jobs.parquet", "no table", "jobs.parquet cannot be read as Parquet"),
    ("jobs.json", "[]", "jobs.json is not a jobs file: name one that ends in .jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[f"{name}: {says}" for name, _, says in BAD])
def test_bad_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NativesdError) as error:
        read(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": [["a"], ["b"]]}, "row 1: prompt must be a text, not ['a']"),
        ({"prompt": ["a", "b"], "steps": [[1], [2]]}, "row 1: steps must be a whole number, not [1]"),
        ({"prompt": ["a", "b"], "extra": [None, b"x"]}, "row 2: the column 'extra' holds what JSON"),
        ({"prompt": ["a", "b"], "image": [None, b"x"]}, "row 2: image: a picture of 1 bytes is not"),
        ({"prompt": [None, None]}, None),
        ({"prompt": arrow.array([b"a", b"\xff"]).view(arrow.string())}, "after row 0: 'utf-8' codec can't decode"),
    ],
)
def test_bad_parquet_columns(columns: dict[str, Sequence[Any]], message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "jobs.parquet"
    parquet.write_table(arrow.table(columns), path)
    with pytest.raises(SourceError) as error:
        read(path)
    assert (message or "rows 1 and 2 have the same id").replace("rows", "row") in str(error.value)


def test_lists_pass_through(tmp_path: Path) -> None:
    """A list is no option, and results hold it as JSON does."""
    parquet.write_table(arrow.table({"prompt": ["a"], "tags": [["x", "y"]]}), tmp_path / "jobs.parquet")
    (job,) = read(tmp_path / "jobs.parquet")
    assert job.extra == {"tags": ["x", "y"]}


def test_parquet_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"jobs\.parquet: Parquet files need pyarrow: pip install"):
        read(tmp_path / "jobs.parquet")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "jobs.csv").mkdir()
    for name in ("jobs.csv", "missing.txt"):
        with pytest.raises(SourceError, match=r"is a folder|is missing"):
            read(tmp_path / name)


@given(rng=st.randoms(use_true_random=False), suffix=st.sampled_from([*WRITERS]))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, rng: Any, suffix: str) -> None:
    path = tmp_path_factory.mktemp("spoiled") / f"jobs{suffix}"
    WRITERS[suffix](path)
    path.write_bytes(spoiled(rng, path.read_bytes()))
    try:
        assert read(path)
    except NativesdError as error:
        assert path.name in str(error)  # noqa: PT017


# --- names


@pytest.mark.parametrize(
    ("name", "meant"),
    [("promt", "prompt"), ("Prompt", "prompt"), ("setps", "steps"), ("sede", "seed"), ("heigth", "height"),
     ("Negative Prompt", "negative_prompt"), ("negativ_prompt", "negative_prompt"), ("ID", "id"),
     ("guidance-scale", "guidance_scale"), ("images", "image")],
)  # fmt: skip
def test_near_misses_are_refused(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"no column '{name}': did you mean {meant}\?"):
        Columns().require_meant(name)
    Columns(kept=[name]).require_meant(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("CFG scale", "guidance_scale"), ("CFG", "guidance_scale"), ("cfg-scale", "guidance_scale"),
     ("cfgscale", "guidance_scale"), ("cfgScale", "guidance_scale"), ("Sampler name", "sampler"),
     ("Denoising strength", "strength"), ("Batch size", "num_images"), ("Num Inference Steps", "steps"),
     ("sd_model", "model"), ("neg_prompt", "negative_prompt"), ("Prompts", "prompt")],
)  # fmt: skip
def test_other_programs_names_are_refused_however_they_are_written(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"no column '{name}': here it is {meant}"):
        Columns().require_meant(name)
    Columns(kept=[name]).require_meant(name)
    with pytest.raises(UsageError, match="of a whole run"):
        Columns().require_meant("Text Encoders")


@pytest.mark.parametrize("name", ["prompt", "id", "seed", "width", "model", "negative_prompt"])
def test_options_cannot_be_kept(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' cannot be kept as it is"):
        Columns(kept=[name])


def test_loras_of_a_csv_are_named_as_on_the_command_line() -> None:
    found = [
        Columns().jobs(Row(1, {"prompt": "a", "loras": cell}, texts=True))[0].options["loras"]
        for cell in ("a.safetensors", "a.safetensors:0.5", "a.safetensors:0.5:1", '["b:2.safetensors"]')
    ]
    assert found == [
        "a.safetensors", [["a.safetensors", 0.5, 0.5]], [["a.safetensors", 0.5, 1.0]], ["b:2.safetensors"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["image_id", "prompt_id", "caption", "task", "meta", "url", "label", "hash", "split", "tag", "source", "date"],
)  # fmt: skip
def test_other_columns_pass_through(name: str) -> None:
    (job,) = Columns().jobs(Row(1, {"prompt": "a", name: 1}))
    assert job.extra == {name: 1}


def test_every_option_of_a_call_is_a_column() -> None:
    assert {"id", "model", "prompt", "seed", "num_images"} < set(DECLARED)
    missing = set(Checked.__annotations__) - set(DECLARED) - {"prompts", "one_prompt", "one_negative", "seeds"}
    assert missing == {"latents", "on_step", "refiner", "lora_dirs"}


EXAMPLES: dict[str, Any] = {
    "negative_prompt": "red", "width": 64, "height": 64, "steps": 2, "guidance_scale": 2.5, "guidance": "pag:3",
    "sampler": "Euler a", "schedule": "karras", "regions": [{"prompt": "a cat", "box": [0, 0, 0.5, 1]},
                                                            {"prompt": "a dog", "mask": "mask.png"}],
    "tiling": "x", "image": "in.png", "mask": "mask.png", "strength": 0.5, "steps_as": "a1111",
    "image_guidance_scale": 1.2, "resize": "crop", "outpaint": [0, 8, 0, 8], "mask_blur": 2, "mask_fill": "noise",
    "only_masked": 8, "soft_inpaint": {"mask_blend_scale": 1.5}, "hires": {"scale": 1.5},
    "tiles": 512, "refiner_at": 0.5, "loras": [["a.safetensors", 0.5]],
    "control": [{"model": "tiny", "image": "edges.png"}], "guess_mode": True, "partial": True, "savings": "tome",
    "image_prompts": [{"adapter": "ip.safetensors", "picture": ["in.png", "other.png"], "scale": 0.5}],
    "image_encoder": "encoder.safetensors", "guidance_rescale": 0.5, "eta": 0.5, "sampling": {"churn": 2},
    "clip_skip": 2, "emphasis": "comfyui", "literal": True, "force": False, "sdxl": {"prompt_2": "b"}, "noise": "cuda",
    "variation": {"seed": 3, "strength": 0.5},
}  # fmt: skip
"""Of every option as a jobs file has it; paths of pictures end in .png."""
PAINTED = {"image": "in.png", "mask": "hole.png"}
BESIDE: dict[str, dict[str, str]] = {
    **{name: {"image": "in.png"} for name in ("mask", "strength", "outpaint")},
    **dict.fromkeys(("mask_fill", "only_masked", "soft_inpaint"), PAINTED),
}
"""What such an option is for."""


def test_every_option_is_read_out_of_json_and_of_csv() -> None:
    assert EXAMPLES.keys() == READERS.keys(), "options have come or gone: say here what a jobs file has for them"
    for name, value in EXAMPLES.items():
        more = {"prompt": "a", **BESIDE.get(name, {})}
        (job,) = Columns().jobs(Row(1, {**more, name: value}))
        again = Job.from_json(job.to_json())
        assert (again, again.parameters, again.shape) == (job, job.parameters, job.shape)
        found = options_of(again.options, {}, Path("/data"))[name]  # type: ignore[literal-required]
        check("a", {name: found})  # type: ignore[misc]
        paths = re.findall(r"[\w/]*\w+\.png", str(found))
        assert paths == [f"/data/{path}" for path in re.findall(r"\w+\.png", str(value))], name
        text = value if isinstance(value, str) else json.dumps(value)
        (same,) = Columns().jobs(Row(1, {**more, name: text}, texts=True))
        assert (same, same.parameters) == (job, job.parameters), name


# --- ids, seeds, shards


def test_ids_and_seeds_depend_on_the_row_alone() -> None:
    row = {"prompt": "a fox", "steps": 3, "caption": "x"}
    (job,) = Columns().jobs(Row(1, row))
    (other,) = Columns(defaults={"width": 64}).jobs(Row(9, dict(reversed(row.items()))))
    assert (job.id, job.seed) == (other.id, other.seed) == (job.id, seed_of(job.id))
    assert len(job.id) == 20
    (another,) = Columns().jobs(Row(1, {**row, "caption": "y"}))
    assert another.id != job.id
    assert job.seed < 2**32
    assert (job.parameters, job.shape) != (other.parameters, other.shape)


def test_more_images_of_a_row_are_jobs_of_their_own() -> None:
    jobs = Columns().jobs(Row(1, {"prompt": "a", "id": 5, "seed": 8, "num_images": "3"}))
    assert [(job.id, job.seed) for job in jobs] == [("5-0", 8), ("5-1", 9), ("5-2", 10)]


@pytest.mark.parametrize("seed", [None, -1, "-1", np.int64(-1), float("nan")])
def test_no_seed_is_the_ids(seed: object) -> None:
    (job,) = Columns().jobs(Row(1, {"prompt": "a", "id": np.int64(5), "seed": seed}))
    assert (job.id, job.seed) == ("5", seed_of("5"))


def test_what_shares_a_batch() -> None:
    def shape(**cells: Any) -> str:
        (job,) = Columns().jobs(Row(1, {"prompt": "a", **cells}))
        return job.shape

    assert shape() == shape(prompt="b", seed=3, id="x", negative_prompt="c", caption="d")
    variation = {"seed": 1, "strength": 0.5}
    apart = [
        *(shape(), shape(steps=3), shape(model="x"), shape(prompt="a <lora:x:1>"), shape(image="x")),
        *(shape(variation=variation, id=1), shape(variation=variation, id=2)),
    ]
    assert len(set(apart)) == len(apart)
    assert shape(literal=True) == shape(literal=True, prompt="a <lora:x:1>")


def test_shards_share_out_all_rows(tmp_path: Path) -> None:
    (tmp_path / "jobs.txt").write_text("\n".join(f"prompt {i}" for i in range(300)))
    every = {job.id for job in read(tmp_path / "jobs.txt")}
    parts = [{job.id for job in read(tmp_path / "jobs.txt", (i, 3))} for i in range(3)]
    assert sum(map(len, parts)) == len(every) == 300
    assert set().union(*parts) == every
    assert all(70 < len(part) < 130 for part in parts)


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, Shard(0, 1)),
        ("2/3", {"RANK": "0", "WORLD_SIZE": "9"}, Shard(1, 3)),
        ("auto", {"RANK": "2", "WORLD_SIZE": "4"}, Shard(2, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, Shard(3, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1",
                  "SLURM_ARRAY_TASK_MAX": "4"}, Shard(3, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "20", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10",
                  "SLURM_ARRAY_TASK_MAX": "30"}, Shard(1, 3)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "RANK": "1", "WORLD_SIZE": "4"},
         Shard(5, 8)),
    ],
)  # fmt: skip
def test_shards_are_read(text: str | None, environment: dict[str, str], expected: Shard) -> None:
    assert read_shard(text, environment) == expected


def test_torchruns_processes_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, expected in ((None, None), ("0", "cuda:0"), ("1", "cuda:1")):
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert _own_device() == expected
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="process 3 on this machine finds 2 GPUs"):
        _own_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _own_device() is None, "whoever started the process gave it this one"


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        ("0/3", {}), ("4/3", {}), ("1/0", {}), ("3", {}), ("a/b", {}), ("auto", {}), ("auto", {"RANK": "1"}),
        ("auto", {"RANK": "4", "WORLD_SIZE": "4"}), ("auto", {"RANK": "x", "WORLD_SIZE": "4"}),
        ("auto", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1",
                  "SLURM_ARRAY_TASK_MAX": "9"}),
    ],
)  # fmt: skip
def test_shards_that_cannot_be(text: str, environment: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        read_shard(text, environment)
