"""Read the tensors that a torch pickle describes without running it, since a pickle is a program.

`pickletools` decodes its opcodes, and a small stack machine executes the few that build dicts, lists and tensors. It
imports nothing, and calls only the functions in `_CALLS`, which return descriptions. A reader of a format with its own
classes names them, and gets a `SavedObject` for each object. The time and memory of an opcode are proportional to its
bytes. `pickle.Unpickler` has no such bound even with `find_class` closed (the hash of a tuple of tuples, a large memo
index). The formats are in torch/serialization.py, and in torch/_utils.py for `_rebuild_*`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..dtypes import TORCH_DTYPES

MAX_PICKLE = 1 << 25  # bytes, some 200,000 tensors; also the limit of one read of a header

MAX_OPCODES = 4_800_000  # 150,000 tensors of 32 each

LARGE = ("MARK", "EMPTY_LIST", "EMPTY_DICT")  # 1 byte of a pickle, 80 of memory; 2 or 3 of a tensor's 32 opcodes

MAX_RANK = 64  # dimensions of a tensor, torch's limit

REMEDY = "load it where you trust it and save its state dict as safetensors"

# A pickle's storage types -> (torch's dtype, bytes per element). All newer dtypes are in untyped storages.
STORAGES = {
    "torch.FloatStorage": ("float32", 4), "torch.HalfStorage": ("float16", 2), "torch.DoubleStorage": ("float64", 8),
    "torch.LongStorage": ("int64", 8), "torch.IntStorage": ("int32", 4), "torch.ShortStorage": ("int16", 2),
    "torch.CharStorage": ("int8", 1), "torch.ByteStorage": ("uint8", 1), "torch.BoolStorage": ("bool", 1),
    "torch.BFloat16Storage": ("bfloat16", 2), "torch.ComplexFloatStorage": ("complex64", 8),
    "torch.ComplexDoubleStorage": ("complex128", 16), "torch.storage.UntypedStorage": ("uint8", 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle imports; the object is never imported."""

    name: str


@dataclass(eq=False, slots=True)
class SavedObject:
    """The arguments and state of an object whose class a format's reader knows by name; its code is never run.

    Instances compare by identity, so that they can be dict keys at no cost.
    """

    name: str
    args: tuple[Any, ...]
    state: Any = None  # a dict of its attributes, or the class's own form of them

    def field(self, name: str) -> Any:
        """Return an attribute; None if it is missing."""
        return self.state.get(name) if type(self.state) is dict else None


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements in the file that one or more tensors view."""

    key: str  # its entry's name in the zip, or an id in the legacy layout
    type: str  # a key of STORAGES
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * STORAGES[self.type][1]


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor as a view of a storage."""

    storage: Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    dtype: str  # a key of TORCH_DTYPES
    lazy: bool  # the values are the conjugated or negated stored ones

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


def is_whole(*values: Any) -> bool:
    """Return whether all values are integers that can be sizes or offsets."""
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _put(target: dict[Any, Any], key: Any, value: Any) -> None:
    """Set an item, hashing only text and small numbers: nested tuples, or colliding numbers, can take forever."""
    plain = type(key) in (str, SavedObject) or (type(key) is int and key.bit_length() < 60)
    target[key if plain else object()] = value


def _ordered_dict(pairs: Any = None) -> dict[Any, Any]:
    """Build an OrderedDict's items from Python 2's list of pairs, if given.

    The list is emptied: a pickle could pass it repeatedly, and the copies would fill the memory.
    """
    items: dict[Any, Any] = {}
    if pairs is not None:
        for key, value in pairs:
            _put(items, key, value)
        pairs.clear()
    return items


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: str = "") -> SavedTensor:
    """Describe the tensor of `_rebuild_tensor` or its `_v2`; `rest` is requires_grad, hooks, and perhaps metadata."""
    ranks = type(shape) is tuple and type(stride) is tuple and len(shape) == len(stride) <= MAX_RANK
    if not (type(storage) is Storage and ranks and is_whole(offset, *shape, *stride)):
        raise ValueError("a tensor without a storage, a shape or strides")
    return SavedTensor(storage, offset, shape, stride, dtype or STORAGES[storage.type][0], bool(rest[2:] and rest[2]))


