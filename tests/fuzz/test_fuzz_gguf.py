"""Hold the reader of GGUF against files that lie, and against gguf-py's word on each.

gguf-py checks little: it takes a file whose tensors overlap, or whose type has no meaning, and ours refuses those. But
where both take a file they must see the same tensors with the same bytes, and what ours takes gguf-py must take too.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import factors, write_peft
from damages import damaged_bytes
from fuzzing import Case, Fuzzer, Ran
from gguf_lies import build, fields, one_lie, tensors

from loratool.files.containers.gguf_file import GgufFile

gguf = pytest.importorskip("gguf", reason="gguf-py is the judge")

pytestmark = pytest.mark.fuzz

HEADER = 2200  # bytes that most damages are in

VALUES = (
    0, -1, (1 << 31) - 1, (1 << 32) - 1, 2.5, math.nan, math.inf, True, "x", "", [], [1], ["a"], [1.5] * 3, "\x1b[31m",
    b"\xff\xfe", "x" * 5000, [0] * 9, 1, 2, 3, 64,
)  # fmt: skip
KEYS = (
    "general.alignment split.count split.no split.tensors.count general.quantization_version general.architecture "
    "llama.expert_count llama.rope.dimension_count llama.attention.key_length llama.rope.scaling.type loratool"
).split()
NAMES = (
    "../x", "/etc/passwd", "a\0b", "\x1b[31mred", "x" * 4096, "x" * 64, "x" * 63, "", b"\xff\xff", "__metadata__",
    "x\n y", "blk.99999999999999999999.attn_q.weight", "blk.-1.attn_q.weight", "blk.0.attn_q.weight ",
    "blk.0.attn_q.bias", "BLK.0.ATTN_Q.WEIGHT", "blk.1.attn_q.weight", "blk.00.attn_q.weight",
    "rope_freqs.weight", "token_embd.weight",
)  # fmt: skip
SHAPES = (
    (), (0,), (0, 32), (1, 1, 1, 1), (1 << 40, 1 << 40), (1 << 31, 1 << 31, 4), (32, 0, 1 << 62), (1 << 62, 2),
    (1,) * 5, (1 << 21, 1 << 21, 1 << 22), (32, 32), (64, 32),
)  # fmt: skip
TYPES = (0, 1, 2, 3, 8, 12, 13, 14, 24, 28, 30, 39, 40, 99)


def damaged(rng: random.Random) -> bytes:
    """Return a file of the small llama with one kind of damage."""
    F, T, alignment = dict(fields()), [*tensors().items()], 32
    at = rng.randrange(len(T))
    name, (kind, shape, content) = T[at]
    match rng.randrange(9):
        case 0 | 1 | 2:
            return build(F, dict(T), one_lie(rng))
        case 3:
            whole = build(F, dict(T))
            return damaged_bytes(rng, whole[:HEADER]) + whole[HEADER:]
        case 4:
            whole = build(F, dict(T))
            return whole[: rng.randrange(len(whole))] + rng.choice((b"", b"\0", bytes(40), whole))
        case 5:
            key = rng.choice([*F, *KEYS])
            F[rng.choice((key, key, key, key.upper(), ""))] = rng.choice(VALUES)
        case 6:
            alignment = rng.choice((0, 1, 2, 3, 8, 16, 33, 64, 4096, 1 << 20, 1 << 30, 1 << 31, -32))
            F["general.alignment"] = alignment
        case 7:
            T[at] = rng.choice(NAMES), T[at][1]
        case 8:
            more = (shape, (1, *shape), (*shape, 1), shape[::-1], tuple(2 * size for size in shape))
            T[at] = name, (rng.choice((kind, kind, *TYPES)), rng.choice((*SHAPES, *more)), content)
    if rng.random() < 0.15:
        rng.shuffle(T)
    if rng.random() < 0.05:
        T = T[: rng.randrange(len(T))]
    return build(F, dict(T), alignment=alignment if 0 < alignment <= 4096 else 32)


@cache
def adapter() -> dict[str, bytes]:
    """Return an adapter of the llama."""
    import tempfile

    names = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 64)}
    with tempfile.TemporaryDirectory() as folder:
        made = {f"model.layers.0.{name}": factors(*shape, 2) for name, shape in names.items()}
        write_peft(Path(folder), made)
        return {f"adapter/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}


# Command -> what it writes
COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("inspect", "m.gguf"): (),
    ("merge", "m.gguf", "adapter", "-o", "out.gguf"): ("out.gguf", "out.undo"),
    ("merge", "m.gguf", "adapter", "-o", "out.gguf", "--quantized", "requantize"): ("out.gguf", "out.undo"),
    ("merge", "m.gguf", "adapter", "-o", "out.gguf", "--no-undo", "--json"): ("out.gguf",),
    ("convert", "m.gguf", "-o", "out"): ("out",),
    ("convert", "adapter", "--to", "gguf", "--base", "m.gguf", "-o", "out.gguf"): ("out.gguf",),
    ("extract", "m.gguf", "base.gguf", "--rank", "1", "-o", "out"): ("out",),
    ("diff", "m.gguf", "base.gguf"): (),
    ("verify", "base.gguf", "adapter", "m.gguf"): (),
    ("unmerge", "m.gguf", "adapter", "--approximate", "-o", "out.gguf"): ("out.gguf",),
    ("init", "m.gguf", "--rank", "1", "-o", "out"): ("out",),
    ("count", "m.gguf", "--json"): (),
}


def make_file(rng: random.Random) -> Case:
    return Case({"m.gguf": damaged(rng)}, ("inspect", "m.gguf", "--json"))


def make_case(rng: random.Random) -> Case:
    argv, outputs = rng.choice([*COMMANDS.items()])
    files = {"m.gguf": damaged(rng), **(adapter() if "adapter" in argv else {})}
    if "base.gguf" in argv:
        files["base.gguf"] = build(fields(), tensors())
    return Case(files, argv, outputs)


def make_split(rng: random.Random) -> Case:
    """Split the model into two files whose fields, names and tensors do not always agree."""
    every, at, names = (
        [*tensors().items()],
        rng.choice((6, 6, 5, 12)),
        ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
    )
    numbers = (0, 1, 2, 3, -1, (1 << 32) - 1, 99_999, 2.0, "2", True, [2], math.nan)
    own = [{"split.no": i, "split.count": 2, "split.tensors.count": len(every)} for i in range(2)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        part = rng.choice(own)
        part[rng.choice([*part])] = rng.choice(numbers)
    if rng.random() < 0.15:
        names = rng.choice(
            (["m-00001-of-00003.gguf", names[1]], [names[0], "x.gguf"], names[::-1], ["m.gguf", names[1]])
        )
    parts = [build({**fields(), **own[0]}, dict(every[:at])), build(own[1], dict(every[rng.choice((at, at, 5, 12)) :]))]
    if rng.random() < 0.2:
        parts[1] = damaged_bytes(rng, parts[1])
    files = dict(zip(names, parts, strict=True))
    argv, outputs = rng.choice(
        (
            (("inspect", names[0]), ()),
            (("inspect", "."), ()),
            (("merge", names[0], "adapter", "-o", "out"), ("out",)),
            (("merge", names[0], "adapter", "-o", "out.gguf"), ("out.gguf", "out.undo")),
            (("convert", names[0], "-o", "out"), ("out",)),
        )
    )
    return Case({**files, **(adapter() if "adapter" in argv else {})}, argv, outputs)


def seen_by_gguf_py(path: Path) -> dict[str, list[Any]]:
    """Return of each tensor its type, first byte and a hash of its bytes, as gguf-py's reader has them."""
    reader = gguf.GGUFReader(path)
    return {
        each.name: [each.tensor_type.name, int(each.data_offset), hashlib.sha1(each.data.tobytes()).hexdigest()]
        for each in reader.tensors
    }


