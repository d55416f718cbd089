"""Commands killed with SIGKILL at random moments: what they write is whole or absent, and repeats succeed.

python tools/kill.py [--moments N] [--seed S] [--only KIND]

Every moment is a point of time, or the n-th operation on files, of a run that was left alone. There the command is
killed, started again over what it left, killed at the same moment again, and then run to its end. Each time every
output must be whole (the bytes of the run that was left alone) or absent (or as it was before), and the files of others
untouched; the last run must succeed, and leave nothing beside its outputs. Commands are forks of this process, which
has imported everything, so that few moments fall into an import. Exit code 1: something failed, said with its seed.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime  # noqa: F401  # here and below: what the commands import while they run
import onnxscript  # noqa: F401
import torch
from PIL import Image
from safetensors.torch import save_file

import nativesd
from nativesd import cli
from nativesd.checkpoints import convert, export  # noqa: F401
from nativesd.checkpoints.loras import extract, merge  # noqa: F401
from nativesd.checkpoints.merging import merge as merging  # noqa: F401
from nativesd.destination import leftovers, remove
from nativesd.diffusion import model  # noqa: F401
from nativesd.export.kept.entries import verify
from nativesd.export.kept.store import Store
from nativesd.weights.lora.file import read_lora
from nativesd.weights.lora.resolve import Use

OPERATIONS = {
    "open", "os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.scandir",
    "os.listdir", "shutil.rmtree", "fcntl.flock",
}  # fmt: skip
"""Audit events before which a command may be killed."""
KEPT = {"nativesd", "tuning.json", "hashes.json", f"torchinductor_{getpass.getuser()}"}
"""What commands keep in the user's cache, and torch in the folder of temporary files."""
SECONDS = 300  # for a command that is left alone
Tree = Mapping[str, str]


@dataclass(frozen=True)
class Kind:
    """A command in an empty folder with `../inputs` beside it, and what it writes, each whole or absent on its own."""

    command: str
    outputs: tuple[str, ...]
    before: bool = False
    """Whether they were there before, and are replaced"""


KINDS = {
    "to folder": Kind("convert ../inputs/tiny.safetensors new/out --layout diffusers", ("new/out",)),
    "to file": Kind("convert tiny out.safetensors --layout ldm", ("out.safetensors",)),
    "merge folder": Kind("lora merge tiny ../inputs/lora.safetensors out", ("out",)),
    "merge file": Kind("lora merge ../inputs/tiny.safetensors ../inputs/lora.safetensors out.safetensors",
                       ("out.safetensors",)),
    "adapters": Kind("convert ../inputs/lora.safetensors out --layout peft --base tiny", ("out",)),
    "extract": Kind("lora extract ../inputs/tuned.safetensors tiny out.safetensors --rank 2", ("out.safetensors",)),
    "merge models": Kind("merge ../inputs/tiny.safetensors tiny out.safetensors", ("out.safetensors",)),
    "export": Kind("export onnx tiny out --component text_encoder", ("out",)),
    "picture": Kind("generate x --seed 1 --steps 2 -o out.png --preview preview.png", ("out.png", "preview.png")),
    "pictures": Kind("generate x --seed 1 --steps 2 --num-images 2 -o out.png --preview preview.webp",
                     ("out-0.png", "out-1.png", "preview.webp"), before=True),
    "engines": Kind("generate x --seed 1 --steps 1 -o out.png --backend onnx --engines engines",
                    ("out.png", "engines/*")),
}  # fmt: skip
SLOW = {"engines"}


def prepare(inputs: Path) -> None:
    """The embedded model as one file, and a LoRA for it."""
    inputs.mkdir()
    warnings.simplefilter("ignore", nativesd.NativesdWarning)  # what the file will not say
    convert.convert("tiny", inputs / "tiny.safetensors", layout="ldm")
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = {"lora_up.weight": torch.full((224, 2), 0.01), "lora_down.weight": torch.full((2, 224), 0.01)}
    save_file({f"{module}.{part}": tensor for part, tensor in parts.items()}, inputs / "lora.safetensors")
    uses = [Use(read_lora(inputs / "lora.safetensors"))]
    merge.merge_checkpoint(inputs / "tiny.safetensors", uses, inputs / "tuned.safetensors")


