"""Every kind of hostile input, by the letters of the threats that they are: what tries one, and how often in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attacks import hub, jobs, models, parts, places, tables, texts

Attack = Callable[[random.Random, Path], None]


@dataclass(frozen=True)
class Kind:
    """What makes an input from a seed, in an empty folder, and uses it. It returns, or raises.

    `share` is how many of the inputs of a round are of this kind: dear ones are rare.
    """

    threat: str
    attack: Attack
    share: int
    seconds: float = 5.0


def _hang(rng: random.Random, folder: Path) -> None:
    time.sleep(60)


def _grow(rng: random.Random, folder: Path) -> None:
    b"x" * 1_200_000_000  # noqa: B018  # made, and let go


def _fail(rng: random.Random, folder: Path) -> None:
    raise TypeError("a traceback")


KINDS = {
    "config": Kind("A, JSON of a model folder", models.config, 12),
    "scheduler": Kind("A, JSON of a model folder", models.scheduler, 12),
    "listing": Kind("A, JSON of a model folder", models.listing, 12),
    "tokenizer": Kind("A, JSON of a model folder", models.tokenizer, 2),
    "table": Kind("B, weight maps", tables.table, 8),
    "lora": Kind("C, LoRAs and embeddings", parts.lora, 4),
    "pickle": Kind("C, pickles", parts.pickled, 4),
    "prompt": Kind("D, prompts", texts.prompt, 8),
    "infotext": Kind("D, parameters", texts.infotext, 8),
    "picture": Kind("D, pictures", texts.picture, 6),
    "numbers": Kind("E, numbers", texts.numbers, 16),
    "place": Kind("F, destinations", places.place, 12),
    "folder": Kind("F, folders that are copied", places.folder_of_a_model, 1),
    "caches": Kind("G, caches of others", places.caches, 6),
    "hub": Kind("H, the hub", hub.hub, 2, 10.0),
    "header": Kind("K, wrong tensors", models.header, 1),
    "jobs": Kind("L, files of jobs", jobs.jobs, 8),
}
CONTROLS = {
    "hang": Kind("takes 60 s", _hang, 1, 0.5),
    "grow": Kind("takes 1.2 GB", _grow, 1),
    "fail": Kind("raises TypeError", _fail, 1),
}
"""Kinds that must fail, which show that failures are seen; named, they are tried like the others."""
EVERY = KINDS | CONTROLS
