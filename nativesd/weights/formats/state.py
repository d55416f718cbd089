"""The tensors of what a pickle describes, under the names that they have in a state dict.

Names are the keys and indices on the way to a tensor, joined by dots. A module that was saved whole, by pickle or as
TorchScript, gives the names of its state dict: its attributes', without `_parameters`, `_buffers` and `_modules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from nativesd.errors import quote
from nativesd.weights.formats.header import FormatError
from nativesd.weights.formats.pickles import Inert, Pairs, Stored, Value

MAX_ENTRIES = 100_000
"""Of the outermost dictionary; a checkpoint of SDXL with its training average has some 4 000."""
MAX_DEPTH = 100
"""Objects within one another."""
MAX_NAMES = 8_000_000
"""Characters of all names, 20 more for each, those of inner objects included; a checkpoint of SDXL has some 300 000."""

WRAPPERS = ("state_dict", "model_state_dict", "params_ema", "params", "model", "module")
"""What tools call the dictionary of weights when they save it with other things; the first that is there counts."""
TRAINING = {
    "optimizer_states": "what the optimizer remembers, which only training goes on with",
    "optimizer_state_dict": "what the optimizer remembers, which only training goes on with",
    "optimizer": "what the optimizer remembers, which only training goes on with",
    "lr_schedulers": "where the learning rate was, which only training goes on with",
    "callbacks": "what the training tool's callbacks remember",
    "loops": "where the training tool was",
}
"""Entries beside the weights that say nothing about pictures, and why they are left out."""
KNOWN = {
    "torch", "collections", "numpy", "_codecs", "__torch__", "pytorch_lightning", "lightning", "lightning_fabric",
    "omegaconf", "argparse", "pathlib", "typing", "datetime", "copyreg", "copy_reg", "ldm", "sgm", "diffusers",
    "transformers", "peft", "accelerate", "safetensors", "ml_collections", "easydict",
}  # fmt: skip
"""Packages whose objects checkpoints hold, so that their names are no reason for a warning."""
TYPES = {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in (
    "set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "bool", "str", "bytes", "bytearray",
    "slice", "range", "object",
)}  # fmt: skip
TRANSPARENT = ("_parameters", "_buffers", "_modules")
MAX_TEXT = 1000
"""Characters of a text that is kept as metadata."""


@dataclass(frozen=True)
class State:
    """Tensors by their names, texts and numbers beside them, and what was left out, with the reasons."""

    tensors: dict[str, Stored] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def state_of(value: Value, called: Iterable[str]) -> State:
    """The state that a pickle's object holds; `called` are the names it would have called. Raises FormatError."""
    state, walker = State(), _Walker()
    for key, child in _unwrapped(value, walker, state):
        for path, leaf in walker.leaves(child):
            name = _joined(key, path)
            if name in state.tensors or name in state.left_out:
                raise FormatError(f"names {quote(name)} twice")
            if isinstance(leaf, Stored):
                state.tensors[name] = leaf
            else:
                state.left_out[name] = f"an object that is no plain tensor ({quote(leaf)})"
    for name in called:
        if name.partition(".")[0] not in KNOWN and name not in TYPES:
            state.left_out[quote(name)[1:-1]] = (
                "a loader of pickles would call this as it opens the file: nothing is called here; take care elsewhere"
            )
    return state


def _unwrapped(value: Value, walker: _Walker, state: State) -> Iterator[tuple[str, Value]]:
    """What the names begin with, and the objects they go on in; what is beside the weights is put down in `state`."""
    if not isinstance(value, Pairs):
        yield "", value
        return
    if len(value.items) > MAX_ENTRIES:
        raise FormatError(f"holds a dictionary of {len(value.items)} entries, over the {MAX_ENTRIES} there can be")
    entries = dict(_named(value.items))
    if dropped := sum(_key(key) is None for key, _ in value.items):
        state.left_out["(unnamed)"] = f"{dropped} entries under keys that are neither text nor numbers"
    whole = {key for key, child in entries.items() if key not in TRAINING and walker.leaves(child)}
    wrapper = next((key for key in WRAPPERS if key in whole and not isinstance(entries[key], Stored)), None)
    for key, child in entries.items():
        if wrapper == key:
            yield "", child
        elif key in whole and wrapper is None:
            yield key, child
        elif key in whole:
            state.left_out[key] = f"tensors beside {wrapper}, which has the weights"
        elif (text := _text(child)) is not None:
            state.metadata[key] = text
        elif child is not None:
            state.left_out[key] = TRAINING.get(key, "there is no tensor in it")


class _Walker:
    """Finds the leaves of objects, each once: what it finds below one is kept for the next way to it."""

    def __init__(self) -> None:
        self.known: dict[int, list[tuple[str, Stored | str]]] = {}
        self.open: set[int] = set()
        self.characters = 0

    def leaves(self, value: Value) -> list[tuple[str, Stored | str]]:
        """Every tensor below an object, and the names of classes that hold what is no plain tensor, by their paths.

        Raises FormatError.
        """
        if isinstance(value, Stored):
            return [("", value)]
        if not isinstance(value, Pairs | Inert | list | tuple) or id(value) in self.open:
            return []
        if (known := self.known.get(id(value))) is not None:
            return known
        if len(self.open) == MAX_DEPTH:
            raise FormatError(f"nests objects over {MAX_DEPTH} deep, which no checkpoint does")
        self.open.add(id(value))
        out: list[tuple[str, Stored | str]] = []
        for key, child in _children(value):
            for path, leaf in self.leaves(child):
                name = _joined(key, path)
                self.characters += 20 + len(name)
                if self.characters > MAX_NAMES:
                    raise FormatError(
                        f"gives its tensors names of over {MAX_NAMES} characters: it is made to fill memory"
                    )
                out.append((name, leaf))
        if isinstance(value, Inert) and not out and _holds_numbers(value.name):
            out = [("", value.name)]
        self.open.remove(id(value))
        self.known[id(value)] = out
        return out


def _holds_numbers(name: str) -> bool:
    """Whether a class would hold what a user takes for a tensor, so that it must not go unsaid."""
    return name.startswith("torch._utils._rebuild") or name.endswith("multiarray._reconstruct")


def _children(value: Value) -> Iterable[tuple[str, Value]]:
    """The parts of an object by the names they have in it."""
    match value:
        case list() | tuple():
            return ((str(index), child) for index, child in enumerate(value))
        case Pairs(items=items):
            return _named(items).items()
        case Inert(items=items, state=Pairs(items=attributes)):
            named = _named(attributes)
            parts = [child for name in TRANSPARENT if isinstance(child := named.get(name), Pairs)]
            inner = [pair for part in parts for pair in _named(part.items).items()] if parts else named.items()
            return [*_named(items).items(), *inner]
        case Inert(items=items):
            return _named(items).items()
    return ()


def _named(items: list[tuple[Value, Value]]) -> Mapping[str, Value]:
    """The pairs whose keys can be part of a name; of equal keys the last counts, as in a dictionary."""
    return {name: child for key, child in items if (name := _key(key)) is not None}


def _key(key: Value) -> str | None:
    """A key of a dictionary as a part of a name; None where it cannot be one."""
    return None if isinstance(key, float) else _text(key)


def _text(value: Value) -> str | None:
    """A number or a short text as text that is valid Unicode; None for anything else."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None  # to write it out could take long
    text = str(value) if isinstance(value, str | int | float) else None
    if text is None or len(text) > MAX_TEXT or (not text.isascii() and re.search("[\ud800-\udfff]", text)):
        return None
    return text


def _joined(first: str, rest: str) -> str:
    return f"{first}.{rest}" if first and rest else first or rest