def bystanders(folder: Path) -> None:
    """What others have there, under names that look like ours."""
    for name in (".out.partial", "out.old", ".nativesd-mine.partial", "tmp123.png", "out.safetensors.partial"):
        (folder / name).write_bytes(b"mine")
    (folder / ".out.old").mkdir()
    (folder / ".out.old" / "mine").write_bytes(b"mine")
    (folder / "link").symlink_to("out.old")


def tree(folder: Path) -> Tree:
    """Everything below a folder: what it is, by its name."""
    return {str(path.relative_to(folder)): contents(path) for path in sorted(folder.rglob("*"))}


def contents(path: Path) -> str:
    """What tells that a file is the same; of what may differ from run to run, that it is whole."""
    if path.is_symlink() or path.is_dir():
        return "folder" if not path.is_symlink() else os.readlink(path)
    if path.name == "manifest.json":  # which says how long it took
        return listing(path)
    if path.suffix == ".onnx":  # the exporter's order of nodes may differ; the manifest beside it says if it is whole
        return "a graph"
    if path.stem == "preview":  # of any step
        Image.open(path).load()
        return "a picture"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listing(manifest: Path) -> str:
    """What a manifest says in general, and whether the files that it lists are what was written."""
    data = json.loads(manifest.read_bytes())
    wrong = [
        name
        for name, file in data["files"].items()
        if hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() != file["sha256"]
    ]
    return f"{', '.join(sorted(data))}; not as written: {', '.join(wrong) or 'nothing'}"


def written(kind: Kind, folder: Path) -> list[Path]:
    """The outputs that are there."""
    return [path for output in kind.outputs for path in sorted(folder.glob(output)) if ".nativesd-" not in path.name]


