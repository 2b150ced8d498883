"""An adapter as a lazy mapping from module path to update, whatever its format.

All of it comes from headers, the config and scalar alphas, so that plans, binding and `inspect` need no
torch; `Adapter.load` reads one update's tensors.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .errors import InputError, NeedsFlag
from .fileio import sha256_file
from .tensorfile import TensorFile, TensorSpec
from .updates import UPDATES, LowRank


@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT's `adapter_config.json` says of rank and scale; `extra` keeps every other field.

    `rank` and `alpha` are None where the file does not say.
    """

    rank: int | None = None
    alpha: float | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool | None = None
    base_model: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, module: str) -> int | None:
        rank: int | None = match_pattern(self.rank_pattern, module, self.rank)
        return rank

    def scale_of(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023); never a guess where alpha is missing."""
        alpha: float | None = match_pattern(self.alpha_pattern, module, self.alpha)
        if alpha is None:
            raise NeedsFlag(
                "the adapter does not say its alpha",
                culprit=module,
                remedy="pass --alpha with the value it was trained with",
            )
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def match_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches, as PEFT decides it (`peft/utils/other.py:get_pattern_key`).

    A pattern is a regular expression, anchored at the end and, on the left, at a dot or the start.
    """
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"is not a regular expression: {error}", culprit=pattern) from error
    return default


@dataclass(frozen=True)
class UpdateSpec:
    """One update before its tensors are read: `tensors` maps a role (A, B) to a name in the adapter's file."""

    kind: str
    module: str
    tensors: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    scale: float

    @property
    def rank(self) -> int:
        return self.specs["A"].shape[0]

    @property
    def out_in(self) -> tuple[int, int]:
        return self.specs["B"].shape[0], self.specs["A"].shape[1]


@dataclass(frozen=True)
class Adapter:
    """Updates by module path.

    `flattened`: the paths are kohya's, with `_` where the module path has dots.
    `linear_only`: the format's targets are `nn.Linear` by definition, so a square matrix is (out, in).
    """

    name: str
    format: str
    file: TensorFile
    config: AdapterConfig
    updates: Mapping[str, UpdateSpec]
    flattened: bool = False
    linear_only: bool = False

    def load(self, spec: UpdateSpec) -> LowRank:
        """Read one update. Raises InputError naming the factor that holds a nan or an infinity."""
        cls, roles = UPDATES[spec.kind]
        tensors = {role: self.file.tensor(spec.tensors[role]) for role in roles}
        for role, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise InputError(f"holds nan or inf; {self.name} is damaged", culprit=spec.tensors[role])
        return cls(**tensors, scale=spec.scale)

    @cached_property
    def sha256(self) -> str:
        """Of the weights file, as `sha256sum` prints it."""
        return sha256_file(self.file.path)

    @cached_property
    def scales_sha256(self) -> str:
        """Of every module's scale, which the weights file alone does not determine."""
        lines = "".join(f"{module} {spec.scale.hex()}\n" for module, spec in sorted(self.updates.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def pair_factors(
    kind: str, module: str, roles: Mapping[str, str], file: TensorFile, config: AdapterConfig
) -> UpdateSpec:
    """An UpdateSpec from the tensors found for a module, its pair complete and of one rank.

    Raises InputError for a missing side, a rank that differs between the sides or from the config's.
    """
    specs = {role: file.specs[name] for role, name in roles.items()}
    for role in UPDATES[kind][1]:
        if role not in roles:
            other = next(iter(roles.values()))
            raise InputError(f"has no partner: the {role} factor of {module} is missing", culprit=other)
    A, B = specs["A"], specs["B"]
    for role, spec in specs.items():
        if len(spec.shape) != 2:
            what = {3: "a Conv1d", 4: "a Conv2d", 5: "a Conv3d"}.get(len(spec.shape), "not a matrix")
            raise InputError(f"is {spec}: {what}; only linear layers are supported yet", culprit=roles[role])
    if A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise InputError(f"A is {A.shape} and B is {B.shape}: they do not share a rank", culprit=module)
    expected = config.rank_of(module)
    if expected is not None and expected != A.shape[0]:
        raise InputError(
            f"the config says rank {expected}, but A is {A.shape}",
            culprit=module,
            remedy="the config is of another adapter",
        )
    scale = config.scale_of(module, A.shape[0])
    if not math.isfinite(scale):
        raise InputError(f"its scale would be {scale}", culprit=module)
    return UpdateSpec(kind, module, dict(roles), specs, scale)
