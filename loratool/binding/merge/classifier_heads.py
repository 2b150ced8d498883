"""Edit config.json so that a model with a merged head loads as the head's class, with its labels.

PEFT saves the head of a classifier with the adapter, but neither its class nor its labels, only the kind of task. If
the task and the names of the head's tensors do not determine a field, it is unchanged and a warning names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ...adapters.adapter import Adapter
from ...architectures.backbones import is_backbone
from ...architectures.classes import classes_of
from ...architectures.classifiers import (
    CLASSES,
    ENDS,
    HEADS,
    absent_beside,
    classes_of_tasks,
    classifier_class,
    tasks_of_head,
)
from ...architectures.config_tensors import declared_class
from ...errors import InputError
from ...files.checkpoint import Checkpoint, read_folder_config
from ...files.tensor_ref import TensorRef

FEATURES = "FEATURE_EXTRACTION"  # PEFT's task type of a model without a head
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
ALL_ENDS = tuple(end for ends in ENDS.values() for end in ends)
LABELS_SHOWN = 4


@dataclass(frozen=True)
class ClassChoice:
    """The class and the labels that the user names."""

    architecture: str | None = None  # None finds it by the adapters' task
    labels: tuple[str, ...] = ()  # empty takes the adapter's, the base's, or LABEL_0, LABEL_1, ...


@dataclass(frozen=True)
class ClassEdits:
    """The config's new fields for class and labels, with notes and warnings."""

    fields: Mapping[str, Any] = field(default_factory=dict)  # top-level fields of config.json
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def class_edits(
    base: Checkpoint, adapters: Sequence[Adapter], sources: Mapping[str, TensorRef], choice: ClassChoice
) -> ClassEdits:
    """Return the config's edits for class and labels, if an adapter has a head or names a task.

    Args:
        sources: the output's tensors -> the source of their rows.

    Raises:
        InputError: the chosen class is of another family, the labels do not match the head's rows, or there is no head.
    """
    files = {adapter.file for adapter in adapters}
    brought = {name for name, source in sources.items() if source.file in files}
    tasks = {each for adapter in adapters if isinstance(each := adapter.config.peft.get("task_type"), str)}
    if base.parts or base.is_gguf or not base.config:
        return _without_config(base, next((sources[name] for name in HEADS if name in brought), None), choice)
    declared = declared_class(base.config)
    head = next((name for name in HEADS if name in brought), None)
    if head is None and (choice.labels or declared.endswith(tuple(e for t in tasks & ENDS.keys() for e in ENDS[t]))):
        head = next((name for name in HEADS if name in sources), None)
    if head is None:
        return _without_head(base, declared, tasks, choice)
    owners = [_words(adapter) for adapter in adapters if sources[head].file is adapter.file]
    architecture = choice.architecture
    likely: Sequence[str] = ()
    if architecture is None:
        architecture, likely = _find_class(base.model_type, declared, tasks, owners, sources.keys())
    else:
        _require_known(base, declared, architecture)
    fields = {} if architecture in (None, declared) else {"architectures": [architecture]}
    if architecture or likely or choice.labels:
        fields |= _labels(base.config, owners, sources[head], choice.labels)
    warnings = [_unknown_class(head, declared, likely, _rows(sources[head]))] if architecture is None else []
    warnings += _absent_layers(base.model_type, architecture, sources.keys())
    return ClassEdits(fields, tuple(warnings), _note(fields, _rows(sources[head])) if fields else ())


def _without_config(base: Checkpoint, head: TensorRef | None, choice: ClassChoice) -> ClassEdits:
    if choice != ClassChoice():
        raise InputError(
            "has no config.json in which a class and labels could be named",
            culprit=str(base.path),
            remedy="leave out --architecture and --labels",
        )
    if head is None or base.parts:
        return ClassEdits()
    rows = _rows(head)
    return ClassEdits(warnings=(f"{head.name} is a head, and there is no config.json to name its {_labelled(rows)}",))


def _without_head(base: Checkpoint, declared: str, tasks: Collection[str], choice: ClassChoice) -> ClassEdits:
    """Return the edits of a model without a new head: the user's class, or the bare class for FEATURE_EXTRACTION."""
    if choice.labels:
        raise InputError(
            "has no head of a classifier after this merge", culprit=str(base.path), remedy="leave out --labels"
        )
    architecture = choice.architecture
    if architecture:
        _require_known(base, declared, architecture)
    elif tasks == {FEATURES} and not is_backbone(declared):
        known = classes_of(base.config).values()
        architecture = next((c.name for c in known if is_backbone(c.name) and c.model_type == base.model_type), None)
    warnings = tuple(
        f"the adapter was trained for {task}, and neither it nor the base has that head: its weights will be random"
        for task in sorted(tasks & ENDS.keys())
        if not declared.endswith(ENDS[task])
    )
    if architecture in (None, declared):
        return ClassEdits(warnings=warnings)
    return ClassEdits({"architectures": [architecture]}, warnings, _note({"architectures": [architecture]}, 0))


def _words(adapter: Adapter) -> dict[str, Any]:
    """Return an adapter's fields on its class, from its config or a config.json beside it."""
    return {**read_folder_config(adapter.file.path.parent), **adapter.config.peft} if adapter.config.peft else {}


