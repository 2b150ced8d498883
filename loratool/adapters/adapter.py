"""An adapter of any format, as a lazy mapping from module path to update.

It is made from headers, the config and scalar alphas, so that plans and binding need no numpy.
`Adapter.load` reads the tensors of one update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..architectures.classifiers import PEFT_HEADS, TASKS
from ..durable.fileio import sha256_file
from ..errors import shell_word
from ..files.weights_file import WeightsFile, paths_of
from .config import AdapterConfig, is_in_listed_module
from .updates.replace import ReplaceTensor
from .updates.update import Update, UpdateSpec

# (key of WEIGHED, or pattern; weight): the last row that matches a module counts (`module_weights.weight_of`)
ModuleWeights = tuple[tuple[str, float], ...]

UNREAD = "0" * 64  # placeholder for the hash of a file, where only its length matters


@dataclass(frozen=True)
class Adapter:
    """An open adapter: its updates by module path, and the file that holds their tensors."""

    name: str  # as the user gave it
    format: str  # a key of `adapters.formats.FORMATS`
    file: WeightsFile
    config: AdapterConfig
    updates: Mapping[str, UpdateSpec]  # module path -> update
    flattened: bool = False  # the paths are kohya's, with `_` for dots
    notes: tuple[str, ...] = ()  # sentences for the user
    missing: tuple[str, ...] = ()  # sentences on what the config lists and the file lacks
    module_weights: ModuleWeights = ()  # weights that replace the adapter's, by module
    extras: tuple[str, ...] = ()  # tensors in the file that no weight could hold; they are not in its specs
    own_names: tuple[str, ...] = ()  # modules still under the format's own names; only a base could resolve them
    by_order: bool = False  # the file numbers its layers by their order, so the base must have as many
    only_for: str = ""  # the program whose row order or formula it is for; empty for the model's
    excluded: tuple[str, ...] = ()  # modules and extras excluded by --drop
    known_sha256: str = ""  # hash of the weights file, if known without reading it

    @property
    def base_hint(self) -> str:
        """A sentence for remedies that names the base it was trained on; empty if the config names none."""
        base = self.config.base_model
        return f"{self.name} says it was trained on {shell_word(base)}" if base else ""

    def only(self, modules: Iterable[str]) -> Adapter:
        """Return the adapter restricted to these modules."""
        wanted = frozenset(modules)
        return replace(self, updates={module: update for module, update in self.updates.items() if module in wanted})

    def load(self, spec: UpdateSpec) -> Update:
        """Read the tensors of one update.

        Raises:
            InputError: a tensor holds nan or inf.
        """
        return spec.cls.load(spec, self.file, self.name)

    def in_modules_to_save(self, module: str) -> bool:
        """Return whether `module` is, or is inside, a module that the config lists in modules_to_save.

        PEFT adds a classifier's head to that list when it loads, and early versions wrote the list without it.
        """
        listed = self.config.peft.get("modules_to_save") or []
        if not isinstance(listed, list) or self.updates[module].cls is not ReplaceTensor:
            return False
        if self.config.peft.get("task_type") in (*TASKS,):  # a damaged config may have a list here
            listed = [*listed, *PEFT_HEADS]
        return any(isinstance(entry, str) and is_in_listed_module(entry, module) for entry in listed)

    def is_duplicate_bias(self, module: str, others: Container[str]) -> bool:
        """Return whether `module` is a head's bias that `others` has under the owner's name with the same values.

        In transformers, `cls.predictions.decoder.bias` is `cls.predictions.bias`; PEFT saves both.
        """
        owner, _, last = module.rpartition(".")
        other = f"{owner.rpartition('.')[0]}.{last}"
        if other not in others or not all(self.updates[m].cls is ReplaceTensor for m in (module, other)):
            return False
        value, other_value = (self.updates[path].tensors["value"] for path in (module, other))
        return self.file.specs[value] == self.file.specs[other_value] and self.file.read(value) == self.file.read(
            other_value
        )

    @cached_property
    def sha256(self) -> str:
        """The hash of the weights file, as `sha256sum` prints it; for several files, the hash of their hashes."""
        if self.known_sha256:
            return self.known_sha256
        hashes = [sha256_file(path) for path in paths_of([self.file])]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    @cached_property
    def scales_sha256(self) -> str:
        """The hash of what is not in the weights file: each module's scale and the indices of its rows."""
        lines = [
            " ".join([module, spec.scale.hex(), *map(str, spec.detail.hashed if spec.detail else ())])
            for module, spec in sorted(self.updates.items())
        ]
        return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
