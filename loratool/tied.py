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
from .targets import refuse_two

# What to do where one side changes -> its meaning.
TIED = {
    "untie": "write the head as a matrix of its own, and say so in config.json",
    "share": "apply every change to the one matrix, so that both sides change",
    "refuse": "stop",
}
INPUT_EMBEDDINGS = (
    "shared",
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "tok_embeddings",
    "tokens_embed",
    "embeddings",
)
OUTPUT_HEADS = ("lm_head", "embed_out")
# What else can be the embedding once more: the sides of an encoder-decoder, the decoder of a masked language model.
COPIES = (*OUTPUT_HEADS, "embed_tokens", "shared", "proj_out", "decoder", "generator_lm_head", "vocab_projector")
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
MASKED = ("ForMaskedLM", "ForPreTraining")
HEADLESS = ("Classification", "QuestionAnswering", "MultipleChoice", "Regression", "RewardModel")
# Encoders, whose language models' heads have other names and parts.
ENCODERS = frozenset(
    """albert bert bert-generation big_bird camembert data2vec-text deberta deberta-v2 distilbert electra ernie
    megatron-bert mobilebert modernbert rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta
    xlm-roberta-xl xlnet xmod""".split()
)
# Families that untie where config.json does not say (`tie_word_embeddings` of the config classes of transformers 5.24).
UNTIED_BY_DEFAULT = frozenset(
    """apertus arcee bamba bitnet codegen dbrx deepseek_v2 deepseek_v3 diffllama dots1 exaone4 falcon_h1 flex_olmo fuyu
    glm glm4 glm4_moe gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe internlm3 jamba llama llama4 llama4_text longcat_flash mamba2 minimax minimax_m2
    ministral mistral mixtral nemotron nemotron_h olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe
    qwen3 qwen3_5 qwen3_5_text qwen3_moe qwen3_next reformer rwkv seed_oss stablelm xlstm""".split()
)
# Families whose config classes set the flag, whatever config.json says; a head that is stored and differs stays apart.
TIED_ANYHOW = frozenset("longt5 mt5 pop2piano t5 udop umt5".split())


@dataclass(frozen=True)
class Tie:
    """A matrix that is used more than once: as embedding, as head, and under whatever names it is stored again.

    separable: whether a head of its own can be written, so that loaders take it for one. mirrors: whether PEFT gives
    the embedding's trained tokens to the other sides too.
    """

    embedding: str
    head: str
    separable: bool
    mirrors: bool

    @property
    def joins_sides(self) -> bool:
        """Whether it is the embedding of an encoder and of a decoder."""
        return self.mirrors and not self.separable

    def is_stored(self, base: Checkpoint) -> bool:
        return self.head in base.specs


def find_tie(base: Checkpoint) -> Tie | None:
    """Which matrix a base uses more than once, by its names and its config."""
    embedding, config = _embedding(base), base.config
    flag = _flag(config)
    if base.model_type in TIED_ANYHOW:
        flag = True
    elif flag is None and base.model_type in UNTIED_BY_DEFAULT:
        flag = False
    if embedding is None or not config or flag is False:
        return None
    architecture = _architecture(config)
    encoder = architecture.endswith(MASKED) or base.model_type in ENCODERS
    whole = config.get("is_encoder_decoder") is True
    if not (flag or encoder or whole or architecture.endswith(GENERATIVE)):
        return None
    backbone = architecture.endswith("Model") and not architecture.endswith(GENERATIVE)
    if architecture.endswith(HEADLESS) or (backbone and (encoder or "." not in embedding.removesuffix(".weight"))):
        return None
    stored = _last_named(base, OUTPUT_HEADS)
    return Tie(embedding, stored or _head_name(base, embedding), not (encoder or whole), not encoder)


def _head_name(base: Checkpoint, embedding: str) -> str:
    last = {"gpt_neox": "embed_out", "whisper": "proj_out"}.get(base.model_type or "", "lm_head")
    before, mark, _ = embedding.partition("language_model.model.")
    return f"{before}language_model.{last}.weight" if mark else f"{last}.weight"


def _architecture(config: Mapping[str, Any]) -> str:
    listed = config.get("architectures")
    return listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""


def head_is_missing(base: Checkpoint) -> bool:
    """Whether the files have no head because it is the embedding; from headers alone."""
    tie = find_tie(base)
    return tie is not None and not tie.is_stored(base) and _architecture(base.config).endswith(GENERATIVE)


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
        if len(spec.shape) == 2 and name.endswith(".weight") and name.rpartition(".weight")[0].split(".")[-1] in lasts
    ]
    text = [name for name in found if "language_model" in name]
    found = text if len(found) > 1 and text else found
    return found[0] if len(found) == 1 else None


