"""A file of weights that is not written: tensors made when they are asked for, under the names that it would have.

What a verb makes of an adapter can so be opened as one, and be the next verb's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .dtypes import TensorSpec
from .safetensors_file import tensor_bytes
from .weights_file import WeightsFile

if TYPE_CHECKING:
    import torch


class VirtualFile(WeightsFile):
    """like: the file that it is made of, whose path and hash it has and which its owner closes."""

    def __init__(
        self,
        like: WeightsFile,
        specs: Mapping[str, TensorSpec],
        load: Callable[[str], torch.Tensor],
        metadata: Mapping[str, str],
    ) -> None:
        self.path, self.file, self.nbytes = like.path, like.file, sum(spec.nbytes for spec in specs.values())
        self.stamp = like.stamp
        self.specs, self.begin, self.metadata = dict(specs), {}, dict(metadata)
        self._load = load

    def read(self, name: str) -> memoryview:
        return tensor_bytes(self._load(name), self.specs[name])

    def tensor(self, name: str) -> torch.Tensor:
        return self._load(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._load(name).reshape(self.specs[name].shape[0], -1)[start:stop]
