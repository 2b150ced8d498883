"""Tied heads and vocabularies: what a change of an embedding or a head means where both are one matrix.

A model that ties its head to its embedding stores one matrix, and an adapter that changes one side leaves the other
as it was. So a merge into the one matrix computes something else than base and adapter did (PEFT's own merge does
that). Here the two stay one only if they end equal; else the second is written, and the config says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .adapter import UpdateSpec
from .checkpoint import Checkpoint
from .errors import InputError, NeedsFlag
from .placing import Placement
from .source import Source, equal_rows

# What to do where one side changes -> its meaning.
TIED = {
    "untie": "write the head as a matrix of its own, and say so in config.json",
    "share": "apply every change to the one matrix, so that both sides change",
    "refuse": "stop",
}
INPUT_EMBEDDINGS = ("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed")
OUTPUT_HEADS = ("lm_head", "embed_out")
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Families whose code scales the logits only where the head is tied, so that untying changes more than the name.
SCALED_WHEN_TIED = frozenset("t5 mt5 umt5 longt5 switch_transformers pix2struct udop pop2piano".split())


@dataclass(frozen=True)
class Tie:
    """The tensors that are one. `stored`: whether the files have the head too."""

    embedding: str
    head: str
    stored: bool


def find_tie(base: Checkpoint) -> Tie | None:
    """Which matrix a base uses twice, by its config; where that does not say, a stored head decides by its values."""
    embedding, stored = _embedding(base), _last_named(base, OUTPUT_HEADS)
    flag = _flag(base.config)
    if embedding is None or not base.config or flag is False:
        return None
    if stored:
        equal = flag or equal_rows(_source(base, embedding), _source(base, stored))
        return Tie(embedding, stored, True) if equal else None
    architectures = base.config.get("architectures")
    if not isinstance(architectures, list) or not str(next(iter(architectures), "")).endswith(GENERATIVE):
        return None
    last = "embed_out" if base.model_type == "gpt_neox" else "lm_head"
    before, mark, _ = embedding.partition("language_model.model.")
    return Tie(embedding, f"{before}language_model.{last}.weight" if mark else f"{last}.weight", False)


def head_is_missing(base: Checkpoint) -> bool:
    """Whether the files have no head because it is the embedding; from headers alone."""
    return _last_named(base, OUTPUT_HEADS) is None and find_tie(base) is not None


def _source(base: Checkpoint, name: str) -> Source:
    return Source(base.shard_of[name], name)


def _flag(config: Mapping[str, Any]) -> bool | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _embedding(base: Checkpoint) -> str | None:
    for last in INPUT_EMBEDDINGS:
        name = _last_named(base, (last,))
        if name:
            return name
    return None


def _last_named(base: Checkpoint, lasts: tuple[str, ...]) -> str | None:
    """The one matrix whose module has such a name; None where several do."""
    found = [
        name
        for name, spec in base.specs.items()
        if len(spec.shape) == 2 and name.endswith(".weight") and name.split(".")[-2] in lasts
    ]
    text = [name for name in found if "language_model" in name]
    found = text if len(found) > 1 and text else found
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Settled:
    """The placements after a tie was settled; `untied` is the head that becomes a matrix of its own."""

    placements: Mapping[str, tuple[Placement, ...]]
    untied: str | None = None
    warnings: tuple[str, ...] = ()


def settle_tie(
    base: Checkpoint, tie: Tie | None, placements: Mapping[str, tuple[Placement, ...]], mode: str
) -> Settled:
    """Decide whether the head and its embedding stay one matrix, and what changes then.

    mode: a key of TIED. Raises NeedsFlag where it is `refuse` and they would part, InputError where they cannot.
    """
    if tie is None:
        return Settled(placements)
    rest = {name: found for name, found in placements.items() if name not in (tie.embedding, tie.head)}
    embedding, head = placements.get(tie.embedding, ()), placements.get(tie.head, ())
    head = (*head, *_mirrored_rows(embedding, head))
    if not embedding and not head:
        return Settled(placements)
    if _equal(embedding, head):
        both = {tie.embedding: embedding, **({tie.head: embedding} if tie.stored else {})}
        return Settled({**rest, **both})
    if mode == "share":
        both = {tie.embedding: embedding + head, **({tie.head: embedding + head} if tie.stored else {})}
        return Settled({**rest, **both}, None, (f"{tie.embedding}: the change of one side is now that of both",))
    changed = tie.head if head and not embedding else tie.embedding
    if mode == "refuse":
        raise NeedsFlag(
            "is tied to the other side by config.json and changes alone",
            culprit=changed,
            remedy="--tied untie writes both matrices, --tied share changes both",
        )
    if base.model_type in SCALED_WHEN_TIED:
        raise InputError(
            f"is tied, and {base.model_type} scales its logits only then: untied it would compute something else",
            culprit=changed,
            remedy="use --tied share, or leave the module out with --exclude",
        )
    both = {name: found for name, found in ((tie.embedding, embedding), (tie.head, head)) if found}
    warning = f"{tie.head}: untied from {tie.embedding}; loaders that tie anyway would drop it"
    return Settled({**rest, **both}, tie.head, (warning,))


def _mirrored_rows(embedding: tuple[Placement, ...], head: tuple[Placement, ...]) -> list[Placement]:
    """Trained tokens of a tied embedding are the head's too, without being stored again (PEFT since 0.15)."""
    there = {id(p.adapter) for p in head if p.update.kind == "rows"}
    return [p for p in embedding if p.update.kind == "rows" and id(p.adapter) not in there]


