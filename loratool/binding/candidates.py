"""Find the weights of a base that can get factors, by selection and role."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from ..adapters.weight_kinds import stack_shape, weight_kind
from ..architectures.prefixes import module_path
from ..architectures.renames import expert_part
from ..architectures.roles import weight_role
from ..errors import InputError, UsageError
from ..files.checkpoint import Checkpoint
from ..files.tensor_ref import TensorRef
from .peft_names import is_plain, namer, role_in_model
from .selection import Selection, matches_pattern


@dataclass(frozen=True)
class Candidate:
    """A weight that can have factors."""

    name: str
    in_model: str  # its name in the model's class, which PEFT wraps
    kind: str  # a key of WEIGHT_KINDS
    source: TensorRef
    sizes: tuple[int, int, int]  # (E, out, in) of its stack of matrices

    @property
    def parameters_per_rank(self) -> int:
        E, out, inp = self.sizes
        return E * (out + inp)

    @property
    def max_rank(self) -> int:
        """The largest rank that a delta of this weight can have."""
        return min(self.sizes[1:])


def find_candidates(
    base: Checkpoint, selection: Selection, among: Collection[str] | None = None, architecture: str | None = None
) -> list[Candidate]:
    """Return the weights that the selection names.

    Args:
        among: the weights that can have factors, for an adapter that PEFT need not load; None asks what PEFT can wrap.
        architecture: as in `namer`.

    Raises:
        InputError: a pattern names no weight that could have factors, or the selection leaves none.
    """
    roles = {
        n: weight_role(module_path(n), len(base.specs[n].shape), is_plain(base, n, base.specs[n])) for n in among or ()
    }
    in_model = namer(base, architecture) if among is None else str
    eligible = _find_eligible(base, in_model) if among is None else {name: role for name, role in roles.items() if role}
    routers = _find_routers(eligible)
    for pattern in selection.target:
        if not any(_is_default_target(pattern, name, role, routers) for name, role in eligible.items()):
            ends = {module_path(name).rpartition(".")[2] for name in eligible}
            similar = difflib.get_close_matches(pattern, sorted(ends), 3, 0.4) or sorted(ends)[:8]
            raise InputError(
                "names no weight of the base that could have an adapter",
                culprit=f"--target {pattern}",
                remedy=f"there are {', '.join(similar)}" if similar else None,
            )
    replace(selection, target=()).require_used([*map(module_path, base.specs)], str(base.path))
    found = []
    for name, role in eligible.items():
        if selection.selects(module_path(name)) and any(
            _is_default_target(each, name, role, routers) for each in selection.target
        ):
            kind, source = weight_kind(base.model_types, module_path(name), role), base.ref(name)
            found.append(Candidate(name, in_model(name), kind, source, stack_shape(kind, source.spec.shape)))
    if not found:
        raise InputError("the selection leaves no weight of the base", remedy="loosen --exclude or --layers")
    return found


def _find_eligible(base: Checkpoint, in_model: Callable[[str], str]) -> dict[str, str]:
    """Map the weights that PEFT can wrap to their roles.

    These are the weights of modules and the stacks of experts, but no other bare parameter (a Mamba's A_log, gpt-oss's
    biases of experts).
    """
    found = {name: role_in_model(base, name, in_model(name), spec) for name, spec in base.specs.items()}
    return {name: role for name, role in found.items() if role}


def _find_routers(names: Collection[str]) -> frozenset[str]:
    """Return the weights that choose among experts: in transformers 5 no linear layers, so PEFT cannot wrap most."""
    blocks = {name.partition(".experts.")[0] for name in names if ".experts." in name}
    return frozenset(f"{block}.{router}.weight" for block in blocks for router in ("gate", "router"))


def _is_default_target(pattern: str, name: str, role: str, routers: Collection[str]) -> bool:
    """Return whether a pattern targets a weight, with PEFT's meaning of `all-linear`.

    Convolutions, stacks of experts and their routers have to be named.
    """
    return matches_pattern(pattern, module_path(name)) and (
        pattern != "all-linear" or (role == "linear" and name not in routers)
    )


def refuse_split_experts(base: Checkpoint, ranks: Mapping[str, int], rslora: bool) -> None:
    """Refuse adapters of single experts that PEFT cannot stack when it loads them.

    PEFT stacks all experts of a layer at the rank that most targets have, and fuses gate and up at twice that rank and
    alpha, which is another scale under rsLoRA (`peft/utils/transformers_weight_conversion.py`).

    Args:
        ranks: target -> its rank.

    Raises:
        UsageError: an expert has no factors or another rank, or gate and up are to be fused under rsLoRA.
    """
    parts = {name: part for name in base.specs if (part := expert_part(name, base.model_types))}
    common = next(iter(Counter(ranks.values()).most_common(1)), (0, 0))[0]
    stacks = {parts[name].fused: name for name in ranks if name in parts}
    for name, part in parts.items():
        if part.fused not in stacks or not name.endswith(".weight"):
            continue
        if name not in ranks:
            raise UsageError(
                f"is a part of what PEFT stacks with {stacks[part.fused]}",
                culprit=name,
                remedy="target all experts of a layer, gate and up alike, or add --exclude 're:experts'",
            )
        if ranks[name] != common:
            raise UsageError(
                f"has rank {ranks[name]}, but PEFT stacks experts at the rank of most targets, {common}",
                culprit=name,
                remedy="give all experts one rank, and other ranks to what is not one, or add --exclude 're:experts'",
            )
        if rslora and part.parts > 1:
            raise UsageError(
                "PEFT joins its factors to another's at twice the rank, which changes rsLoRA's scale",
                culprit=name,
                remedy="leave rslora out, or add --exclude 're:experts'",
            )
