"""Read the weights in a training state of DeepSpeed's ZeRO, stages 1 to 3, without torch or DeepSpeed.

The optimizer's files have the trained parameters in float32, as flat vectors. In stages 1 and 2 a group of parameters
is one vector, the concatenation of the ranks' parts. In stage 3 each parameter is cut into one equal part per rank,
and a rank's vector has its parts of all parameters. The model's files have the shapes, the buffers, and the parameters
that were not trained, in their own types. Defined by microsoft/DeepSpeed: `deepspeed/utils/zero_to_fp32.py`, and
`save_checkpoint` of `deepspeed/runtime/engine.py`.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..containers.torch_archive import TorchArchive
from ..containers.torch_pickle import MAX_RANK, SavedObject, SavedTensor, is_whole
from ..containers.torch_reader import is_name
from ..dtypes import DTYPES, TensorSpec
from ..weights_file import WeightsFile
from .sharded_file import Boxes, Chunk, ShardedFile, require_tiling

OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

LATER, EARLIER = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"  # stage 3, 1 and 2

# Files that a run with other parallelism than ZeRO's leaves beside -> its name
_OTHER = {
    "layer_*_expert_*_model_states.pt": "experts over several ranks",
    "expp_rank_*_optim_states.pt": "experts over several ranks",
    "layer_*-model_states.pt": "a pipeline of stages",
    "mp_rank_01_model_states.pt": "tensor parallelism",
}

_EXPERTS = ("ds_autoep_layers", "autoep_layers")  # of a model's state: experts are not in the vectors of all ranks

_RECORDS = frozenset(
    """deepspeed.runtime.fp16.loss_scaler.LossScaler deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler
    deepspeed.runtime.zero.config.ZeroStageEnum deepspeed.utils.tensor_fragment.fragment_address
    numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.core.multiarray._reconstruct
    numpy._core.multiarray._reconstruct numpy.ndarray numpy.dtype""".split()
)


@dataclass(frozen=True)
class _Vector:
    """A flat vector in a file."""

    file: WeightsFile
    dtype: str
    begin: int
    size: int


class _Row:
    """Vectors, concatenated."""

    def __init__(self, vectors: Sequence[_Vector]) -> None:
        dtypes = {vector.dtype for vector in vectors}
        if len(dtypes) != 1:
            raise ValueError(f"vectors of {len(dtypes)} types")
        self.dtype, self._vectors = dtypes.pop(), vectors
        self._stops = list(accumulate(vector.size for vector in vectors))
        self.size = self._stops[-1]

    def cut(self, first: int, count: int, offset: int = 0) -> list[Chunk]:
        """Return `count` numbers from `first` on, or fewer at the end, as chunks of a tensor from `offset` on."""
        chunks = []
        for index in range(bisect_right(self._stops, first), len(self._stops)):
            vector, start = self._vectors[index], self._stops[index] - self._vectors[index].size
            begin, end = max(first, start), min(first + count, self._stops[index])
            if begin >= end:
                break
            begin_byte = vector.begin + TensorSpec(vector.dtype, (begin - start,)).nbytes
            chunks.append(Chunk(vector.file, begin_byte, (offset + begin - first,), (end - begin,)))
        return chunks


class ZeroFile(ShardedFile):
    """ZeRO's folder of a step, opened by one of its optimizer's files.

    Raises:
        InputError: a file is missing or contradicts the others, or the run had parallelism other than ZeRO's.
    """

    file_format = "zero"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the step's folder, and its parent, which has a trainer's configs."""
        return self.path.parent, self.path.parent.parent

    def _find(self) -> dict[str, tuple[TensorSpec, Boxes]]:
        step = self.path.parent
        for pattern, what in _OTHER.items():
            if next(step.glob(pattern), None):
                raise self._refuse(f"is of a run with {what}, which is not read")
        optimizers = [self._archive(path, "optimizer_state_dict") for path in self._optimizer_files(step)]
        states = [archive.top["optimizer_state_dict"] for archive in optimizers]
        stage, world = _stage(states[0]), len(states)
        if stage not in (1, 2, 3):
            raise self._refuse(f"is of stage {stage}, and 1, 2 and 3 are read")
        stated = states[0]["partition_count"]  # of each group in stages 1 and 2
        counts = stated if type(stated) is list and stated else [stated]
        if not is_whole(*counts):
            raise ValueError("an invalid number of ranks")
        if other := next((count for count in counts if count != world), None):
            raise self._refuse(f"is of {other} ranks, and {world} of their files are here", "copy the whole folder")
        names = [LATER.format(rank) for rank in range(world)] if stage == 3 else [EARLIER]
        models = [self._archive(step / name, "module") for name in names]
        if any(models[0].top.get(key) for key in _EXPERTS):
            raise self._refuse("is of a run with experts over several ranks, which is not read")
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        parts = [
            [self._vector(archive, "a vector of parameters", tensor) for tensor in state[key]]
            for archive, state in zip(optimizers, states, strict=True)
        ]
        groups, paddings = models[0].top["param_shapes"], states[0].get("param_alignment_paddings")
        joined = list(_join_by_parameter(groups, parts) if stage == 3 else _join_by_group(groups, parts, paddings))
        tensors = dict(joined)
        if len(tensors) < len(joined):
            raise ValueError("a parameter is in two groups")
        tensors |= self._frozen(models)
        return self._others(models[0], tensors)

    def _refuse(self, why: str, remedy: str | None = None) -> InputError:
        return InputError(why, culprit=str(self.path.parent), remedy=remedy)

    def _optimizer_files(self, step: Path) -> list[Path]:
        """Return the optimizer's files by rank. Ranks may be missing; the caller compares the count."""
        matches = {path: OPTIMIZER.fullmatch(path.name) for path in step.iterdir()}
        ranks = sorted((int(match[2]), int(match[1]), path) for path, match in matches.items() if match)
        if ranks[-1][0]:
            raise self._refuse("is of a run with tensor parallelism, which is not read")
        if [rank for _, rank, _ in ranks] != list(range(len(ranks))):
            raise self._refuse(
                f"does not have one file for each of the ranks 0 to {ranks[-1][1]}", "copy the whole folder"
            )
        return [path for _, _, path in ranks]

    def _archive(self, path: Path, key: str) -> TorchArchive:
        part = self._part(path)
        archive = TorchArchive(path, part.file, 0, part.nbytes, _RECORDS)
        if type(archive.top) is not dict or type(archive.top.get(key)) is not dict:
            raise InputError(f"has no {key}, and is not of DeepSpeed", culprit=str(path))
        return archive

    def _vector(self, archive: TorchArchive, name: str, tensor: Any) -> _Vector:
        if type(tensor) is not SavedTensor:
            raise ValueError(f"{name} is not a tensor")
        spec, begin = archive.place(name, tensor)
        return _Vector(self._part(archive.path), spec.dtype, begin, spec.size)

    def _frozen(self, models: Sequence[TorchArchive]) -> dict[str, tuple[TensorSpec, Boxes]]:
        """Return the parameters that were not trained: cut over the ranks in stage 3, else complete."""
        frozen = {}
        for name, shape in (models[0].top.get("frozen_param_shapes") or {}).items():
            parts = [
                self._vector(model, name, (model.top.get("frozen_param_fragments") or {}).get(name)) for model in models
            ]
            frozen[name] = _tensor(name, shape, _Row(parts).cut(0, _numel(shape)), parts[0].dtype)
        self.frozen = frozenset(frozen)
        return frozen

    def _others(
        self, model: TorchArchive, tensors: dict[str, tuple[TensorSpec, Boxes]]
    ) -> dict[str, tuple[TensorSpec, Boxes]]:
        """Return `tensors` with the rest of the model's state: shared parameters, buffers, untrained parameters."""
        shared, buffers = model.top.get("shared_params") or {}, frozenset(_texts(model.top.get("buffer_names") or []))
        _texts(shared.values())
        trained = {*(tensors.keys() - self.frozen)}
        trained |= {name for name, to in shared.items() if to in trained}
        missing = []
        for name, tensor in model.top["module"].items():
            if type(tensor) is not SavedTensor or name in tensors or name in shared:
                continue
            vector = self._vector(model, name, tensor)
            if not vector.size and name not in buffers:  # of stage 3, a second name of a parameter that is not trained
                missing.append(name)
                continue
            tensors[name] = _tensor(name, tensor.shape, _Row([vector]).cut(0, vector.size), vector.dtype)
        missing += [name for name, to in shared.items() if to not in tensors]
        tensors |= {name: tensors[to] for name, to in shared.items() if to in tensors}
        if bad := next((name for name in tensors if not is_name(name)), None):
            raise ValueError(f"a tensor whose name {bad!a} is reserved or not text")
        self.frozen |= tensors.keys() - trained
        self.ignored = ("optimizer", *missing)
        return tensors


