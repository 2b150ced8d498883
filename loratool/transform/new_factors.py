"""Describe modules of an adapter that is in no file yet: new factors, and tensors that replace the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.formats.peft import Peft
from ..adapters.formats.peft_config import parse_config
from ..adapters.updates.experts import Experts
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.update import Stack, UpdateSpec
from ..adapters.weight_kinds import WEIGHT_KINDS
from ..architectures.prefixes import module_path
from ..files.dtypes import TensorSpec
from ..files.weights_file import WeightsFile
from .lazy import LazyFile, Made


def factored_update(
    kind: str, path: str, wrapper: str, sides: tuple[TensorSpec, TensorSpec], scale: float, experts: int, bare: bool
) -> UpdateSpec:
    """Return the update of new factors.

    Args:
        kind: a key of WEIGHT_KINDS.
        path: of the weight, with the names of the class.
        wrapper: the path of the PEFT layer with the factors.
        sides: the specs of A and B as they are saved.
        experts: the number of matrices.
        bare: PEFT wraps the weight as a parameter.
    """
    keys = (f"{wrapper}.{key}" for key in WEIGHT_KINDS[kind].keys)
    stack = kind.startswith("experts")
    return UpdateSpec(
        Experts if stack else LowRank,
        path if stack else module_path(path) if bare else wrapper,
        dict(zip("AB", keys, strict=True)),
        dict(zip("AB", sides, strict=True)),
        scale,
        transposed=True if kind == "embedding" else None,
        detail=Stack(experts) if stack else None,
        parameter=bare and not stack,
    )


def replaced_update(path: str, key: str, spec: TensorSpec) -> UpdateSpec:
    """Return the update of a tensor that replaces the base's. path: of the tensor; key: its name in PEFT's file."""
    return UpdateSpec(ReplaceTensor, module_path(path), {"value": key}, {"value": spec})


def new_adapter(name: str, like: WeightsFile, planned: Mapping[str, Made], fields: Mapping[str, Any]) -> Adapter:
    """Return a new adapter.

    Args:
        like: the source file, as in `VirtualFile`.
        planned: its modules.
        fields: of PEFT's config.
    """
    updates = {module: plan.update for module, plan in planned.items()}
    config = parse_config(name, fields, None)
    return Adapter(name, Peft.key, LazyFile(like, {}, planned, {}, {}), config, updates)
