"""Small pairs of models, and the patches of loratool between them as the naive reader of the same dialect sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from lib.oracles.naive_dialects import Model, like, raw
from torch import Tensor

from loratool.files.dtypes import TORCH_DTYPES, TensorSpec
from loratool.patches.dialects.patch import TensorPair
from loratool.patches.dialects.table import open_foreign_patch


def spec_of(x: Tensor) -> TensorSpec:
    name = TORCH_DTYPES[str(x.dtype).removeprefix("torch.")]
    assert name
    return TensorSpec(name, tuple(x.shape))


def models(dtypes: str = "bfloat16", seed: int = 0) -> tuple[Model, Model]:
    """Return a base and a target: a tensor alike, one with few changes, one with all, an empty one and a scalar."""
    g = torch.Generator().manual_seed(seed)
    base: Model = {}
    for dtype in dtypes.split():
        kind = getattr(torch, dtype)

        def made(*shape: int, kind: torch.dtype = kind) -> Tensor:
            count = int(torch.tensor(shape).prod())
            width = torch.empty(0, dtype=kind).element_size()
            data = torch.randint(0, 256, (max(1, count) * width,), generator=g, dtype=torch.uint8)
            return data.view(kind)[:count].reshape(shape)

        base |= {f"{dtype}.same": made(5, 7), f"{dtype}.few": made(64, 33), f"{dtype}.all": made(9, 3)}
        base |= {f"{dtype}.empty": made(0, 4), f"{dtype}.scalar": made(1).reshape(())}
    target = dict(base)
    for name, x in base.items():
        data = bytearray(raw(x))
        if name.endswith(".few"):
            for place in torch.randint(0, len(data), (40,), generator=g).tolist():
                data[place] ^= 0x15
            data[0] ^= 1
            data[-1] ^= 128
        elif name.endswith((".all", ".scalar")):
            data = bytearray(each ^ 0x55 for each in data)
        target[name] = like(bytes(data), x)
    return base, target


def without_nan(pair: tuple[Model, Model]) -> tuple[Model, Model]:
    return tuple({n: torch.nan_to_num(x.float(), 1.5, 2.5, 3.5).to(x.dtype) for n, x in m.items()} for m in pair)  # type: ignore[return-value]


def cut(data: bytes, size: int) -> Iterator[memoryview]:
    """Yield bytes in pieces, each of which overwrites the one before, as the readers of files do."""
    buffer = bytearray(min(size, len(data)))
    for first in range(0, len(data), size):
        part = data[first : first + size]
        buffer[: len(part)] = part
        yield memoryview(buffer)[: len(part)]


def pairs(base: Model, target: Model, size: int = 1 << 24) -> Iterator[TensorPair]:
    for name in dict.fromkeys((*base, *target)):
        old, new = base.get(name), target.get(name)
        yield TensorPair(
            name,
            None if old is None else spec_of(old),
            None if new is None else spec_of(new),
            lambda old=old: cut(raw(old), size),  # type: ignore[misc]
            lambda new=new: cut(raw(new), size + 1),  # type: ignore[misc]
        )


def applied(path: Path, base: Model, allow: Any = (), size: int = 1 << 24) -> Model:
    """Apply a patch of a dialect to a model in memory."""
    with closing(open_foreign_patch(path)) as patch:
        changes = patch.require({name: spec_of(x) for name, x in base.items()}, allow)
        out = dict(base)
        for name, change in changes.items():
            pieces = change.verified(cut(raw(base[name]), size), spec_of(base[name]))
            out[name] = like(b"".join(bytes(piece) for piece in pieces), base[name])
        return out