def start(kind: Kind, home: Path, kill_at: int = 0) -> int:
    """Start a command in `home`/work; returns its process id. It kills itself before operation `kill_at`, from 1 on."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(home / "work")
        os.environ |= {"XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home / "temp")}
        tempfile.tempdir = None
        sys.argv = ["nativesd", *kind.command.split()]
        done = watch(home, kill_at)
        try:
            cli.run()
        finally:
            (home / "operations").write_text(str(done["operations"]))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def watch(home: Path, kill_at: int) -> Counter[str]:
    """Count this process's operations on files in `home`; before number `kill_at` it ends."""
    done, root = Counter[str](), str(home)

    def operation(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS:
            return
        path = arguments[0] if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if event != "fcntl.flock" and not os.path.abspath(os.fsdecode(path)).startswith(root):
            return
        done["operations"] += 1
        if done["operations"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(operation)
    return done


def finish(pid: int, seconds: float) -> int:
    """Wait for a process, and kill it after some seconds; returns its exit code, negative for a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Trial:
    """One kind's runs: the one that was left alone, and what others are compared with."""

    def __init__(self, kind: Kind, home: Path) -> None:
        self.kind, self.home, self.work = kind, home, home / "work"
        self.clear()
        began = time.monotonic()
        if finish(start(kind, home), SECONDS):
            raise SystemExit(f"{kind.command}: does not run\n{(home / 'log').read_text()}")
        self.seconds = time.monotonic() - began
        self.operations = int((home / "operations").read_text())
        self.whole = self.outputs()

    def clear(self) -> None:
        """As before a first run."""
        for name in ("work", "cache", "temp"):
            shutil.rmtree(self.home / name, ignore_errors=True)
            (self.home / name).mkdir(parents=True)
        bystanders(self.work)
        if self.kind.before:
            for name in self.kind.outputs:
                Image.new("RGB", (8, 8)).save(self.work / name)
        self.before = tree(self.work)

    def outputs(self) -> dict[str, Tree | str]:
        """Every output that is there, with all that is in it."""
        found = written(self.kind, self.work)
        return {str(path.relative_to(self.work)): tree(path) if path.is_dir() else contents(path) for path in found}

    def wrong(self, *, ended: bool) -> list[str]:
        """What breaks a promise now, after a killed run or one that has `ended`."""
        out, there = [], self.outputs()
        for name, found in there.items():
            if found != self.whole.get(name) and (ended or found != self.before.get(name)):
                out.append(f"{name} is neither whole nor as before")
        if ended and there.keys() != self.whole.keys():
            out.append(f"there are {', '.join(there)}")
        entries = Store(self.work / "engines").entries()
        out += [f"{entry.path.name}: {why}" for entry in entries if (why := verify(entry)) is not None]
        now = tree(self.work)
        for name in sorted(now.keys() | self.before.keys()):
            if now.get(name) == self.before.get(name) or self.is_ours(name):
                continue
            if name in self.before:
                out.append(f"{name}, somebody else's, was changed")
            elif ended or ".nativesd-" not in name:
                out.append(f"{name} is left")
        if ended:
            for path in leftovers(self.home / "cache" / "nativesd"):  # where the last run need not have written
                remove(path)
            kept = [path for folder in ("cache", "temp") for path in (self.home / folder).rglob("*")]
            out += [f"{path} is left" for path in kept if path.name not in KEPT]
        return out

    def is_ours(self, name: str) -> bool:
        """Whether a path is an output, in one, or a folder above one."""
        return any(f"{name}/".startswith(f"{each}/") or f"{each}/".startswith(f"{name}/") for each in self.whole)

    def moment(self, rng: random.Random) -> tuple[Counter[str], list[str]]:
        """Kill at a moment, twice, and run to the end; returns counts, and what was wrong."""
        self.clear()
        counts, wrong = Counter[str](moments=1), list[str]()
        at, seconds = rng.choice(((rng.randint(1, self.operations), SECONDS), (0, rng.uniform(0, self.seconds))))
        when = f"before operation {at}" if at else f"after {seconds:.3f} s"
        for _ in range(2):
            code = finish(start(self.kind, self.home, at), seconds)
            counts["kills"] += code == -signal.SIGKILL
            wrong += self.wrong(ended=False)
            there = written(self.kind, self.work)
            counts["whole" if there and not self.kind.before else "absent"] += 1
            if not self.kind.before and len(there) == len(self.whole):  # what is whole is not written again
                for path in there:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        code = finish(start(self.kind, self.home), SECONDS)
        if code:
            wrong.append(f"the repeat ended with {code}: {(self.home / 'log').read_text()[-500:]}")
        wrong += self.wrong(ended=True)
        counts["failed"] += bool(wrong)
        return counts, [f"{text} (killed {when})" for text in wrong]


def kill(kinds: list[str], moments: int, seed: int, folder: Path) -> dict[str, Counter[str]]:
    """Moments of every kind in turn; failures are printed as they come."""
    prepare(folder / "inputs")
    inputs = tree(folder / "inputs")

    @cache
    def trial(kind: str) -> Trial:
        home = folder / kind.replace(" ", "-")
        (home / "work").mkdir(parents=True)
        (home / "inputs").symlink_to(folder / "inputs")
        return Trial(KINDS[kind], home)

    results = {kind: Counter[str]() for kind in kinds}
    for number in range(moments):
        kind = kinds[number % len(kinds)]
        counts, wrong = trial(kind).moment(random.Random(f"{kind} {seed + number}"))
        results[kind] += counts
        for text in wrong:
            print(f"{kind}, seed {seed + number}: {text}", file=sys.stderr)
    if tree(folder / "inputs") != inputs:
        raise SystemExit("the sources were changed")
    return results


def main() -> int:
    """Run, print the table, and say by the exit code whether all held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append")
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    kinds = given.only or [kind for kind in KINDS if kind not in SLOW]
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        results = kill(kinds, given.moments, given.seed, Path(folder))
    names = ("moments", "kills", "absent", "whole", "failed")
    print(f"{'what':<14}", *(f"{name:>9}" for name in names), sep="")
    for kind, found in results.items():
        print(f"{kind:<14}", *(f"{found[name]:>9}" for name in names), sep="")
    print(f"nativesd {nativesd.__version__}: {sum(found['kills'] for found in results.values())} kills")
    return 1 if any(found["failed"] for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
