"""Hostile inputs from a seed: what was tried, refused, read, and what broke a promise of docs/security.md.

python tools/attack.py [--minutes M | --count N] [--seed S] [--only KIND]

Every input must be read, or refused by a NativesdError, within 5 s. The table says, for each kind, how many were tried,
refused and ok; what failed is printed with its seed, which repeats it. Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nativesd.destination import fresh
from nativesd.errors import NativesdError
from nativesd.models.build import expected
from nativesd.pictures.infotext import parse_infotext
from nativesd.reading import read_json
from nativesd.sampling.published import FIELDS, SchedulerConfig
from nativesd.sampling.schedule import trained_sigmas
from nativesd.shipped import TINY
from nativesd.text.embedding import read_embeddings
from nativesd.text.prompt import parse_prompt
from nativesd.text.tokenizer import ClipTokenizer, pad_id
from nativesd.weights.files import configs
from nativesd.weights.files.source import components
from nativesd.weights.formats.header import read_index
from nativesd.weights.lora.file import read_lora

SECONDS = 5.0
VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 32, 10**9, 10**30, 1e308, -0.5, 0.5, True, False, None, "", "x" * 300, "DownBlock2D", "\ud800",
    "a\nb", "../x", "/etc/passwd", [], [[]], [1], [1] * 9, [None], [32, 64], ["x"], {}, {"a": 1}, [[[[1]]]],
)  # fmt: skip
CONFIGS = {"unet": configs.UNET, "vae": configs.VAE, "text_encoder": configs.TEXT, "controlnet": configs.CONTROLNET}
TEXTS = (
    "(", ")", "[", "]", ":", "<", ">", "|", "\\", " ", "\t", "\n", "a", "1", ".", "1.1", ":1.2)", "BREAK", " AND ", ",",
    "\0", "\ud800", "\U0001f33b", "<lora:x:1>",
    "embedding:x", "(a:", "e9", "Steps: 20, ", "Negative prompt: ", '"', "{",
)  # fmt: skip
Attack = Callable[[random.Random, Path], None]


def changed(rng: random.Random, good: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """A config with one to three fields replaced or left out."""
    data = dict(good)
    for name in rng.sample(names, rng.randint(1, 3)):
        if rng.random() < 0.15:
            data.pop(name, None)
        else:
            data[name] = rng.choice(VALUES)
    return data


def spoiled(rng: random.Random, raw: bytes) -> bytes:
    """JSON with bytes exchanged, cut, repeated, or nested."""
    match rng.randrange(5):
        case 0:
            at = rng.randrange(len(raw))
            return raw[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 4))) + raw[at + 1 :]
        case 1:
            return raw[: rng.randrange(len(raw))]
        case 2:
            return raw.replace(
                b"{", b"{" + rng.choice((b'"a":1,"a":2,', b'"a":NaN,', b'"a":1e999,', b'"a":-Infinity,')), 1
            )
        case 3:
            depth = rng.choice((10, 100, 100_000))
            return b'{"a":' + b"[" * depth + b"]" * depth * rng.randrange(2) + b"}"
        case _:
            return rng.choice((b"", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{" * 10_000))


def config(rng: random.Random, folder: Path) -> None:
    """A. config.json of a component, and the network that it describes."""
    name = rng.choice(list(CONFIGS))
    good = json.loads((TINY / name / "config.json").read_text())
    names = [*good, *(field.name for field in CONFIGS[name])]
    path = folder / name / "config.json"
    path.parent.mkdir()
    raw = json.dumps(changed(rng, good, names)).encode()
    path.write_bytes(spoiled(rng, raw) if rng.random() < 0.2 else raw)
    found = configs.component_config(path)
    if found is not None:
        expected(found)


def scheduler(rng: random.Random, folder: Path) -> None:
    """A. scheduler_config.json, and its sigmas."""
    good = json.loads((TINY / "scheduler" / "scheduler_config.json").read_text())
    trained_sigmas(SchedulerConfig.from_published(changed(rng, good, [*good, *(field.name for field in FIELDS)])))


def listing(rng: random.Random, folder: Path) -> None:
    """A. model_index.json, an index of shards, a tokenizer's maps."""
    name = rng.choice(("model_index.json", "x.safetensors.index.json", "special_tokens_map.json"))
    names = [str(value) for value in VALUES if isinstance(value, str)] + ["unet", "..", "a/b", "x" * 5000]
    keys = {rng.choice(names): rng.choice((["diffusers", "UNet"], *VALUES)) for _ in range(3)}
    data = (
        {"weight_map": keys} if "index.json" in name and name[0] == "x" else {**keys, "pad_token": rng.choice(VALUES)}
    )
    raw = json.dumps(data).encode()
    (folder / name).write_bytes(spoiled(rng, raw) if rng.random() < 0.3 else raw)
    if name[0] == "m":
        components(folder)
    elif name[0] == "x":
        read_index(folder / name)
    else:
        read_json(folder / name)
        for file in ("vocab.json", "merges.txt"):
            (folder / file).symlink_to(TINY / "tokenizer" / file)
        pad_id(folder, 0)


