"""Give a folder of MLX that becomes plain numbers the names that the hub has, which transformers and mlx-lm both read.

Only the stacks of experts have others, in the model types of `mlx_names.ONE_BY_ONE`: each expert is some bytes of the
stack, codes and scales alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...architectures.experts import EXPERTS
from ...architectures.mlx_names import ONE_BY_ONE, find_share, mlx_names
from ...architectures.renames import canonical
from ...files.checkpoint import Checkpoint
from ...files.containers.regrouped import RegroupedFile, StoredRows
from ...files.dtypes import TensorSpec
from ..inputs import is_of_mlx


@dataclass(frozen=True)
class HubModel:
    """A model of MLX under the hub's names, or under its own where these cannot be given."""

    checkpoint: Checkpoint
    renamed: int  # tensors that have become those of single experts
    notes: tuple[str, ...]


def as_on_hub(base: Checkpoint) -> HubModel:
    """Return the model with its experts one by one, if it is one of MLX with stacks of them."""
    types = base.model_types
    names, stacks = mlx_names(types), {name: found for name in base.stored if (found := _hub_name(name, types))}
    if is_of_mlx(base) and names and (names.shifted or names.scaled):
        what = "norms with 1 added" if names.shifted else "weights that it has multiplied"
        return HubModel(base, 0, (f"it is mlx-lm's, with {what}: transformers would read it wrong",))
    if not stacks:
        return HubModel(base, 0, ())
    if types[0] not in ONE_BY_ONE:
        name = next(iter(stacks))
        return HubModel(base, 0, (f"it keeps mlx-lm's names, like {name}, which transformers does not read",))
    shards = []
    for shard in base.shards:
        rows: dict[str, list[StoredRows]] = {}
        specs: dict[str, TensorSpec] = {}
        for name, spec in shard.specs.items():
            if name not in stacks:
                specs[name], rows[name] = spec, [StoredRows(shard, name, 0, (*spec.shape, 1)[0])]
                continue
            for expert in range(spec.shape[0]):
                new = stacks[name].format(expert)
                specs[new] = TensorSpec(spec.dtype, spec.shape[1:])
                rows[new] = [StoredRows(shard, name, expert, expert + 1)]
        shards.append(RegroupedFile(shard, shard.path, specs, rows, shard.metadata or {}))
    count = sum(name.endswith(".weight") for name in stacks)
    note = f"its {count} stacks of experts are written expert by expert, as on the hub; mlx-lm reads that too"
    return HubModel(replace(base, shards=tuple(shards)), len(stacks), (note,))


def _hub_name(name: str, types: tuple[str, ...]) -> str:
    """Return the names on the hub of the experts of one of MLX's stacks, with {} for the number; else nothing."""
    path, _, end = name.rpartition(".")
    share = find_share(canonical(path, types), types) if end in ("weight", "scales", "biases") else None
    if share is None:
        return ""
    parameter = share.stack.rpartition(".")[2]
    lasts = EXPERTS.get(types[0], {}) if types else {}
    last = next((last for last, rows in lasts.items() if rows == (parameter, share.part, share.parts)), "")
    owner = path.rpartition(".")[0].replace("switch_mlp", "experts")
    return f"{owner}.{{}}.{last}.{end}"
