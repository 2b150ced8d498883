"""Base class of FourierFT and WaveFT, whose numbers are at places of the weight that a seed in the config draws.

The places are the first of `torch.randperm(out * in)`, counted row by row in (out, in) even if the base stores (in,
out). Only the base shows the size of the weight. PEFT counts the numbers in `n_frequency`, `n_frequency_pattern` and
`proportional_parameters`; the file has as many as it has.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import InputError, brief
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .shira import Places
from .update import Detail, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers


@dataclass(frozen=True)
class Seed(Detail):
    """What draws the places."""

    seed: int

    @property
    def hashed(self) -> tuple[int, ...]:
        return (self.seed,)


@dataclass(frozen=True)
class Drawn(Update):
    """Numbers at drawn places."""

    name: str  # of its tensor in the adapter's file
    value: Numbers  # (n,)
    scaling: float
    seed: int
    places: Places | None = None  # n, once the size is known
    outputs: int = 0
    inputs: int = 0

    of_whole = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs[cls.roles[0]].shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and spec.shape[0] <= shape[0] * shape[1]

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return None, None

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        (role,) = cls.roles
        if len(specs[role].shape) != 1 or not specs[role].size:
            raise InputError(f"is {specs[role].shape}, not a list of numbers", culprit=roles[role])

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        scaling, seed = (required(config, spec.module, name) for name in ("scaling", "random_loc_seed"))
        if type(scaling) not in (int, float) or not abs(scaling) <= sys.float_info.max:
            raise InputError(f"the config's scaling is {brief(scaling)}, not a finite number", culprit=spec.module)
        if type(seed) is not int or not -(2**63) <= seed < 2**64:
            raise InputError(f"the config's random_loc_seed is {brief(seed)}, not one of torch's", culprit=spec.module)
        count, stated = spec.shape[0], config.peft.get("n_frequency")
        by_module = config.peft.get("n_frequency_pattern") or config.peft.get("proportional_parameters")
        if stated not in (None, count) and not by_module:
            raise InputError(
                f"the config says n_frequency {brief(stated)}, but it has {count} numbers",
                culprit=spec.module,
                remedy="the config is of another adapter",
            )
        return replace(spec, scale=float(scaling), detail=Seed(seed))

    def sized(self, outputs: int, inputs: int) -> Drawn:
        from ...numerics.torch_random import LARGEST, permutation_start

        total = outputs * inputs
        if total > LARGEST:
            raise InputError(
                f"is for a weight of ({outputs}, {inputs}): versions of torch draw different places in so large a one",
                culprit=self.name,
                remedy="merge it with peft in the torch that trained it, and `loratool extract` the change",
            )
        rows, columns = divmod(permutation_start(self.seed, total, len(self.value)), inputs)
        return replace(self, places=Places(self.name, rows, columns), outputs=outputs, inputs=inputs)


def required(config: AdapterConfig, module: str, name: str) -> Any:
    """Return a field of the config; raise InputError if it is not there."""
    if config.peft.get(name) is None:
        remedy = "put its adapter_config.json beside it"
        raise InputError(f"only the config tells its {name}", culprit=module, remedy=remedy)
    return config.peft[name]
