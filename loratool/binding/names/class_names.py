"""Map names of a base's files to those of the class that PEFT wraps: config.json's or another that can load it."""

from __future__ import annotations

from collections import Counter

from ...architectures.backbones import BACKBONES, in_task_model
from ...architectures.classes import ModelClass, classes_of
from ...architectures.config_tensors import declared_class
from ...architectures.peft import ENCODER_DECODERS
from ...architectures.prefixes import CONTAINER_PREFIXES
from ...architectures.renames import canonical
from ...errors import UsageError
from ...files.checkpoint import Checkpoint
from ..modules.resolve import strip_wrappers


class ClassNames:
    """A function from a tensor's name in the file to its name in a class, or "" if the class lacks the tensor.

    Attributes:
        chosen: the class; None if config.json declares none, or an image model is made of parts.
        family: its model type.
    """

    def __init__(self, base: Checkpoint, architecture: str | None = None) -> None:
        """Set up the names of the class `architecture`, by default the one that config.json declares.

        Raises:
            UsageError: no known class of this name can load the base.
        """
        self._base, self.chosen = base, _class_of(base, architecture)
        self.family = (self.chosen.model_type if self.chosen else base.model_type) or ""
        self._types, self._sides = base.model_types, dict[str, tuple[str, ...]]()
        if base.model_type in ENCODER_DECODERS:
            self._sides = {side: _types_of(base.config.get(side)) for side in ("encoder", "decoder")}
        prefix = BACKBONES.get(base.model_type or "", "")
        has_prefix = bool(prefix) and any(strip_wrappers(name).startswith(f"{prefix}.") for name in base.specs)
        self._names_main_class = self.chosen is None or has_prefix

    def __call__(self, name: str) -> str:
        path = self.in_main_class(name)
        return self.chosen.path(path) if self.chosen else path

    def in_main_class(self, name: str) -> str:
        """Return a tensor's name in the main class, which has all parts."""
        name = strip_wrappers(name)
        side, _, rest = name.partition(".")
        if side in self._sides:
            return f"{side}.{canonical(rest, self._sides[side])}"
        path = canonical(name, self._types)
        return path if self._names_main_class else in_task_model(path, self._base.model_type)

    def absent(self) -> tuple[str, ...]:
        """Return a sentence on the tensors that the class lacks; empty if it has all."""
        owners = Counter(_top(self.in_main_class(name)) for name in self._base.specs if not self(name))
        if not owners or not self.chosen:
            return ()
        listed = ", ".join(f"{owner} ({count})" for owner, count in owners.items())
        return (f"{self.chosen.name} has no {listed}: these tensors get nothing",)


def _class_of(base: Checkpoint, architecture: str | None) -> ModelClass | None:
    known = classes_of(base.config)
    if architecture is None:
        return known.get(declared_class(base.config))
    if architecture not in known:
        remedy = f"there are {', '.join(known)}" if known else "none is known for this base"
        raise UsageError(f"{base.path} has no class of this name", culprit=architecture, remedy=remedy)
    return known[architecture]


def _types_of(config: object) -> tuple[str, ...]:
    kind = config.get("model_type") if isinstance(config, dict) else None
    return (kind,) if isinstance(kind, str) else ()


def _top(path: str) -> str:
    """Return the prefix of a path that names a part of the model: its head, the tower of its backbone."""
    parts = path.split(".")
    return ".".join(parts[: 2 if parts[0] in CONTAINER_PREFIXES else 1])
