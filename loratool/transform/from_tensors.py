"""Make an adapter of factors in memory, to be converted and written as one that was opened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.config import AdapterConfig
from ..adapters.formats import FORMATS
from ..adapters.formats.format import Format
from ..adapters.formats.peft import Peft
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import UpdateSpec
from ..architectures.roles import weight_role
from ..files.containers.virtual import VirtualFile
from ..files.dtypes import TensorSpec
from ..files.weights_file import WeightsFile
from ..numerics.arrays import Numbers


class _InMemory(VirtualFile):
    """Tensors in memory as a weights file."""

    def __init__(self, tensors: Mapping[str, Numbers]) -> None:
        self.path, self.stamp, self.begin, self.metadata = Path(os.devnull), (), {}, None
        self.specs = {name: TensorSpec(x.form.name, x.shape) for name, x in tensors.items()}
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())
        self.file, self._load, self._stored = BytesIO(), tensors.__getitem__, {}

    @property
    def members(self) -> Sequence[WeightsFile]:
        return ()

    @property
    def folders(self) -> tuple[Path, ...]:
        return ()

    def close(self) -> None:
        """Do nothing: the tensors are the caller's."""


def adapter_of(
    modules: Mapping[str, tuple[Numbers, Numbers, float]], format: Format, base_model: str | None
) -> Adapter:
    """Return an adapter of these factors, as if it were opened from a file of the format; of PEFT's for GGUF's."""
    format = FORMATS[Peft.key] if format.can.named_by_model else format
    tensors, updates = dict[str, Numbers](), dict[str, UpdateSpec]()
    for module, (A, B, scale) in modules.items():
        is_embedding = weight_role(module, 2, True) == "embedding"
        sort = "embedding_" if is_embedding and "embedding_A" in format.ends else ""
        names = {side: format.tensor_name(module, sort + side) for side in "AB"}
        tensors |= {names["A"]: A, names["B"]: B.reshape(*B.shape[:2], *(1 for _ in A.shape[2:]))}
        specs = {side: TensorSpec(tensors[name].form.name, tensors[name].shape) for side, name in names.items()}
        updates[module] = UpdateSpec(LowRank, module, names, specs, scale, transposed=is_embedding or None)
    config = AdapterConfig(base_model=base_model)
    return Adapter("modules", format.key, _InMemory(tensors), config, updates, format.flattened)
