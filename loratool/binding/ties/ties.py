"""Find the matrix that a base uses several times, as embedding, head or under other names, from headers only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...architectures.beside_layers import Layers
from ...architectures.config_tensors import declared_class
from ...architectures.peft import ENCODER_DECODERS
from ...architectures.ties import (
    DECODER_HEADS,
    EMBEDS_BY_ENCODER,
    FLAG_SCALES,
    GENERATIVE,
    GGUF_EMBEDDING,
    GGUF_HEAD,
    GGUF_HEADLESS,
    GGUF_OWN_HEADS,
    HEADLESS,
    INPUT_EMBEDDINGS,
    MASKED,
    MASKED_HEAD_OF,
    OUTPUT_HEADS,
    PAST_ITS_MODULE,
    SHARED_BY_BOTH,
    SHARED_INPUTS,
    TIED_ANYHOW,
    TIED_AS_DECODERS,
    TIED_BY_DECODER,
    UNTIED_BY_DEFAULT,
)
from ...files.checkpoint import Checkpoint
from ...files.dtypes import TensorSpec


@dataclass(frozen=True)
class Tie:
    """A matrix that is used several times: as embedding, as head, and under the names of copies in the files."""

    embedding: str  # the name under which it is stored
    head: str  # empty if the class has none
    separable: bool  # loaders read the sides as separate matrices if they are written separately
    tokens: str | None  # the name whose trained tokens PEFT also applies to all others
    inputs: tuple[str, ...] = ()  # embeddings of encoder and decoder, if they share the matrix `embedding`
    is_called: bool = True  # the model also uses the module of `embedding`
    bias: tuple[str, str] | None = None  # the bias of a masked language model's head, and its other name
    keeps_flag: bool = False  # config.json keeps its field for tied sides

    @property
    def sides(self) -> tuple[str, ...]:
        return (*self.inputs, self.head) if self.head else self.inputs

    def is_stored(self, base: Checkpoint) -> bool:
        return self.head in base.specs

    def uses(self, stored: Collection[str]) -> tuple[tuple[str, bool], ...]:
        """Return the names of the modules that use the shared matrix, each with whether it is a head.

        Args:
            stored: names with a separate matrix.
        """
        inputs = [name for name in self.inputs if name not in stored]
        embeddings = [self.embedding] if self.is_called or not inputs else []
        heads = [self.head] if self.head and self.head not in stored else []
        return (*((name, False) for name in (*embeddings, *inputs)), *((name, True) for name in heads))

    def stored_as(self, name: str) -> str:
        """Return the name under which a side's values are stored."""
        return self.bias[0] if self.bias and name == self.bias[1] else self.embedding

    def lacking(self, base: Checkpoint) -> dict[str, TensorSpec]:
        """Return the tensors that the files store only under another name; adapters may use their names."""
        names = (*self.sides, *(self.bias[1:] if self.bias else ()))
        return {name: base.specs[self.stored_as(name)] for name in names if name not in base.specs}


def find_tie(base: Checkpoint) -> Tie | None:
    """Find the matrix that a base uses several times, by its names and its config; None if there is none."""
    if base.is_gguf:
        return _gguf_tie(base)
    if base.model_type in ENCODER_DECODERS:
        return _decoders_tie(base)
    embedding, config, family = _embedding(base), base.config, base.model_type or ""
    flag = _tie_flag(config)
    if family in TIED_ANYHOW:
        flag = True
    elif flag is None and family in UNTIED_BY_DEFAULT:
        flag = False
    if embedding is None or not config or flag is False:
        return None
    architecture = declared_class(config)
    encoder = architecture.endswith(MASKED) or family in MASKED_HEAD_OF
    is_encoder_decoder = config.get("is_encoder_decoder") is True and family not in TIED_AS_DECODERS
    if not (flag or encoder or is_encoder_decoder or architecture.endswith(GENERATIVE)):
        return None
    backbone = architecture.endswith("Model") and not architecture.endswith(GENERATIVE)
    inputs, is_called = _inputs(base, embedding)
    if architecture.endswith(HEADLESS) or (backbone and (encoder or "." not in embedding.removesuffix(".weight"))):
        return Tie(embedding, "", False, None, inputs, is_called) if inputs else None
    if encoder and not inputs:
        return _masked_tie(base, embedding, family)
    head = _head(base) or _head_name(base, embedding)
    if not inputs:
        return Tie(embedding, head, not is_encoder_decoder, embedding)
    tokens = inputs[0] if family in EMBEDS_BY_ENCODER else embedding
    return Tie(embedding, head, family in SHARED_BY_BOTH, tokens, inputs, is_called, None, family in FLAG_SCALES)


def _gguf_tie(base: Checkpoint) -> Tie | None:
    architecture = base.architecture or ""
    if GGUF_EMBEDDING not in base.specs or GGUF_HEAD in base.specs or architecture in GGUF_HEADLESS:
        return None
    return Tie(GGUF_EMBEDDING, GGUF_HEAD, architecture in GGUF_OWN_HEADS, GGUF_EMBEDDING)


