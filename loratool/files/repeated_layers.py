"""View of a model whose layers are those of another one, repeated under new numbers. Nothing is copied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .checkpoint import Checkpoint
from .containers.regrouped import RegroupedFile, StoredRows
from .layer_numbers import RepeatedLayers
from .weights_file import WeightsFile


def repeat_layers(model: Checkpoint, layers: RepeatedLayers, config: dict[str, Any]) -> Checkpoint:
    """Return a view of a model with these layers and this config.json."""
    shards = tuple(_view(shard, layers) for shard in model.shards)
    return replace(model, shards=shards, config=config, layers=layers, stored_model=model)


def _view(shard: WeightsFile, layers: RepeatedLayers) -> WeightsFile:
    """Return a shard with its tensors under their names in the view; itself if these are the same."""
    names = {new: name for name in shard.specs for new in layers.names_of(name)}
    if all(new == name for new, name in names.items()) and names.keys() == shard.specs.keys():
        return shard
    rows = {new: (StoredRows(shard, name, 0, (*shard.specs[name].shape, 1)[0]),) for new, name in names.items()}
    specs = {new: shard.specs[name] for new, name in names.items()}
    return RegroupedFile(shard, shard.path, specs, rows, shard.metadata or {})