def _stage(state: Mapping[str, Any]) -> int:
    """Return ZeRO's stage; newer versions save it as an enum member."""
    stage = state["zero_stage"]
    value = stage.args[0] if type(stage) is SavedObject else stage
    return value if type(value) is int else 0


def _texts(values: Collection[Any]) -> Collection[str]:
    """Return the values; raise ValueError unless all are text, since nested tuples can take forever to hash."""
    if not all(type(value) is str for value in values):
        raise ValueError("a name that is not text")
    return values


def _numel(shape: Any) -> int:
    if type(shape) is not tuple or len(shape) > MAX_RANK or not is_whole(*shape) or math.prod(shape) >= 1 << 63:
        raise ValueError("an invalid shape")
    return math.prod(shape)


def _tensor(name: str, shape: tuple[int, ...], chunks: Sequence[Chunk], dtype: str) -> tuple[TensorSpec, Boxes]:
    spec = TensorSpec(dtype, shape)
    require_tiling(name, (spec.size,), [(chunk.offsets, chunk.sizes) for chunk in chunks])
    return spec, Boxes((spec.size,), DTYPES[dtype] // 8, chunks)


def _join_by_group(
    groups: Sequence[Mapping[str, Any]], parts: Sequence[Sequence[_Vector]], paddings: Sequence[Sequence[int]] | None
) -> Iterator[tuple[str, tuple[TensorSpec, Boxes]]]:
    """Yield the parameters of stages 1 and 2. Groups are padded to 2 x ranks; newer versions pad parameters too."""
    if uneven := next((len(vectors) for vectors in parts if len(vectors) != len(groups)), None):
        raise ValueError(f"a rank has {uneven} vectors, for {len(groups)} groups of parameters")
    for index, shapes in enumerate(groups):
        row, place = _Row([part[index] for part in parts]), 0
        gaps = paddings[index] if paddings else [0] * len(shapes)
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            if not is_whole(gap):
                raise ValueError(f"an invalid gap after {name}")
            yield name, _tensor(name, shape, row.cut(place, _numel(shape)), row.dtype)
            place += _numel(shape) + gap
        align = 2 * len(parts)
        if -(-place // align) != -(-row.size // align):
            raise ValueError(f"group {index} has {row.size} numbers, and its parameters {place}")


def _join_by_parameter(
    groups: Sequence[Mapping[str, Any]], parts: Sequence[Sequence[_Vector]]
) -> Iterator[tuple[str, tuple[TensorSpec, Boxes]]]:
    """Yield the parameters of stage 3: their parts are at the same place in every rank's vectors, concatenated."""
    rows, start = [_Row(vectors) for vectors in parts], 0
    if len({row.dtype for row in rows}) > 1:
        raise ValueError("the ranks have vectors of several types")
    for name, shape in (item for shapes in groups for item in shapes.items()):
        size = _numel(shape)
        share = -(-size // len(rows))
        places = [(row, rank * share) for rank, row in enumerate(rows)]
        chunks = [chunk for row, place in places for chunk in row.cut(start, min(share, size - place), place)]
        yield name, _tensor(name, shape, chunks, rows[0].dtype)
        start += share
    for row in rows:
        if start != row.size:
            raise ValueError(f"a rank has {row.size} numbers, and its parameters {start}")
