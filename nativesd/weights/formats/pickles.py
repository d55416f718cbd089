"""Pickles read as data: a walk over their opcodes that makes lists, pairs, numbers and tensors' descriptions only.

A pickle is a program for a stack machine (pickletools, "A pickle is a program"). The loader in Python imports and calls
whatever it names. Here names stay names: what the program would call becomes an `Inert` with its name and arguments,
but for the few functions of torch by which tensors are written (torch/_utils.py, `_rebuild_*`), which become `Stored`.
Nothing is imported, called, compared or hashed but by this module's own lines, which are one file for that reason.

Refused are opcodes beyond the list below, over MAX_BYTES bytes or MAX_OPCODES opcodes (the checkpoint of SDXL with its
training average and optimizer has some 400 000), and marks within marks beyond MAX_MARKS.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from nativesd.errors import quote
from nativesd.weights.formats.header import MAX_COUNT, MAX_DIMENSIONS, FormatError

MAX_BYTES = 8_000_000
MAX_OPCODES = 700_000
MAX_MARKS = 1000
MAX_CALLED = 1000
"""Names that are kept of those that a pickle would have called."""


Value = object
"""None, a number, text, bytes, a list, a tuple, or one of the classes below."""


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A global that the pickle names, as "module.name"."""

    text: str


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary, as the pairs that were put into it: later ones count."""

    items: list[tuple[Value, Value]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Inert:
    """What a loader would make by calling `name` with `args`: items and state that it would be given included."""

    name: str
    args: Value
    items: list[tuple[Value, Value]] = field(default_factory=list)
    state: Value = None


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers of one dtype ("" where bytes are meant) that lie elsewhere in the file, under `key`; `count` of them."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor: `shape` numbers of `dtype` in a storage, from its element `offset` on, `strides` elements apart."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "",
}  # fmt: skip
"""Class of a storage -> its dtype (torch/storage.py, `_new_dtype_to_storage_type_map`)."""
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""torch's dtypes, which tensors without a storage class of their own name."""


@dataclass(frozen=True)
class Walk:
    """The object that a pickle describes, the names it would have called, and the storages it speaks of."""

    value: Value
    called: Mapping[str, None]
    storages: Mapping[str, Storage]


def walk(stream: BytesIO) -> Walk:
    """Read one pickle; `stream` is left at its end.

    Raises FormatError.
    """
    machine = _Machine()
    opcodes = pickletools.genops(stream)
    try:
        for _, (opcode, argument, _) in zip(range(MAX_OPCODES), opcodes, strict=False):
            if opcode.name == "STOP":
                return Walk(machine.pop(), machine.called, machine.storages)
            step = STEPS.get(opcode.name)
            if step is None:
                raise FormatError(f"holds a pickle with the opcode {opcode.name}, which torch.save does not write")
            step(machine, argument)
    except FormatError:
        raise
    except (IndexError, KeyError) as error:
        raise FormatError("holds a pickle that takes more from its stack than there is") from error
    except ValueError as error:
        raise FormatError("holds a pickle that is cut short, or no pickle") from error
    raise FormatError(f"holds a pickle of over {MAX_OPCODES} opcodes, which no checkpoint needs")