def _rebuild_v3(*args: Any) -> SavedTensor:
    """Describe the tensor of `_rebuild_tensor_v3`: a dtype without a storage type precedes the metadata of `_v2`."""
    dtype = args[6].name.removeprefix("torch.")
    if dtype not in TORCH_DTYPES:
        raise ValueError("a tensor without a dtype")
    return _rebuild(*args[:6], *args[7:], dtype=dtype)


def rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Describe a tensor with its own attributes, which are ignored."""
    if type(kind) is not _Global or kind.name not in _TENSORS or type(args) is not tuple:
        raise ValueError("a tensor of another class")
    return _CALLS[function.name](*args)


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
    "torch.Size": lambda size=(): size,
    # objects beside the weights of a training checkpoint, which are ignored
    **dict.fromkeys(
        """torch.device torch.serialization._get_layout collections.Counter _codecs.encode
        builtins.set builtins.frozenset builtins.bytearray builtins.complex
        __builtin__.set __builtin__.frozenset __builtin__.bytearray __builtin__.complex""".split(),
        lambda *_: None,
    ),
}

# Classes that are dict keys beside the weights: Lightning 1.0 to 1.5 wrote callbacks this way, as in sd-v1-4.ckpt
_KEYS = {"pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"}

_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter")

_KNOWN = {*_CALLS, *STORAGES, *(f"torch.{name}" for name in TORCH_DTYPES), *_KEYS, *_TENSORS}


class Machine:
    """Pickle's stack machine with only the opcodes of `_OPS`. A mark pushes the stack onto `below`.

    Args:
        records: names of classes and functions that the reader knows; their results are `SavedObject`.
        most: bytes of a pickle.
        opcodes: the limit for all pickles. A third of them may write to the memo (8 of a tensor's 32 do), and an eighth
            may be in LARGE.
    """

    def __init__(
        self, path: Path, records: Collection[str] = (), most: int = MAX_PICKLE, opcodes: int = MAX_OPCODES
    ) -> None:
        self.path, self.records, self.most, self.opcodes = path, records, most, opcodes
        self.done = self.large = 0  # opcodes, and those of LARGE
        self.storages: dict[str, Storage] = {}

    def run(self, stream: Any) -> Any:
        """Return the object that the pickle at the stream's position describes, and move the stream to its end."""
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        for opcode, arg, position in pickletools.genops(stream):
            self.done += 1
            self.large += opcode.name in LARGE
            if self.done > self.opcodes or self.large > self.opcodes // 8:
                raise self._too_long()
            if position is not None and position > self.most:
                raise ValueError("the pickle has no end")
            if opcode.name in _LITERALS:
                self.stack.append(arg)
            elif opcode.name in _OPS:
                _OPS[opcode.name](self, arg)
            else:
                raise ValueError(f"opcode {opcode.name}, which a state dict does not need")
        return self.stack.pop()

    def put(self, number: int) -> None:
        if len(self.memo) > self.opcodes // 3:
            raise self._too_long()
        self.memo[number] = self.stack[-1]

    def _too_long(self) -> InputError:
        why = f"holds a larger pickle than is read, which is one of {self.opcodes:,} opcodes"
        return InputError(why, culprit=str(self.path), remedy=REMEDY)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def take(self, count: int) -> tuple[Any, ...]:
        return tuple([self.stack.pop() for _ in range(count)][::-1])

    def extend(self, kind: Any, items: Any) -> None:
        target = self.stack[-1]
        if type(target) is not kind:
            raise ValueError(f"items for something that is not a {kind.__name__}")
        if kind is list:
            target.extend(items)
        else:
            for key, value in zip(items[::2], items[1::2], strict=True):
                _put(target, key, value)

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is not text")
        if f"{module}.{name}" not in _KNOWN and f"{module}.{name}" not in self.records:
            shown = ascii(f"{module[:100]}.{name[:100]}")[1:-1]
            why = f"wants to run {shown}; a file of weights does not need that"
            raise InputError(why, culprit=str(self.path), remedy=REMEDY)
        self.push(_Global(f"{module}.{name}"))

    def call(self, function: Any, args: Any) -> None:
        known = type(function) is _Global and (function.name in _CALLS or function.name in self.records)
        if not known or type(args) is not tuple or len(args) > 16:
            raise ValueError("a call of something that is not a function")
        name = function.name
        self.push(SavedObject(name, args) if name in self.records else _CALLS[name](*args))

    def make(self, kind: Any, args: Any) -> None:
        """Push an object that is created without calling its class."""
        if type(kind) is not _Global or kind.name not in self.records or type(args) is not tuple:
            raise ValueError("an object of something that is not a class")
        self.push(SavedObject(kind.name, args))

    def build(self, state: Any) -> None:
        """Set the state of a record. The only other state is torch's `_metadata` of a dict, which is ignored."""
        if type(self.stack[-1]) is SavedObject:
            self.stack[-1].state = state
        else:
            self.extend(dict, ())

    def load(self, identity: Any) -> None:
        """Push the storage of a persistent id: ("storage", type, key, location, numel).

        The legacy layout adds a view of another storage. torch has not written views for years, so only None is read.
        """
        if type(identity) is not tuple or not (len(identity) == 5 or (len(identity) == 6 and identity[5] is None)):
            raise ValueError("a persistent id of unknown form, or a view of another storage")
        tag, kind, key, _, numel = identity[:5]
        if tag != "storage" or type(kind) is not _Global or kind.name not in STORAGES:
            raise ValueError("a storage of unknown type")
        storage = Storage(key, kind.name, numel)
        if type(key) is not str or not is_whole(numel) or self.storages.setdefault(key, storage) != storage:
            raise ValueError("a storage described in two ways, or not at all")
        self.push(storage)


# The opcodes of protocols 1 to 5 that containers need; torch itself cannot read its files in protocol 0.
_LITERALS = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES
    BINBYTES BINBYTES8 BYTEARRAY8""".split()
)

_OPS: dict[str, Callable[[Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, arg: None),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, arg: m.put(arg)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, arg: m.push(m.memo[arg])),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda m, arg: m.push(arg.encode("latin-1").decode())),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, arg: m.push([])),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, arg: m.extend(list, m.items())),
    "MEMOIZE": lambda m, arg: m.put(len(m.memo)),
    "NONE": lambda m, arg: m.push(None), "NEWTRUE": lambda m, arg: m.push(True),
    "NEWFALSE": lambda m, arg: m.push(False), "DUP": lambda m, arg: m.push(m.stack[-1]),
    "EMPTY_TUPLE": lambda m, arg: m.push(()), "EMPTY_DICT": lambda m, arg: m.push({}),
    "TUPLE": lambda m, arg: m.push(tuple(m.items())), "TUPLE1": lambda m, arg: m.push(m.take(1)),
    "TUPLE2": lambda m, arg: m.push(m.take(2)), "TUPLE3": lambda m, arg: m.push(m.take(3)),
    "MARK": lambda m, arg: m.mark(), "POP_MARK": lambda m, arg: m.items(),
    "POP": lambda m, arg: m.stack.pop() if m.stack else m.items(),
    "APPEND": lambda m, arg: m.extend(list, m.take(1)), "SETITEM": lambda m, arg: m.extend(dict, m.take(2)),
    "SETITEMS": lambda m, arg: m.extend(dict, m.items()), "FROZENSET": lambda m, arg: m.push(m.items()),
    "GLOBAL": lambda m, arg: m.find(*arg.split(" ", 1)), "STACK_GLOBAL": lambda m, arg: m.find(*m.take(2)),
    "REDUCE": lambda m, arg: m.call(*m.take(2)), "BINPERSID": lambda m, arg: m.load(m.stack.pop()),
    "NEWOBJ": lambda m, arg: m.make(*m.take(2)), "BUILD": lambda m, arg: m.build(m.stack.pop()),
}  # fmt: skip
