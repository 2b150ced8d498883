"""Resolve updates of tied weights: an embedding, a head, and other names of one stored matrix.

An adapter that changes one side of a tie leaves the other unchanged. So a merge into the one stored matrix computes
something else than base and adapter (PEFT's merge does that). Here the sides stay one matrix only if they end equal;
else the second is also written, and the config is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...adapters.updates.low_rank import LowRank
from ...adapters.updates.rows import ReplaceRows
from ...adapters.updates.update import UpdateSpec
from ...architectures.ties import COPIES, ONE_MODULE_BEFORE_5
from ...errors import InputError, NeedsFlag, shell_word
from ...files.checkpoint import Checkpoint
from ...files.tensor_compare import same_values
from ...files.tensor_ref import TensorRef
from ..modules.placement import Placement
from ..modules.resolve import refuse_second_nonadditive
from .ties import Tie


def stored_copies(base: Checkpoint, tie: Tie) -> list[str]:
    """Return the other stored tensors with the embedding's values."""
    spec = base.specs[tie.embedding]
    lasts = {name: name.removesuffix(".weight").split(".")[-1] for name in base.specs}
    named = [n for n, s in base.specs.items() if n != tie.embedding and s == spec and lasts[n] in COPIES]
    return [name for name in named if same_values(base.ref(tie.embedding), base.ref(name))]


@dataclass(frozen=True)
class ResolvedTie:
    """The placements after resolving a tie."""

    placements: Mapping[str, tuple[Placement, ...]]
    untied: tuple[str, ...] = ()  # sides that become tensors of the output
    warnings: tuple[str, ...] = ()


def resolve_tie(
    base: Checkpoint, tie: Tie | None, placements: Mapping[str, tuple[Placement, ...]], mode: str
) -> ResolvedTie:
    """Decide whether the sides of a tie and its embedding stay one matrix, and which updates each gets.

    Args:
        mode: a key of TIED.

    Raises:
        NeedsFlag: the sides end different, `mode` neither allows nor resolves that, and another value of --tied does.
        InputError: no value of --tied does.
    """
    if tie is None:
        return ResolvedTie(placements)
    placements = _unify_bias_names(tie, placements)
    if not any(name in placements for name in (tie.embedding, *tie.sides, *_possible_copies(base, tie))):
        return ResolvedTie(placements)
    copies = stored_copies(base, tie)
    embedding = placements.get(tie.embedding, ())
    apart = tie.is_stored(base) and tie.head not in copies
    others = list(dict.fromkeys([*copies, *(side for side in tie.sides if side not in base.specs)]))
    if not embedding and not any(name in placements for name in others):
        return ResolvedTie(placements)
    if apart and not tie.inputs:
        return ResolvedTie(placements)  # these are two matrices in spite of the config
    rest = {name: placed for name, placed in placements.items() if name not in (tie.embedding, *others)}
    requested = {name: placements.get(name, ()) for name in others}
    rows = placements.get(tie.tokens, ()) if tie.tokens and not apart else ()
    embedding = (*embedding, *_mirror_all(rows, embedding))
    sides = {name: (*placed, *_mirror_all(rows, placed)) for name, placed in requested.items()}
    followed = [
        placed for name, placed in sides.items() if placed or name not in tie.inputs or not embedding or tie.is_called
    ]
    shared = embedding if embedding or tie.is_called else sides.get(tie.inputs[0], ())
    if followed and all(equal_changes(shared, placed) for placed in followed):
        return ResolvedTie(
            {**rest, **dict.fromkeys((tie.embedding, *copies), shared)}, (), _forgotten_bias(base, tie, rows)
        )
    both = embedding + tuple(p for placed in requested.values() for p in placed)
    separate = {name: placed for name, placed in ((tie.embedding, embedding), *sides.items()) if placed}
    embedding_alone = bool(embedding and tie.inputs) and not any(sides.get(name) for name in tie.inputs)
    options = _working_options(tie, separate, both, embedding_alone)
    if (
        mode == "refuse"
        or (mode == "untie" and (embedding_alone or not tie.separable))
        or (mode == "share" and mode not in options)
    ):
        raise _refusal(tie, next(iter(separate)), mode, options, embedding_alone)
    if mode == "share":
        warning = f"{tie.embedding}: the changes of one side now apply to all that are tied to it"
        return ResolvedTie({**rest, **dict.fromkeys((tie.embedding, *copies), both)}, (), (warning,))
    resolved = _untie(base, tie, embedding, sides, {**rest, **separate})
    return replace(resolved, warnings=(*resolved.warnings, *_forgotten_bias(base, tie, rows)))


