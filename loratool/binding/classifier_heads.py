"""Classification heads: what config.json must say so that a merged model loads as the classifier that it now is.

PEFT saves the head of a classifier with the adapter, and of its class and labels only the kind of task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters.adapter import Adapter
from ..architectures.classifiers import HEADS, TASKS, classifier_class
from ..architectures.config_tensors import declared_class
from ..files.checkpoint import Checkpoint
from ..files.tensor_ref import TensorRef


def classifier_edits(
    base: Checkpoint, adapters: Sequence[Adapter], sources: Mapping[str, TensorRef]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The class and the labels in the config, where adapters bring a head; and a warning where that is not known."""
    head = next((name for name in HEADS if name in sources), None)
    tasks = {task for task in TASKS if any(adapter.config.extra.get("task_type") == task for adapter in adapters)}
    if head is None or not tasks or base.parts or not base.config:
        return {}, ()
    declared = declared_class(base.config)
    named = classifier_class(base.model_type, declared, tasks.pop()) if len(tasks) == 1 else None
    if named is None:
        was = declared or "no class"
        return {}, (f"{head}: config.json names {was}; load the model with the class that the adapter was trained for",)
    fields = {} if named == declared else {"architectures": [named]}
    return {**fields, **_labels(base.config, sources[head].spec.shape[0])}, ()


def _labels(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Names for so many labels, as transformers makes them up; {} where the config has as many, 2 if it says nothing.

    transformers stores no num_labels: it counts the entries of id2label, and takes the other only in its absence.
    """
    names = config.get("id2label")
    if (len(names) if isinstance(names, dict) else config.get("num_labels", 2)) == count:
        return {}
    words = {str(label): f"LABEL_{label}" for label in range(count)}
    stale = {"num_labels": count} if "num_labels" in config else {}
    return {"id2label": words, "label2id": {word: int(label) for label, word in words.items()}, **stale}
