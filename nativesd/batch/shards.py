"""Which part of the rows a process paints: as it was told, or as the program that started many of them says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nativesd.errors import UsageError

MOST = 1_000_000


@dataclass(frozen=True)
class Shard:
    """Number `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """As people count."""
        return f"{self.index + 1}-of-{self.count}"


def read_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """ "I/N" (from 1), or "auto"; None is all of it. Raises UsageError.

    "auto" takes what torchrun sets (RANK, WORLD_SIZE), and SLURM for the tasks of an array (SLURM_ARRAY_TASK_ID,
    SLURM_ARRAY_TASK_COUNT, SLURM_ARRAY_TASK_MIN); where both are there, every task of the array has as many shards as
    torchrun has ranks.
    """
    if text is None:
        return Shard()
    if text != "auto":
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count) <= MOST):
            raise UsageError(f"shard must be I/N, such as 1/4 to 4/4, or auto, not {text!r}")
        return Shard(int(index) - 1, int(count))
    found = [shard for shard in (_array(environment), _ranks(environment)) if shard is not None]
    if not found:
        raise UsageError(
            "shard must be I/N: auto finds neither RANK and WORLD_SIZE (torchrun) nor SLURM_ARRAY_TASK_ID and "
            "SLURM_ARRAY_TASK_COUNT (sbatch --array) in the environment"
        )
    shard = Shard()
    for each in found:
        shard = Shard(shard.index * each.count + each.index, shard.count * each.count)
    return shard


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Which of the processes that torchrun started on this machine this is, from 0."""
    return _number(environment, "LOCAL_RANK")


def _ranks(environment: Mapping[str, str]) -> Shard | None:
    rank, world = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
    return None if rank is None or world is None else _within(rank, world, "RANK", "WORLD_SIZE")


def _array(environment: Mapping[str, str]) -> Shard | None:
    """A task of an array, whose numbers may begin anywhere, and go in steps."""
    task, count = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT"))
    if task is None or count is None:
        return None
    least = _number(environment, "SLURM_ARRAY_TASK_MIN") or 0
    most = _number(environment, "SLURM_ARRAY_TASK_MAX")
    step = 1 if most is None or count == 1 else (most - least) // (count - 1)
    if step < 1 or (task - least) % step or (most is not None and least + step * (count - 1) != most):
        raise UsageError("shard must be I/N: the numbers of this SLURM array have gaps, and auto cannot count them")
    return _within((task - least) // step, count, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise UsageError(f"{name} in the environment must be a whole number, not {value!r}")
    return int(value)


def _within(index: int, count: int, of: str, all_of: str) -> Shard:
    if not 0 <= index < count <= MOST:
        raise UsageError(f"{of} in the environment must be below {all_of}, and these are {index} and {count}")
    return Shard(index, count)