def _untie(
    base: Checkpoint,
    tie: Tie,
    embedding: tuple[Placement, ...],
    sides: Mapping[str, tuple[Placement, ...]],
    placements: Mapping[str, tuple[Placement, ...]],
) -> ResolvedTie:
    """Write every side as a separate matrix, or only those that differ if config.json still ties them."""
    untied = [name for name, placed in sides.items() if not (tie.keeps_flag and equal_changes(embedding, placed))]
    placements = {name: placed for name, placed in placements.items() if name in untied or name in base.specs}
    named = ", ".join(untied)
    if tie.bias:
        untied.append(tie.bias[1])
        again = {tie.bias[1]: placements[tie.bias[0]]} if tie.bias[0] in placements else {}
        placements = {**placements, **again}
    warning = f"{named}: untied from {tie.embedding}; loaders that tie anyway would drop it"
    if tie.keeps_flag:
        warning += " (transformers before 5, since the flag in config.json says how the head is scaled, and stays)"
    elif base.model_type in ONE_MODULE_BEFORE_5 and any(sides.get(name) for name in tie.inputs):
        warning += " (transformers before 5, which give encoder and decoder the shared embedding)"
    return ResolvedTie(placements, tuple(untied), (warning,))


def _forgotten_bias(base: Checkpoint, tie: Tie, rows: tuple[Placement, ...]) -> tuple[str, ...]:
    """Return a warning if tokens were trained under a head with a bias.

    PEFT's trained tokens compute a tied head again, without its bias (peft/tuners/trainable_tokens/layer.py, 0.21).
    """
    bias = tie.bias[0] if tie.bias else f"{tie.head.removesuffix('.weight')}.bias"
    if bias not in base.specs or not any(p.update.cls is ReplaceRows for p in rows):
        return ()
    return (f"{bias}: PEFT's forward pass leaves it out where tokens are trained; the merged model has it",)


def _unify_bias_names(tie: Tie, placements: Mapping[str, tuple[Placement, ...]]) -> Mapping[str, tuple[Placement, ...]]:
    """Move placements on the second name of a masked head's bias to the first: they are one tensor.

    Raises:
        NeedsFlag: an adapter has different updates for the two names.
    """
    if tie.bias is None or tie.bias[1] not in placements:
        return placements
    name, again = tie.bias
    unified = {other: placed for other, placed in placements.items() if other != again}
    for placement in placements[again]:
        same = [p for p in placements.get(name, ()) if p.adapter is placement.adapter]
        if same and not any(_equal_updates(p, placement) for p in same):
            raise NeedsFlag(
                f"is {name} under another name, but {placement.adapter.name} changes the two in different ways",
                culprit=again,
                flags=f"--exclude {shell_word(name)}",
                why=", with which the head does not compute",
            )
        unified[name] = unified.get(name, ()) + (() if same else (placement,))
    return unified


def _working_options(
    tie: Tie, separate: Mapping[str, tuple[Placement, ...]], both: tuple[Placement, ...], embedding_alone: bool
) -> dict[str, str]:
    """Return the values of --tied with which the merge succeeds, each with its text for the error's remedy."""
    options = {}
    if (
        tie.separable
        and not embedding_alone
        and all(_add_placements(name, placed) for name, placed in separate.items())
    ):
        options["untie"] = f"--tied untie writes {'every matrix' if tie.inputs else 'both matrices'}"
    if _add_placements(tie.embedding, both):
        options["share"] = (
            "--tied share changes both" if options and not tie.inputs else "use --tied share to change every side"
        )
    return options


def _add_placements(name: str, placements: tuple[Placement, ...]) -> bool:
    try:
        refuse_second_nonadditive(name, placements)
    except InputError:
        return False
    return True


def _refusal(
    tie: Tie, changed: str, mode: str, options: Mapping[str, str], embedding_alone: bool
) -> NeedsFlag | InputError:
    """Return the error for a side that changes without the other, with the values of --tied that work."""
    message = "is tied to the other side and changes alone"
    if embedding_alone:
        message = "is the shared embedding of encoder and decoder, but the adapter changes only one of its names"
    elif not tie.separable:
        message = "is tied to a head that is not known to be read, or trained, as a matrix of its own"
    elif mode == "share":
        message = "is tied to the other side, and the changes of the two do not add up"
    can_untie = "untie" in options
    remedies = [*options.values(), *([] if can_untie else ["exclude the module with --exclude"])]
    error = NeedsFlag if options else InputError
    return error(message, culprit=changed, remedy=(", " if can_untie else ", or ").join(remedies))


