"""Create the update of a module from its tensors in a file: their roles decide its kind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from ...errors import InputError
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from . import UPDATES
from .dora import DoRA
from .experts import Experts
from .update import Unpaired, Update, UpdateSpec


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
    """Create the update of a module from its tensors.

    Args:
        roles: role (A, B, magnitude, base, ...) -> tensor in the file.
        transposed: as `UpdateSpec.transposed`.
        stacked: a tensor has the factors of several experts; the config has the rank of one.
        along_inputs: the magnitudes are along the inputs.
        lenient: record errors in `UpdateSpec.fault` instead of raising them.

    Raises:
        InputError: a tensor is missing, or shapes contradict each other or the config.
        NeedsFlag: the file does not say its alpha.
    """
    inner_roles = {role: name for role, name in roles.items() if role != "magnitude"}
    name = roles.get("magnitude")
    try:
        cls = Experts if stacked and name is None else _kind_of(module, inner_roles or {"A": name or ""})
        inner = cls.from_headers(module, inner_roles or roles, file, config, transposed, lenient)
        if name is None:
            return inner
        size, sides = file.specs[name].size, (inner.shape[1] if along_inputs else inner.shape[0])
        if size != sides and not (along_inputs and inner.cls.flattened and size and sides % size == 0):
            of = "inputs" if along_inputs else "outputs"
            raise InputError(f"has {size} magnitudes for {sides} {of}", culprit=name)
        if not inner.additive:
            raise InputError(f"is DoRA beside {inner.kind}, which cannot be combined", culprit=name)
    except InputError as error:
        if not lenient:
            raise
        return unpaired(module, roles, file, error)
    return DoRA.of(inner, name, file.specs[name], along_inputs)


def _kind_of(module: str, roles: Mapping[str, str]) -> type[Update]:
    """Return the best kind that allows these roles; `Update.require` reports missing ones.

    Raises:
        InputError: no kind has all of them. Ignoring one would change the meaning of the others.
    """
    present = roles.keys() - {"base"}
    kinds = _kinds_with(frozenset(present))
    if not kinds:
        named = ", ".join(roles[role].rpartition(".")[2] if role not in "AB" else role for role in sorted(present))
        raise InputError(f"has tensors that no kind of update has together: {named}", culprit=module)
    return kinds[0]


@lru_cache(maxsize=64)
def _kinds_with(present: frozenset[str]) -> list[type[Update]]:
    """Return the kinds that have these roles; kinds with all required roles come first."""
    kinds = [cls for cls in UPDATES.values() if present <= {*cls.roles, *cls.optional}]
    return sorted(kinds, key=lambda cls: not present >= set(cls.roles))


def unpaired(module: str, roles: Mapping[str, str], file: WeightsFile, error: InputError) -> UpdateSpec:
    """Return the update that `inspect` shows for a module that cannot be read."""
    key, fault = next(iter(roles.values())), f"{error.message}; {error.remedy}" if error.remedy else error.message
    return UpdateSpec(Unpaired, module, {"value": key}, {"value": file.specs[key]}, fault=fault)