def prompt(rng: random.Random, folder: Path) -> None:
    """D. Prompts, and the texts that pictures carry."""
    text = "".join(rng.choice(TEXTS) * rng.choice((1, 1, 3, 50, 5000)) for _ in range(rng.randint(1, 12)))
    parse_infotext(text[:20_000])
    parse_prompt(text)


def lora(rng: random.Random, folder: Path) -> None:
    """C. LoRAs and embeddings whose parts do not fit each other."""

    def shape() -> tuple[int, ...]:
        return tuple(rng.choice((0, 1, 2, 4, 16)) for _ in range(rng.randint(0, 4)))

    module = rng.choice(("lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model", "x", "", "\u00fc" * 50))
    parts = rng.sample(("lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "dora_scale", "hada_w1_a"), 3)
    dtype = rng.choice((torch.float16, torch.float32, torch.int8, torch.bool))
    save_file({f"{module}.{part}": torch.zeros(shape(), dtype=dtype) for part in parts}, folder / "x.safetensors")
    if rng.random() < 0.5:
        read_lora(folder / "x.safetensors")
    else:
        read_embeddings(folder / "x.safetensors")


def place(rng: random.Random, folder: Path) -> None:
    """F. Destinations that cannot be, and what must stay."""
    (folder / "mine").write_bytes(b"mine")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    (folder / ".x.partial").write_bytes(b"mine")
    name = rng.choice(
        ("x", "mine", "mine/x", "loop", "loop/x", "gone", "x" * 300, "a/b/c", "..", ".", "a\0b", "\ud800")
    )
    try:
        with fresh(f"{folder}/{name}", replace=rng.random() < 0.3 and name != "mine") as temporary:
            if rng.random() < 0.3:
                raise OSError(28, "No space left on device")
            temporary.write_bytes(b"new")
    finally:
        if (folder / "mine").read_bytes() != b"mine" or (folder / ".x.partial").read_bytes() != b"mine":
            raise AssertionError("somebody else's file was changed")
        if left := [path.name for path in folder.iterdir() if ".nativesd-" in path.name]:
            raise AssertionError(f"left behind: {left}")


ATTACKS: dict[str, Attack] = {
    "config": config, "scheduler": scheduler, "listing": listing, "prompt": prompt, "lora": lora, "place": place,
}  # fmt: skip


class TooLong(BaseException):
    """An input took longer than is promised."""


def attack_once(kind: str, seed: int) -> str:
    """One input: "refused", "ok", or what went wrong."""

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix="attack-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ATTACKS[kind](random.Random(f"{kind} {seed}"), Path(folder))
        return "ok"
    except NativesdError as error:
        return "refused" if len(str(error)) < 2000 else f"a message of {len(str(error))} characters"
    except TooLong:
        return f"over {SECONDS:g} s"
    except Exception as error:
        return repr(error)[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def attack(kinds: list[str], *, seed: int, count: int | None, seconds: float | None) -> dict[str, Counter[str]]:
    """Inputs of every kind in turn, `count` of each or for some `seconds`; failures are printed as they come."""
    results = {kind: Counter[str]() for kind in kinds}
    end, number = None if seconds is None else time.monotonic() + seconds, seed
    while (count is None or number < seed + count) and (end is None or time.monotonic() < end):
        for kind in kinds:
            result = attack_once(kind, number)
            results[kind][result if result in ("ok", "refused") else "failed"] += 1
            if result not in ("ok", "refused"):
                print(f"{kind}, seed {number}: {result}", file=sys.stderr)
        number += 1
    return results


def main() -> int:
    """Run, print the table, and say by the exit code whether all held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=ATTACKS, action="append")
    given = parser.parse_args()
    minutes = 1.0 if given.minutes is None and given.count is None else given.minutes
    ClipTokenizer(pad=0)
    results = attack(
        given.only or list(ATTACKS),
        seed=given.seed,
        count=given.count,
        seconds=None if minutes is None else 60 * minutes,
    )
    print(f"{'what':<12}{'tried':>9}{'refused':>9}{'ok':>9}{'failed':>9}")
    for kind, found in results.items():
        print(f"{kind:<12}{found.total():>9}{found['refused']:>9}{found['ok']:>9}{found['failed']:>9}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{sum(found.total() for found in results.values())} inputs, {peak:.2f} GB at most")
    return 1 if any(found["failed"] for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