def _equal(embedding: tuple[Placement, ...], head: tuple[Placement, ...]) -> bool:
    """Whether both sides change alike: the same rows or values, or a LoRA whose factors are each other's."""
    return len(embedding) == len(head) and all(map(_equal_updates, embedding, head))


def _equal_updates(one: Placement, two: Placement) -> bool:
    a, b = one.update, two.update
    if one.adapter is not two.adapter or one.weight != two.weight or (a.kind, a.indices) != (b.kind, b.indices):
        return False
    if a.tensors == b.tensors:
        return True
    file = one.adapter.file
    if a.kind in ("replace", "rows"):
        return equal_rows(Source(file, a.tensors["value"]), Source(file, b.tensors["value"]))
    if a.kind != "lora" or a.scale != b.scale or one.transposed is two.transposed:
        return False
    return _equal_transposed(one, a, b, "A", "B") and _equal_transposed(one, a, b, "B", "A")


def _equal_transposed(placement: Placement, a: UpdateSpec, b: UpdateSpec, role: str, other: str) -> bool:
    file = placement.adapter.file
    one, two = file.tensor(a.tensors[role]), file.tensor(b.tensors[other])
    return one.shape == two.T.shape and bool((one == two.T).all())


def vocabulary_edits(rows: Mapping[str, int], changed: Mapping[str, int]) -> dict[str, Any]:
    """The config's new vocab_size, {} where it stays.

    rows: the output's rows of its embedding and head, by name; changed: those of them that are not the base's.
    Raises InputError where the two end with different rows.
    """
    if not changed:
        return {}
    if len(set(rows.values())) > 1:
        lacking = next(name for name in rows if name not in changed)
        size = next(iter(changed.values()))
        raise InputError(
            f"would keep {rows[lacking]} rows beside {next(iter(changed))} with {size}: the adapter has none for them",
            culprit=lacking,
            remedy="save the adapter with its head and embedding (peft: save_embedding_layers=True)",
        )
    return {"vocab_size": next(iter(changed.values()))}


def vocabulary_names(base: Checkpoint, tie: Tie | None) -> tuple[str, ...]:
    """The tensors that have a row a token: the embedding, the head, and its bias."""
    embedding = _embedding(base)
    head = tie.head if tie else _last_named(base, OUTPUT_HEADS)
    bias = head.removesuffix(".weight") + ".bias" if head else ""
    return tuple(name for name in (embedding, head, bias if bias in base.specs else None) if name)