def _find_class(
    model_type: str | None,
    declared: str,
    tasks: Collection[str],
    owners: Sequence[Mapping[str, Any]],
    names: Collection[str],
) -> tuple[str | None, list[str]]:
    """Return the class for a head (None if several are possible or none is known), and the possible classes.

    Args:
        owners: the fields of the adapter with the head.
        names: the tensors of the output.
    """
    classes = [classifier_class(model_type, declared, task) for task in sorted(tasks & CLASSES.keys())]
    likely = [name for name in classes if name]
    if not likely:
        possible = [classifier_class(model_type, declared, task) for task in tasks_of_head(model_type, names)]
        likely = [name for name in possible if name]
        declared_by_owners = [declared_class(words) for words in owners]
        likely = [name for name in likely if name in declared_by_owners] or likely
    likely = list(dict.fromkeys(likely))
    if len(likely) != 1 and declared.endswith(ALL_ENDS) and len(classes) < 2:
        return declared, likely
    return (likely[0] if len(likely) == 1 else None), likely


def _require_known(base: Checkpoint, declared: str, architecture: str) -> None:
    """Raise InputError if a family has no class of this name; unknown families and remote code may have any class."""
    if not architecture.isidentifier():
        raise InputError("is not the name of a class", culprit=architecture)
    classes = classes_of({**base.config, "architectures": []}).values()
    known = [*classes_of_tasks(base.model_type), *(each.name for each in classes if each.model_type == base.model_type)]
    stem = known[0].rpartition("For")[0].removesuffix("Text") if known else ""
    has_own = not known or not (declared or stem).startswith(stem) or "auto_map" in base.config
    if has_own or architecture in (*known, declared):
        return
    near = get_close_matches(architecture, known, 3, 0.3) or known[:3]
    raise InputError(
        f"is not a class of a {base.model_type}", culprit=architecture, remedy=f"did you mean {' or '.join(near)}?"
    )


def _labels(
    config: Mapping[str, Any], owners: Sequence[Mapping[str, Any]], head: TensorRef, chosen: Sequence[str]
) -> dict[str, Any]:
    """Return the fields for the labels of a head that change, as transformers writes them.

    transformers counts the entries of id2label. Without id2label it uses num_labels, with the default 2.
    """
    count = _rows(head)
    if chosen and len(chosen) != count:
        raise InputError(f"has {count} row{'s' * (count != 1)}, and --labels names {len(chosen)}", culprit=head.name)
    if len({*chosen}) != len(chosen):
        raise InputError("--labels names a label twice", culprit=head.name)
    names = chosen or next((labels for words in owners if (labels := _names(words, count))), ())
    former = config.get("id2label")
    fields: dict[str, Any] = {}
    if names:
        fields = _fields(names) if list(names) != list(_names(config, count)) else {}
    elif (len(former) if isinstance(former, dict) else config.get("num_labels", 2)) != count:
        fields = _fields([f"LABEL_{label}" for label in range(count)])
    if fields and "num_labels" in config:
        fields["num_labels"] = count
    problem = next((words.get("problem_type") for words in owners if words.get("problem_type") in PROBLEMS), None)
    return {**fields, "problem_type": problem} if problem and problem != config.get("problem_type") else fields


def _rows(head: TensorRef) -> int:
    rows = (*head.spec.shape, 0)[0]
    if not rows:
        raise InputError("is a head without rows, but each label needs one", culprit=head.name)
    return rows


def _labelled(rows: int) -> str:
    return f"{rows} label{'s' * (rows != 1)}"


def _fields(names: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: names.index(name) for name in sorted(names)},
    }


def _names(words: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Return the names of a config's labels in order; empty if they are not exactly `count`."""
    by_label, by_name = words.get("id2label"), words.get("label2id")
    if not isinstance(by_label, dict) and isinstance(by_name, dict):
        by_label = {str(label): name for name, label in by_name.items()}
    if not isinstance(by_label, dict):
        return ()
    names = [name for label in range(count) if isinstance(name := by_label.get(str(label)), str)]
    return tuple(names) if len({*names}) == len(by_label) == count else ()


def _unknown_class(head: str, declared: str, likely: Sequence[str], rows: int) -> str:
    """Return the warning about a head of an unknown class."""
    was = declared or "no class"
    which = f": {' or '.join(likely)}" if likely else f", and id2label for its {_labelled(rows)}"
    return (
        f"{head}: config.json names {was}; set its architectures to the class that the adapter was trained for"
        f"{which} (--architecture NAME{'' if likely else ', --labels A,B,...'})"
    )


def _absent_layers(model_type: str | None, architecture: str | None, names: Iterable[str]) -> list[str]:
    """Return a warning if the class has layers beside the head that neither the base nor an adapter has."""
    tasks = [task for task, classes in CLASSES.items() if model_type and classes.get(model_type) == architecture]
    is_random = any(absent_beside(model_type, task, list(names)) for task in tasks)
    line = f"{architecture} has layers under names that neither the base nor an adapter has, a pooler mostly: "
    return [f"{line}their weights will be random"] if is_random else []


def _note(fields: Mapping[str, Any], rows: int) -> tuple[str, ...]:
    """Return the note with the class and labels that config.json names now."""
    labels = [*fields.get("id2label", {}).values()]
    shown = ", ".join(labels[:LABELS_SHOWN]) + (", ..." if len(labels) > LABELS_SHOWN else "")
    parts = [*fields.get("architectures", ()), *([f"{_labelled(rows)}, {shown}"] if labels else ())]
    options = "--architecture and --labels name" if rows else "--architecture names"
    return (f"config.json names {' with '.join(parts)} ({options} others)",) if parts else ()
