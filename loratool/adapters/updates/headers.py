"""Make the update of a module from the tensors that a format found for it: their roles decide its kind."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import InputError
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from . import UPDATES
from .dora import DoRA
from .experts import Experts
from .low_rank import LowRank
from .update import Unpaired, Update, UpdateSpec

BESIDE = ("base", "magnitude")  # roles that stand beside those of any kind


def spec_from_roles(
    module: str,
    roles: Mapping[str, str],
    file: WeightsFile,
    config: AdapterConfig,
    transposed: bool | None = None,
    stacked: bool = False,
    along_inputs: bool = False,
    lenient: bool = False,
) -> UpdateSpec:
    """Make the update of a module from the tensors found for it.

    Args:
        roles: role (A, B, magnitude, base, ...) -> tensor in the file.
        transposed: as `UpdateSpec.transposed`.
        stacked: a tensor has the factors of several experts; the config's rank is that of one.
        along_inputs: the magnitudes are of the inputs.
        lenient: record errors in `UpdateSpec.fault` instead of raising them.

    Raises:
        InputError: a tensor is missing, or shapes contradict each other or the config.
        NeedsFlag: the file does not say its alpha.
    """
    own = {role: name for role, name in roles.items() if role != "magnitude"}
    name = roles.get("magnitude")
    cls = Experts if stacked and name is None else _kind_of(own)
    inner = cls.from_headers(module, own or roles, file, config, transposed, lenient)
    if name is None or inner.cls is Unpaired:
        return inner
    size, sides = file.specs[name].size, (inner.shape[1] if along_inputs else inner.shape[0])
    if size != sides and not (along_inputs and inner.cls.flattened and size and sides % size == 0):
        fault = f"has {size} magnitudes for {sides} {'inputs' if along_inputs else 'outputs'}"
        if not lenient:
            raise InputError(fault, culprit=name)
        key = next(iter(roles.values()))
        return UpdateSpec(Unpaired, module, {"value": key}, {"value": file.specs[key]}, fault=fault)
    return DoRA.of(inner, name, file.specs[name], along_inputs)


def _kind_of(roles: Mapping[str, str]) -> type[Update]:
    """Return the kind that has all of these roles; that of LoRA if none has, which then says what is missing."""
    there = roles.keys() - set(BESIDE)
    whole = (cls for cls in UPDATES.values() if there <= {*cls.roles, *cls.optional} and there)
    return next((cls for cls in whole if there >= set(cls.roles)), LowRank)