def stored_copies(base: Checkpoint, tie: Tie) -> list[str]:
    """The tensors besides the embedding that are stored and have its values."""
    spec = base.specs[tie.embedding]
    lasts = {name: name.removesuffix(".weight").split(".")[-1] for name in base.specs}
    named = [n for n, s in base.specs.items() if n != tie.embedding and s == spec and lasts[n] in COPIES]
    return [name for name in named if equal_rows(_source(base, tie.embedding), _source(base, name))]


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

    mode: a key of TIED. Raises NeedsFlag where it is `refuse` and they would part, or where they cannot and `share`
    could; InputError where nothing can.
    """
    if tie is None or not any(name in placements for name in (tie.embedding, tie.head, *_named_copies(base, tie))):
        return Settled(placements)
    copies = stored_copies(base, tie)
    one = placements.get(tie.embedding, ())
    apart = tie.is_stored(base) and tie.head not in copies
    if apart and not (one and tie.joins_sides):
        return Settled(placements)  # whatever the config says, these are two matrices
    others = list(dict.fromkeys([*copies, *([] if tie.is_stored(base) else [tie.head])]))
    rest = {name: found for name, found in placements.items() if name not in (tie.embedding, *others)}
    asked = {name: placements.get(name, ()) for name in others}
    mirrors = tie.mirrors and not apart
    sides = {name: (*found, *(_mirrored_rows(one, found) if mirrors else ())) for name, found in asked.items()}
    if (others and all(_equal(one, side) for side in sides.values())) or (
        tie.joins_sides and not apart and _equal_where_asked(one, asked)
    ):
        return Settled({**rest, **dict.fromkeys((tie.embedding, *copies), one)})
    both = one + tuple(p for found in asked.values() for p in found)
    parted = {name: found for name, found in ((tie.embedding, one), *sides.items()) if found}
    ways = _ways(tie, parted, both)
    if mode == "refuse" or (mode == "untie" and not tie.separable) or (mode == "share" and mode not in ways):
        raise _refusal(tie, next(iter(parted)), mode, ways, apart)
    if mode == "share":
        warning = f"{tie.embedding}: what changed one side now changes all that are tied to it"
        return Settled({**rest, **dict.fromkeys((tie.embedding, *copies), both)}, None, (warning,))
    warning = f"{tie.head}: untied from {tie.embedding}; loaders that tie anyway would drop it"
    return Settled({**rest, **parted}, tie.head, (warning,))


def _ways(tie: Tie, parted: Mapping[str, tuple[Placement, ...]], both: tuple[Placement, ...]) -> dict[str, str]:
    """The values of --tied with which such a merge succeeds, and what each does."""
    ways = {}
    if tie.separable and all(_add_up(name, found) for name, found in parted.items()):
        ways["untie"] = "--tied untie writes both matrices"
    if _add_up(tie.embedding, both):
        ways["share"] = "--tied share changes both" if tie.separable else "use --tied share to change every side"
    return ways


def _add_up(name: str, placements: tuple[Placement, ...]) -> bool:
    try:
        refuse_two(name, placements)
    except InputError:
        return False
    return True


def _refusal(tie: Tie, changed: str, mode: str, ways: Mapping[str, str], apart: bool) -> NeedsFlag | InputError:
    """The error for one side that changes alone, naming those values of --tied that work."""
    message = "is tied to the other side by config.json and changes alone"
    if apart:
        message = "is the embedding of encoder and decoder in one, of which the adapter changes one name alone"
    elif not tie.separable:
        message = "is tied to more than a head, and untied it would be lost or left at random by loaders"
    elif mode == "share":
        message = "is tied to the other side, and the changes of the two do not add up"
    remedies = [*ways.values(), *([] if tie.separable and ways else ["leave the module out with --exclude"])]
    error = NeedsFlag if ways else InputError
    return error(message, culprit=changed, remedy=(", " if tie.separable else ", or ").join(remedies))


def _named_copies(base: Checkpoint, tie: Tie) -> list[str]:
    spec = base.specs[tie.embedding]
    return [n for n, s in base.specs.items() if s == spec and n.removesuffix(".weight").split(".")[-1] in COPIES]


def _equal_where_asked(one: tuple[Placement, ...], asked: Mapping[str, tuple[Placement, ...]]) -> bool:
    """Of trained tokens alone: every copy gets them, whichever of its names the adapter uses."""
    return all(p.update.kind == "rows" for p in one) and bool(one) and not any(asked.values())


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
    file = one.adapter.file
    if (a.base is None) != (b.base is None):
        return False
    if a.base and b.base and not equal_rows(Source(file, a.base), Source(file, b.base)):
        return False
    if a.tensors == b.tensors:
        return True
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
        named = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise InputError(
            f"the embedding and the head would end with different rows ({named}): an adapter lacks values for some",
            remedy="save the adapter with both sides (peft: modules_to_save with the embedding and the head)",
        )
    return {"vocab_size": next(iter(changed.values()))}


def vocabulary_names(base: Checkpoint, tie: Tie | None) -> tuple[str, ...]:
    """The tensors that have a row a token: the embedding, the head, and its bias."""
    embedding = _embedding(base)
    head = tie.head if tie else _last_named(base, OUTPUT_HEADS)
    bias = head.removesuffix(".weight") + ".bias" if head else ""
    return tuple(name for name in (embedding, head, bias if bias in base.specs else None) if name)
