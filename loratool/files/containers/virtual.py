"""Virtual weights file, which is never written: its tensors are computed on access.

A command's result can be opened as an adapter this way, and be the input of another command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dtypes import TensorSpec
from ..weights_file import WeightsFile
from .safetensors_file import tensor_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    from ...numerics.arrays import Numbers


class VirtualFile(WeightsFile):
    """A weights file whose tensors `load` computes.

    Args:
        like: the source file, which lends its path and stamp; its owner closes it.
        stored: tensor -> its `stored_type`, where that differs from the tensor's type.
    """

    def __init__(
        self,
        like: WeightsFile,
        specs: Mapping[str, TensorSpec],
        load: Callable[[str], Numbers],
        metadata: Mapping[str, str],
        stored: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.file, self.nbytes = like.path, like.file, sum(spec.nbytes for spec in specs.values())
        self.stamp = like.stamp
        self.specs, self.begin, self.metadata = dict(specs), {}, dict(metadata)
        self._load, self._like, self._stored = load, like, stored or {}

    @property
    def members(self) -> Sequence[WeightsFile]:
        return self._like.members

    @property
    def folders(self) -> tuple[Path, ...]:
        return self._like.folders

    def close(self) -> None:
        self._like.close()

    def stored_type(self, name: str) -> str:
        return self._stored.get(name) or super().stored_type(name)

    def is_computed(self, name: str) -> bool:
        return True

    def read(self, name: str) -> memoryview:
        return tensor_bytes(self._load(name), self.specs[name])

    def read_bytes(self, name: str, first: int, out: memoryview) -> None:
        out[:] = self.read(name)[first : first + len(out)]

    def storage(self, name: str) -> str:
        return name

    def numbers(self, name: str) -> Numbers:
        return self._load(name)  # between two steps their form may be wider than the file's

    def read_numbers(self, name: str, first: int, out: npt.NDArray[Any]) -> None:
        self.read_bytes(name, first * out.itemsize, out.reshape(-1).view("u1").data)


def with_zero_columns(file: WeightsFile, name: str, columns: int) -> VirtualFile:
    """Return a file of one matrix of another, with zeros after its columns up to `columns`."""
    spec = file.specs[name]

    def load(name: str) -> Numbers:
        import numpy as np

        from ...numerics.arrays import Numbers

        stored = file.numbers(name)
        return Numbers(np.pad(stored.bits, ((0, 0), (0, columns - stored.shape[1]))), stored.form)

    return VirtualFile(file, {name: TensorSpec(spec.dtype, (spec.shape[0], columns))}, load, {})


def of_numbers(file: WeightsFile, values: Mapping[str, float]) -> VirtualFile:
    """Return a file of vectors of one float32 number each. file: the one that the numbers are from."""

    def load(name: str) -> Numbers:
        import numpy as np

        from ...numerics.arrays import Numbers

        return Numbers.of(np.array([values[name]], np.float32))

    return VirtualFile(file, dict.fromkeys(values, TensorSpec("F32", (1,))), load, {})
