"""Add the mean of a random VeRA, PVeRA: D = diag(b) B diag(d) A with the first halves of d and of A's rows.

The second halves are of the variance, which a merge does not use (`peft/tuners/pvera/layer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from .update import PeftMethod, UpdateSpec
from .vera import VeRA

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers


@dataclass(frozen=True)
class PVeRA(VeRA):
    """An update of PVeRA, with the shared projections of its mean."""

    kind = "pvera"
    title = "PVeRA"
    roles = ("pvera_lambda_b", "pvera_lambda_d", "pvera_B", "pvera_A")
    peft = PeftMethod(
        "PVERA", {"pvera_lambda_b": "pvera_lambda_b", "pvera_lambda_d": "pvera_lambda_d"}, shared=roles[2:]
    )

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        b, d, B, A = (specs[role].shape for role in cls.roles)
        if len(B) != 2 or len(A) != 2 or not len(b) == len(d) == 1 or not 2 * B[1] == d[0] == A[0] > 0 or B[0] < b[0]:
            raise InputError(
                f"lambda_b is {b}, lambda_d is {d}, B is {B}, A is {A}: not a mean and a variance", culprit=module
            )

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> PVeRA:
        b, d, B, A = (tensors[role] for role in cls.roles)
        rank = B.shape[1]
        return cls(b, d[:rank], B, A[:rank])
