"""Define a kind of update that no one has, in one class and one row: D[i, j] = scale * c[(i - j) mod n]."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.adapters.config import AdapterConfig
from loratool.adapters.updates import UPDATES
from loratool.adapters.updates.update import PeftMethod, RowsOfDelta, Update, UpdateSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Circulant(Update):
    """A circulant matrix, of which the file has the first column."""

    column: Tensor  # (n,)
    scale: float

    kind = "circulant"
    roles = ("circ",)
    suffixes: ClassVar = {".circ": "circ"}
    peft = PeftMethod("CIRC", {"circ": "circ"}, "circ_alpha")

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["circ"].shape * 2

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        return replace(spec, scale=config.scale_of(spec.module, 1))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Tensor]) -> Update:
        return cls(tensors["circ"], spec.scale)

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta:
        from loratool.numerics.stored import Stored

        whole = circulant(self.column)
        whole = whole.T.contiguous() if transposed else whole
        return lambda start, stop: Stored(whole[start:stop], weight * self.scale)


def circulant(column: Any) -> Any:
    """Return the matrix, (n, n)."""
    import torch

    n = len(column)
    return column[(torch.arange(n)[:, None] - torch.arange(n)) % n]


if __name__ == "__main__":  # the command lines that stdin has as JSON, with the row in the table
    UPDATES[Circulant.kind] = Circulant

    from conftest import run_command

    found = [run_command(*command) for command in json.load(sys.stdin)]
    print(json.dumps([[each.exit_code, each.stdout, each.stderr] for each in found]))