def _decoders_tie(base: Checkpoint) -> Tie | None:
    """Return the tie of a decoder that is a separate model; loaders may not read it untied."""
    config, start = base.config.get("decoder"), "decoder."
    embeddings = [n for names in _matrices(base, INPUT_EMBEDDINGS).values() for n in names if n.startswith(start)]
    family = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(family, str) or len(embeddings) != 1:
        return None
    flag = _tie_flag(config)
    if flag is False or (flag is None and family in UNTIED_BY_DEFAULT):
        return None
    if family in MASKED_HEAD_OF:
        return replace(_masked_tie(base, embeddings[0], family, start), separable=False, tokens=None)
    return Tie(embeddings[0], f"{start}{DECODER_HEADS.get(family, 'lm_head')}.weight", False, embeddings[0])


def _inputs(base: Checkpoint, embedding: str) -> tuple[tuple[str, ...], bool]:
    """Return the embeddings of encoder and decoder that share a matrix, and whether its module is also called."""
    for family in base.model_types:
        last, is_called, others = SHARED_INPUTS.get(family, ("", True, ()))
        before, mark, _ = f".{embedding}".rpartition(f".{last}.weight")
        if last and mark:
            before = f"{before}.".removeprefix(".")
            sides = [f"{before}{other.partition('.')[0]}." for other in others]
            are_present = [any(name.startswith(side) for name in base.specs) for side in sides]
            return tuple(
                f"{before}{other}.weight" for other, is_there in zip(others, are_present, strict=True) if is_there
            ), is_called
    return (), True


def _masked_tie(base: Checkpoint, embedding: str, family: str, start: str = "") -> Tie:
    """Return the tie of a masked language model; the head counts only if its bias is stored."""
    head = start + MASKED_HEAD_OF.get(family, "lm_head")
    linear, owner = f"{head}.bias", f"{head.rpartition('.')[0]}.bias"
    bias = (owner, linear) if owner in base.specs and linear not in base.specs else None
    known = family in MASKED_HEAD_OF and family not in PAST_ITS_MODULE
    separable = known and (bias is not None or linear in base.specs)
    return Tie(embedding, f"{head}.weight", separable, embedding if separable else None, (), True, bias)


def _head_name(base: Checkpoint, embedding: str) -> str:
    last = DECODER_HEADS.get(base.model_type or "", "lm_head")
    for inner in ("language_model", "text_model"):
        before, mark, _ = embedding.partition(f"{inner}.model.")
        if mark:
            return f"{before}{inner}.{last}.weight"
    return f"{last}.weight"


def head_is_missing(base: Checkpoint) -> bool:
    """Return whether the files have no head because it is the embedding; this reads headers only."""
    tie = find_tie(base)
    if tie is None or tie.is_stored(base):
        return False
    return base.is_gguf or declared_class(base.config).endswith(GENERATIVE)


def _tie_flag(config: Mapping[str, Any]) -> bool | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _embedding(base: Checkpoint) -> str | None:
    matrices = _matrices(base, INPUT_EMBEDDINGS)
    if base.model_type in TIED_BY_DECODER:
        matrices = {last: [n for n in names if ".encoder." not in f".{n}"] for last, names in matrices.items()}
    return next(filter(None, (_only(matrices.get(last, ())) for last in INPUT_EMBEDDINGS)), None)


def _head(base: Checkpoint) -> str | None:
    return _only([name for names in _matrices(base, OUTPUT_HEADS).values() for name in names])


def _matrices(base: Checkpoint, lasts: Collection[str]) -> dict[str, list[str]]:
    """Return the matrices of modules with these last names, by last name, except copies in MTP layers."""
    by_last_name: dict[str, list[str]] = {}
    layers = Layers.find((), base.config)
    for name, spec in base.specs.items():
        last = name.removesuffix(".weight").rpartition(".")[2]
        if last in lasts and name.endswith(".weight") and len(spec.shape) == 2 and not layers.is_mtp(name):
            by_last_name.setdefault(last, []).append(name)
    return by_last_name


def _only(names: Sequence[str]) -> str | None:
    """Return the only matrix, or the language model's among several; None if it is not unique."""
    text = [name for name in names if "language_model" in name]
    names = text if len(names) > 1 and text else names
    return names[0] if len(names) == 1 else None


def vocabulary_names(base: Checkpoint, tie: Tie | None) -> tuple[str, ...]:
    """Return the tensors that have one row for each token: the embedding, the heads, and their biases."""
    if base.is_gguf:
        return GGUF_EMBEDDING, GGUF_HEAD
    masked = MASKED_HEAD_OF.get(base.model_type or "")
    head = f"{masked}.weight" if masked else _head(base)
    names = [_embedding(base), *(tie.sides if tie else [head])]
    biases = tie.bias or () if tie else ()
    if head:
        module = head.removesuffix(".weight")
        owner = module.rpartition(".")[0] if masked else ""
        biases = (*biases, *(f"{each}.bias" for each in (module, owner) if f"{each}.bias" in base.specs))
    return tuple(dict.fromkeys(name for name in (*names, *biases) if name))
