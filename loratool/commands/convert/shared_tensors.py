"""Find tensors that share storage, and choose the names that a safetensors file omits.

A torch file can store one tensor under several names, a safetensors file cannot. The official library
(`safetensors.torch.save_model`) stores one name and lists the others in the metadata, `{omitted: stored}`. So do we.
Only names that the model's loader ties by itself can be omitted: it would initialize others.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

from ...architectures.ties import INPUT_EMBEDDINGS, SHARED_BY_BOTH, TIED_ANYHOW
from ...binding.ties.ties import Tie, find_tie
from ...files.checkpoint import Checkpoint
from ...files.tensor_compare import same_bytes
from ...files.tensor_ref import TensorRef
from ...files.weights_file import WeightsFile


def find_shared_storage(base: Checkpoint, removed: Collection[str] = ()) -> dict[str, str]:
    """Return each tensor that shares the bytes of another -> the name that is stored.

    Args:
        removed: tensors that are not written, and so are neither of the two.
    """
    return {
        name: stored
        for part in base.models
        for shard in part.shards
        for name, stored in _find(part, shard, removed).items()
    }


def _find(base: Checkpoint, shard: WeightsFile, removed: Collection[str]) -> dict[str, str]:
    return (_by_metadata if shard.file_format == "safetensors" else _by_storage)(base, shard, removed)


def _by_storage(base: Checkpoint, shard: WeightsFile, removed: Collection[str]) -> dict[str, str]:
    places: dict[tuple[Hashable, int, str], list[str]] = {}
    for name, spec in shard.specs.items():
        if spec.nbytes and name not in removed:
            places.setdefault((shard.storage(name), spec.nbytes, spec.dtype), []).append(name)
    tie, shared = find_tie(base), {}
    for names in places.values():
        stored = min(names, key=lambda name: (tie is None or name != tie.embedding, _last_word(name), name))
        shared.update(dict.fromkeys((name for name in names if name != stored), stored))
    return shared


def _last_word(name: str) -> int:
    """Return the index of the module's name in INPUT_EMBEDDINGS. Other names get its length, and sort last."""
    word = name.removesuffix(".weight").split(".")[-1]
    return INPUT_EMBEDDINGS.index(word) if word in INPUT_EMBEDDINGS else len(INPUT_EMBEDDINGS)


def _by_metadata(base: Checkpoint, shard: WeightsFile, removed: Collection[str]) -> dict[str, str]:
    """Read shared tensors from the metadata. A tensor that is also stored counts only if its bytes are equal."""
    shared = {}
    for key, value in (shard.metadata or {}).items():
        name, stored = shard.prefix + key, shard.prefix + value
        if stored not in shard.specs or key in ("format", value) or name in removed or stored in removed:
            continue
        if name not in base.stored or same_bytes(base.stored_ref(name), TensorRef(shard, stored)):
            shared[name] = stored
    return {name: stored for name, stored in shared.items() if stored not in shared}


def omitted_names(base: Checkpoint, shared: Mapping[str, str]) -> Collection[str]:
    """Return the shared tensors that a safetensors file omits: those that the model's loader ties by itself.

    Without a config these are all tensors with the spec of the stored one, as in the official library.
    """
    omitted = set()
    for part in base.models:
        tie = find_tie(part)
        for name, stored in shared.items():
            alike = name not in base.stored or base.stored[name] == base.stored[stored]
            if alike and name.startswith(part.prefix) and (not part.config or name in _other_names(part, tie, stored)):
                omitted.add(name)
    return omitted | (shared.keys() - base.stored.keys())


def _other_names(base: Checkpoint, tie: Tie | None, name: str) -> set[str]:
    """Return the other names to which a loader ties a tensor."""
    names = set()
    if tie and name == tie.embedding:
        names |= set(tie.sides)
    if tie and name == f"{tie.head.removesuffix('.weight').rpartition('.')[0]}.bias":  # of a masked language model
        names.add(f"{tie.head.removesuffix('.weight')}.bias")
    before, mark, _ = name.rpartition("shared.weight")
    family, flag = base.model_type, base.config.get("tie_word_embeddings")
    if mark and (family in TIED_ANYHOW or (family in SHARED_BY_BOTH and flag is not False)):
        names |= {f"{before}{side}.embed_tokens.weight" for side in ("encoder", "decoder")}
    return names
