"""Kind L: files of jobs, their rows, and the results of others."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow import parquet

from attacks.values import NUMBERS, VALUES, changed, deeply_changed, odd_file, spoiled, text
from nativesd.batch.columns import DECLARED, Columns
from nativesd.batch.files import Row
from nativesd.batch.plan import Plan
from nativesd.batch.results import look_at, read_results

GOOD: dict[str, Any] = {
    "id": "a", "prompt": "a fox", "negative_prompt": "red", "steps": 4, "seed": 7, "width": 64, "guidance_scale": 7.5,
    "hires": {"scale": 1.5, "upscaler": "lanczos"}, "loras": ["x.safetensors", ["y.safetensors", 0.5]],
    "control": [{"model": "tiny", "image": "x.png", "scale": 0.5}], "variation": {"seed": 1, "strength": 0.5},
    "sdxl": {"original": [64, 64]}, "outpaint": [0, 8, 0, 8], "image": "x.png", "literal": False, "caption": "kept",
}  # fmt: skip


def jobs(rng: random.Random, folder: Path) -> None:
    """A file of jobs of any format, whole, spoiled, or with odd cells; results beside it; rows as tables hold them."""
    path = folder / f"x.{rng.choice(('jsonl', 'csv', 'txt', 'parquet', 'json'))}"
    kind = rng.random()
    if kind < 0.1:
        odd_file(rng, path)
    else:
        _write(rng, path, [_row(rng) for _ in range(rng.randint(0, 4))])
        if kind < 0.5 and path.exists():
            path.write_bytes(spoiled(rng, path.read_bytes()))
    if kind > 0.8:
        (folder / "results.1-of-1.jsonl").write_bytes(spoiled(rng, json.dumps({"id": "a", "file": "b/a.png"}).encode()))
        for line in read_results(folder):
            look_at(folder, line)
        Columns().jobs(Row(1, {**GOOD, rng.choice(DECLARED): rng.choice(NUMBERS)}))
    with Plan.of(path, Columns()) as plan:
        plan.recall(read_results(folder))
        list(plan.batches(3))


def _row(rng: random.Random) -> dict[str, Any]:
    row = {name: GOOD[name] for name in rng.sample(list(GOOD), rng.randint(1, 6))} | {"prompt": text(rng)[:200]}
    if rng.random() < 0.3:
        row = changed(rng, row, list(row))
    elif rng.random() < 0.5:
        row = deeply_changed(rng, row, VALUES) or {}
    if rng.random() < 0.1 and isinstance(row, dict):
        row[text(rng)[:20]] = rng.choice(VALUES)
    return row if isinstance(row, dict) else {"prompt": row}


def _write(rng: random.Random, path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as a file; what a format cannot hold is left out."""
    match path.suffix:
        case ".csv":
            with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
                table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
                table.writeheader()
                table.writerows(
                    {n: json.dumps(v) if isinstance(v, list | dict) else v for n, v in row.items()} for row in rows
                )
        case ".parquet":
            try:
                parquet.write_table(arrow.Table.from_pylist(rows), path)
            except (arrow.ArrowException, ValueError, TypeError, OverflowError):  # such as cells of several types
                parquet.write_table(arrow.table({"prompt": ["a fox"], "steps": [rng.randrange(2000)]}), path)
        case _:
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
