"""Define the seam of a codec: how the tensors that a file stores make up one weight, a matrix of numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..dtypes import TensorSpec
from ..weights_file import WeightsFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file has it: the bytes of its type."""

    file: WeightsFile
    name: str

    @property
    def spec(self) -> TensorSpec:
        return self.file.specs[self.name]

    def read(self, first: int, out: torch.Tensor) -> None:
        """Read numbers of the stored type into `out`, which is contiguous, from the number `first` on."""
        self.file.read_numbers(self.name, first, out)


@dataclass(frozen=True)
class StoredWeight:
    """The stored tensors that make up one weight."""

    codec: Codec
    spec: TensorSpec  # of the weight: its shape, and "F64", or a narrower type that holds all its numbers
    tensors: tuple[str, ...]  # names, the codes first; what the others are is their order's matter, or their names'


class Codec(ABC):
    """Stored tensors <-> one weight, whose numbers are those that the format's formula gives in float64.

    A weight's numbers are counted as they lie in its shape, the last dimension fastest. `columns` of them are a row,
    the least that is decoded.
    """

    key: ClassVar[str]  # the name in CODECS, in undo files, messages and reports
    dtypes: ClassVar[frozenset[str]] = frozenset()  # types whose tensors are weights of this codec by themselves
    numbers: ClassVar[str] = "float64"  # torch's name of the type that rows are decoded to
    encodes: ClassVar[bool] = False  # whether `encode` can be called, without which no merge of a weight is undone

    def claims(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, StoredWeight]:
        """Return the weights that are stored in several tensors, or told by name or config, by their logical names.

        Args:
            config: config.json.
            specs: the tensors that no codec before this one has claimed.
        """
        return {}

    def columns(self, spec: TensorSpec) -> int:
        """Return the numbers of a row of a weight: of its last dimension, unless a codec decodes more or fewer."""
        return spec.shape[-1]

    @abstractmethod
    def read_rows(self, stored: Sequence[StoredTensor], start: int, out: torch.Tensor) -> None:
        """Decode rows from `start` on into `out`, the same bits on every machine.

        Args:
            stored: in the order of `StoredWeight.tensors`.
            out: (rows, columns), contiguous, on the CPU, of the type `numbers`.
        """

    def encode(self, companions: Sequence[StoredTensor], start: int, rows: torch.Tensor) -> torch.Tensor:
        """Return the codes nearest to rows from `start` on, the same on every machine; only if `encodes`.

        An undo file keeps the companions and the differences of the codes to these, so that what is not nearest costs
        bytes and nothing else. Rows must then be parts of the last dimension, and their codes lie one after the other.

        Args:
            companions: the stored tensors but the codes.
            rows: (rows, columns) in float64; inf and nan may be among them.

        Returns:
            The codes of the rows as the file has them: of the stored type, contiguous, row by row.

        Raises:
            TypeError: the codec does not encode. A merge asks `encodes` first.
        """
        raise TypeError(f"{self.key} does not encode")