def seen_by_us(path: Path) -> dict[str, list[Any]]:
    file = GgufFile(path)
    return {
        name: [spec.dtype, file.begin[name], hashlib.sha1(bytes(file.read(name))).hexdigest()]
        for name, spec in file.specs.items()
    }


def agree(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    """Tell where gguf-py sees other tensors than we do, or refuses a file that we take."""
    if ran.code not in (0, 1):
        return
    path = work / "m.gguf"
    ours = seen_by_us(path)
    try:
        theirs = seen_by_gguf_py(path)
    except Exception as error:
        if "tuple index out of range" not in str(error):  # a single number of BF16, which has no dimensions
            yield f"gguf-py refuses it, and we do not: {error}"
        return
    if ours != theirs:
        yield f"we see {ours}, and gguf-py {theirs}"


def written(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    """Tell which output gguf-py does not read."""
    for name in case.outputs if ran.code == 0 else ():
        if name.endswith(".gguf") and (work / name).exists():
            try:
                seen_by_gguf_py(work / name)
            except Exception as error:
                yield f"gguf-py refuses {name}: {error}"


def test_gguf_headers(fuzz: Fuzzer) -> None:
    fuzz(make_file, 4, agree)


def test_gguf_in_commands(fuzz: Fuzzer) -> None:
    fuzz(make_case, 4, written)


def test_gguf_splits(fuzz: Fuzzer) -> None:
    fuzz(make_split, 4)