class _Machine:
    """The stack of a pickle, what it memorised, and the names it would have called."""

    def __init__(self) -> None:
        self.stack: list[Value] = []
        self.marks: list[list[Value]] = []
        self.memo: dict[int, Value] = {}
        self.called: dict[str, None] = {}
        self.storages: dict[str, Storage] = {}

    def push(self, value: Value) -> None:
        self.stack.append(value)

    def pop(self) -> Value:
        return self.stack.pop()

    def mark(self) -> None:
        if len(self.marks) == MAX_MARKS:
            raise FormatError(f"holds a pickle with over {MAX_MARKS} marks within one another")
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Value]:
        """What was pushed since the last mark."""
        values = self.stack
        self.stack = self.marks.pop()
        return values

    def take(self, count: int) -> tuple[Value, ...]:
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def remember(self, index: int) -> None:
        if not 0 <= index < MAX_OPCODES:
            raise FormatError(f"holds a pickle that memorises under the number {quote(index)}")
        self.memo[index] = self.stack[-1]

    def append(self, values: list[Value]) -> None:
        """Give the values to the list, or to what a list would be in a loader."""
        target = self.stack[-1]
        if isinstance(target, list):
            target += values
        elif isinstance(target, Inert):
            target.items += enumerate(values, len(target.items))
        else:
            raise FormatError("holds a pickle that appends to what is no list")

    def set_items(self, values: list[Value]) -> None:
        """Give the keys and values, by turns, to the dictionary, or to what would be one in a loader."""
        target = self.stack[-1]
        if not isinstance(target, Pairs | Inert) or len(values) % 2:
            raise FormatError("holds a pickle that sets items of what is no dictionary")
        target.items += zip(values[::2], values[1::2], strict=True)

    def build(self, state: Value) -> None:
        """Give an object its state."""
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, Pairs | Stored):  # an OrderedDict's attributes, such as _metadata
            raise FormatError("holds a pickle that gives a state to what is no object")

    def call(self, function: Value, args: Value) -> Value:
        """What `function` would return, where it is known; else the call itself, as data."""
        if not isinstance(function, Name):  # a class that is itself the result of a call
            return Inert("", args)
        if known := CALLS.get(function.text):
            if not isinstance(args, tuple):
                raise FormatError(f"holds a pickle that calls {quote(function.text)} without arguments")
            try:
                return known(*args)
            except TypeError as error:
                raise FormatError(f"holds a pickle that calls {quote(function.text)} in a way that fails") from error
        if len(self.called) < MAX_CALLED:
            self.called[function.text] = None
        return Inert(function.text, args)


def _storage(identity: Value) -> Value:
    """What a persistent id stands for (torch/serialization.py, `persistent_load`)."""
    match identity:
        case ("module", Name() as kind, *_):
            return kind
        case ("storage", Name(text=kind), str(key), str(), int(count), *rest):
            if rest not in ([], [None]):
                raise FormatError("holds views of storages as PyTorch before 0.4 wrote them: save it with a newer one")
            module, _, name = kind.rpartition(".")
            if module not in ("torch", "torch.cuda", "torch.storage") or name not in STORAGES:
                # quantised, or complex in 128 bits: what is made of it is named where it is
                return Inert(kind, identity)
            return Storage(STORAGES[name], key, _count(count))
    raise FormatError(f"holds a pickle with the reference {quote(type(identity).__name__)}, which names no storage")


def _reference(machine: _Machine, _: None) -> None:
    found = _storage(machine.pop())
    if isinstance(found, Storage) and machine.storages.setdefault(found.key, found) != found:
        raise FormatError(f"describes the storage {quote(found.key)} in two ways")
    machine.push(found)


def _count(number: Value) -> int:
    if type(number) is not int or not 0 <= number <= MAX_COUNT:
        raise FormatError(f"gives a tensor the number {quote(number)}, not one from 0 to 2^63 - 1")
    return number


def _counts(numbers: Value) -> tuple[int, ...]:
    if not isinstance(numbers, tuple | list) or len(numbers) > MAX_DIMENSIONS:
        raise FormatError("gives a tensor a shape or strides that are no list of numbers")
    return tuple(map(_count, numbers))


