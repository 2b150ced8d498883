"""Choose the weights of a base that get factors, by selection and role."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ...architectures.beside_layers import MTP
from ...architectures.prefixes import module_path
from ...errors import InputError, UsageError, shell_word
from ...files.checkpoint import Checkpoint
from ..modules.selection import Selection, similar_modules
from ..names.class_names import ClassNames
from ..names.peft_names import is_bypassed, looks_up_otherwise
from ..ties.shared_tensors import find_shared
from ..ties.ties import find_tie
from .default_targets import find_unnamed
from .model_weights import ModelWeight, model_weights

# Roles that `all-linear` omits although PEFT can wrap them -> description
UNTARGETED = {"experts": "experts", "conv": "convolutions"}

NO_EFFECT = "layers that PEFT's factors change wrongly or not at all"
SHARED = "layers that share one tensor, while PEFT gives each its own factors"
NOT_WHOLE = "weights whose rows are incomplete or reordered in the file"
# Weights that no pattern includes: PEFT would not load their factors, or would apply them wrongly.
NEVER_TARGETED = frozenset({MTP, NO_EFFECT, SHARED, NOT_WHOLE})


def find_candidates(
    base: Checkpoint, selection: Selection, among: Collection[str] | None = None, in_model: ClassNames | None = None
) -> tuple[list[ModelWeight], dict[str, str]]:
    """Return the selected weights, and the skipped weights that could have factors.

    The latter are weight -> description: one of `beside_layers.GROUPS`, of UNTARGETED, NO_EFFECT, SHARED or NOT_WHOLE.

    Args:
        among: the weights that can have factors, for an adapter that PEFT need not load; None for those that PEFT can
            wrap.
        in_model: the names in the class that PEFT wraps; None for an adapter that PEFT need not load.

    Raises:
        InputError: a pattern matches no weight that could have factors, or no weight is selected.
    """
    every = [weight for weight in model_weights(base, in_model) if among is None or weight.name in among]
    unfit = _unfit(base, in_model, every) if in_model else {}
    eligible = [weight for weight in every if weight.role and weight.name not in unfit]
    unnamed = find_unnamed(base, in_model, selection.target)
    for pattern in selection.target:
        in_layers = (weight for weight in eligible if weight.names[0] not in unnamed)
        if not any(
            weight.role == "linear" if pattern == "all-linear" else weight.is_named(pattern) for weight in in_layers
        ):
            loaded = (weight for weight in eligible if unnamed.get(weight.names[0]) != MTP)
            ends = [path.rpartition(".")[2] for weight in loaded for path in weight.paths]
            raise InputError(
                "names no weight of the base that could have an adapter",
                culprit=f"--target {pattern}",
                remedy=similar_modules(pattern, ends) if ends else None,
            )
    anywhere = replace(selection, target=())
    named = {path for weight in every for path in weight.paths} | {*map(module_path, base.specs)}
    anywhere.require_used(named, str(base.path))
    candidates, skipped = [], dict[str, str]()
    for weight in every:
        asked = weight.role != "embedding" or _is_target(selection.target, weight)
        if weight.name in unfit and asked and select_weight(anywhere, weight):
            skipped[weight.name] = unfit[weight.name]
    for weight in eligible:
        if not select_weight(anywhere, weight):
            continue
        if weight.names[0] not in unnamed and _is_target(selection.target, weight):
            candidates.append(weight)
        elif weight.names[0] in unnamed or ("all-linear" in selection.target and weight.role in UNTARGETED):
            skipped[weight.name] = unnamed.get(weight.names[0]) or UNTARGETED[weight.role]
    if not candidates:
        raise InputError("the selection leaves no weight of the base", remedy="loosen --exclude or --layers")
    return candidates, skipped


def _unfit(base: Checkpoint, in_model: ClassNames, weights: Sequence[ModelWeight]) -> dict[str, str]:
    """Return weights that an adapter for training should not have -> reason."""
    tie, reasons = find_tie(base), {}
    uncalled = tie.embedding if tie and not tie.is_called else None
    shared = find_shared(base)
    for weight in weights:
        path = weight.in_model
        if not weight.role and path and len(weight.spec.shape) > 1:
            reasons[weight.name] = NOT_WHOLE
        elif is_bypassed(in_model.family, path) or looks_up_otherwise(base, path) or weight.name == uncalled:
            reasons[weight.name] = NO_EFFECT
        elif len(shared.get(weight.name, ())) > 1:
            reasons[weight.name] = SHARED
    return reasons


def _is_target(patterns: Sequence[str], weight: ModelWeight) -> bool:
    """Return whether patterns target a weight, with PEFT's meaning of `all-linear`.

    Convolutions, stacks of experts and modules beside the layers must be named.
    """
    others = tuple(pattern for pattern in patterns if pattern != "all-linear")
    is_linear = len(others) < len(patterns) and weight.role == "linear"
    return is_linear or (bool(others) and select_weight(Selection(others), weight))


def select_weight(selection: Selection, weight: ModelWeight) -> bool:
    """Return whether a selection includes a weight, by its name in the class or its tensors' names.

    Raises:
        UsageError: it includes only some of the tensors that are one weight in the class.
    """
    chosen = {name: selection.selects(module_path(name), *weight.paths) for name in weight.names}
    if len({*chosen.values()}) > 1:
        selected, other = (next(name for name, each in chosen.items() if each is way) for way in (True, False))
        raise UsageError(
            f"and {other} are both in {weight.in_model}, a single parameter of the class: select both or neither",
            culprit=selected,
            remedy=f"name {shell_word(weight.in_model.rpartition('.')[2])}",
        )
    return all(chosen.values())
