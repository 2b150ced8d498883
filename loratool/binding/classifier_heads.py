"""Edit config.json so that a model with a merged classification head loads as the classifier that it now is.

PEFT saves the head of a classifier with the adapter, but neither its class nor its labels: only the kind of task.
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
    """Return the config's new fields, and warnings, if an adapter replaces the classification head.

    Args:
        sources: the tensors that the output has -> where their rows come from.

    Returns:
        The class and the labels, empty if they stay; a warning if the class for this base and task is not known.
    """
    head = next((name for name in HEADS if name in sources), None)
    tasks = {task for task in TASKS if any(adapter.config.peft.get("task_type") == task for adapter in adapters)}
    if head is None or not tasks or base.parts or not base.config:
        return {}, ()
    declared = declared_class(base.config)
    architecture = classifier_class(base.model_type, declared, tasks.pop()) if len(tasks) == 1 else None
    if architecture is None:
        was = declared or "no class"
        return {}, (f"{head}: config.json names {was}; load the model with the class that the adapter was trained for",)
    fields = {} if architecture == declared else {"architectures": [architecture]}
    return {**fields, **_labels(base.config, sources[head].spec.shape[0])}, ()


def _labels(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return fields with `count` labels, named as transformers names them; {} if the config has that many.

    transformers counts the entries of id2label; num_labels counts only in its absence, and the default is 2.
    """
    names = config.get("id2label")
    if (len(names) if isinstance(names, dict) else config.get("num_labels", 2)) == count:
        return {}
    labels = {str(label): f"LABEL_{label}" for label in range(count)}
    stale = {"num_labels": count} if "num_labels" in config else {}
    return {"id2label": labels, "label2id": {word: int(label) for label, word in labels.items()}, **stale}