def _tensor(storage: Value, offset: Value, shape: Value, strides: Value, *_: Value) -> Value:
    """`_rebuild_tensor`, `_rebuild_tensor_v2`: requires_grad and hooks follow."""
    if not isinstance(storage, Storage) or not storage.dtype:
        return Inert("torch._utils._rebuild_tensor_v2", (storage,))
    return _stored(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(storage: Value, offset: Value, shape: Value, strides: Value, *rest: Value) -> Value:
    """`_rebuild_tensor_v3`: the storage is of bytes, and the dtype follows requires_grad and hooks."""
    dtype = rest[2] if len(rest) > 2 else None
    kind = DTYPES.get(dtype.text.removeprefix("torch.")) if isinstance(dtype, Name) else None
    if not isinstance(storage, Storage) or kind is None:
        return Inert("torch._utils._rebuild_tensor_v3", (storage, dtype))
    return _stored(storage, kind, offset, shape, strides)


def _stored(storage: Storage, dtype: str, offset: Value, shape: Value, strides: Value) -> Stored:
    sizes, steps = _counts(shape), _counts(strides)
    if len(sizes) != len(steps):
        raise FormatError("gives a tensor a shape and strides of different lengths")
    return Stored(storage, dtype, _count(offset), sizes, steps)


def _typed(function: Value, _type: Value, args: Value, *_: Value) -> Value:
    """`_rebuild_from_type_v2`: a tensor with attributes in Python, or of a class of its own."""
    if isinstance(function, Name) and isinstance(args, tuple) and (known := TENSORS.get(function.text)):
        return known(*args)
    return Inert("torch._tensor._rebuild_from_type_v2", args)


def _first(value: Value, *_: Value) -> Value:
    return value


def _dictionary(*args: Value) -> Value:
    """A dictionary, empty or of a list of pairs as Python 2 wrote it."""
    pairs = Pairs()
    for item in args[0] if args and isinstance(args[0], list) else ():
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise FormatError("holds a pickle with a dictionary of what are no pairs")
        pairs.items.append((item[0], item[1]))
    return pairs


def _size(numbers: Value = ()) -> Value:
    return _counts(numbers)


TENSORS: dict[str, Callable[..., Value]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
}
SCRIPTED = tuple(
    f"jit._pickle.{name}"
    for name in ("restore_type_tag", "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
)
"""The functions by which TorchScript archives write lists, named from torch on."""
CALLS: dict[str, Callable[..., Value]] = (
    TENSORS
    | {f"torch.{name}": _first for name in SCRIPTED}
    | {
        "torch._tensor._rebuild_from_type_v2": _typed,
        "torch.nn.parameter.Parameter": _first,
        "torch.Size": _size,
        "collections.OrderedDict": _dictionary,
        "collections.defaultdict": lambda *_: Pairs(),
    }
)
"""What is done for the functions that are known: `call` never calls any other."""


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.push(Name(f"{module}.{name}"))


def _stack_global(machine: _Machine, _: None) -> None:
    module, name = machine.take(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise FormatError("holds a pickle that names a global by what is no text")
    machine.push(Name(f"{module}.{name}"))


def _reduce(machine: _Machine, _: None) -> None:
    function, args = machine.take(2)
    machine.push(machine.call(function, args))


def _new_object_ex(machine: _Machine, _: None) -> None:
    kind, args, _keywords = machine.take(3)
    machine.push(machine.call(kind, args))


def _instance(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.push(machine.call(Name(f"{module}.{name}"), tuple(machine.pop_mark())))


def _object(machine: _Machine, _: None) -> None:
    kind, *args = machine.pop_mark()
    machine.push(machine.call(kind, tuple(args)))


def _pop(machine: _Machine, _: None) -> None:
    if machine.stack:
        machine.pop()
    else:
        machine.pop_mark()


def _dict(machine: _Machine, _: None) -> None:
    values = machine.pop_mark()
    machine.push(Pairs())
    machine.set_items(values)


LITERALS = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(LITERALS, _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_DICT": lambda machine, _: machine.push(Pairs()),
    "MARK": lambda machine, _: machine.mark(),
    "POP": _pop,
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "LIST": lambda machine, _: machine.push(machine.pop_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.pop_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.push(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.take(3)),
    "DICT": _dict,
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items(list(machine.take(2))),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "PUT": lambda machine, index: machine.remember(index),
    "BINPUT": lambda machine, index: machine.remember(index),
    "LONG_BINPUT": lambda machine, index: machine.remember(index),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    "GET": lambda machine, index: machine.push(machine.memo[index]),
    "BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_ex,
    "INST": _instance,
    "OBJ": _object,
    "BUILD": lambda machine, _: machine.build(machine.pop()),
    "BINPERSID": _reference,
}
"""What every allowed opcode does to the machine, with its argument; any other ends the walk."""