def _possible_copies(base: Checkpoint, tie: Tie) -> list[str]:
    spec = base.specs[tie.embedding]
    return [n for n, s in base.specs.items() if s == spec and n.removesuffix(".weight").split(".")[-1] in COPIES]


def _mirror_all(embedding: tuple[Placement, ...], head: tuple[Placement, ...]) -> list[Placement]:
    """Return the embedding's changes that also apply to the head.

    These are trained tokens, which PEFT (since 0.15) stores once, and changes of all uses of the matrix.
    """

    def holds(placement: Placement) -> bool:
        return placement.update.everywhere or placement.update.cls is ReplaceRows

    adapters = {id(p.adapter) for p in head if holds(p)}
    return [p for p in embedding if holds(p) and id(p.adapter) not in adapters]


def equal_changes(embedding: tuple[Placement, ...], head: tuple[Placement, ...]) -> bool:
    """Return whether both sides change equally: by the same rows or values, or by a LoRA and its transpose."""
    if len(embedding) != len(head):
        return False
    pairs = list(zip(embedding, head, strict=True))
    if any(p.transposed is q.transposed and (p.start, p.stop) != (q.start, q.stop) for p, q in pairs):
        return False
    updates = {(id(p.update), id(q.update)): (p, q) for p, q in pairs}  # all matrices of a stack share an update
    return all(_equal_updates(p, q) for p, q in updates.values())


def _equal_updates(left: Placement, right: Placement) -> bool:
    a, b = left.update, right.update
    if left.adapter is not right.adapter or left.weight != right.weight:
        return False
    if (a.cls, a.detail, a.scale, a.tensors.keys()) != (b.cls, b.detail, b.scale, b.tensors.keys()):
        return False
    file = left.adapter.file
    if (a.base is None) != (b.base is None):
        return False
    if a.base and b.base and not same_values(TensorRef(file, a.base), TensorRef(file, b.base)):
        return False
    if left.transposed is right.transposed:
        pairs = ((TensorRef(file, a.tensors[role]), TensorRef(file, b.tensors[role])) for role in a.tensors)
        return all(same_values(*pair) for pair in pairs)
    return a.cls is LowRank and _equal_transposed(left, a, b, "A", "B") and _equal_transposed(left, a, b, "B", "A")


def _equal_transposed(placement: Placement, a: UpdateSpec, b: UpdateSpec, role: str, other: str) -> bool:
    file = placement.adapter.file
    left, right = file.numbers(a.tensors[role]).wide(), file.numbers(b.tensors[other]).wide().T
    return left.shape == right.shape and bool((left == right).all())


def vocabulary_edits(base: Checkpoint, rows: Mapping[str, int], changed: Mapping[str, int]) -> dict[str, Any]:
    """Return the config's new vocab_size; {} if it is unchanged.

    Args:
        rows: the numbers of rows of the output's embedding and head, by name.
        changed: the numbers that differ from the base's.

    Raises:
        InputError: the two end with different rows, or the base has a buffer or a tokenizer of the old size.
    """
    if not changed:
        return {}
    if len(set(rows.values())) > 1:
        named = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise InputError(
            f"the embedding and the head would end with different rows ({named}): an adapter lacks values for some",
            remedy="save the adapter with both sides (peft: modules_to_save with the embedding and the head)",
        )
    size = next(iter(changed.values()))
    if base.is_gguf:
        message = f"would have {size} tokens, but the tokenizer in the fields of {base.path.name} does not"
        raise InputError(message, culprit=next(iter(changed)), remedy="merge in transformers' format, and convert that")
    for name, spec in base.specs.items():
        if name.rpartition(".")[2] == "final_logits_bias" and spec.shape[-1:] != (size,):
            raise InputError(
                f"is {spec.shape}, but the vocabulary would have {size} rows, and PEFT saves nothing for it",
                culprit=name,
                remedy=f"give the base that size (transformers: resize_token_embeddings({size}), save_pretrained)",
            )
    return {"vocab_size": size}
