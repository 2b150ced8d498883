"""Represent an adapter of any format as a lazy mapping from module path to update.

All of it comes from headers, the config and scalar alphas, so that plans, binding and `inspect` need no
torch; `Adapter.load` reads the tensors of one update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..durable.fileio import sha256_file
from ..errors import shell_word
from ..files.weights_file import WeightsFile, paths_of
from .config import AdapterConfig, is_in_listed_module
from .updates.replace import ReplaceTensor
from .updates.update import Update, UpdateSpec

# (key of WEIGHED, or pattern; weight): the last that matches a module wins (`module_weights.weight_of`)
ModuleWeights = tuple[tuple[str, float], ...]

UNREAD = "0" * 64  # for the hash of a file where only its length counts


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
    missing: tuple[str, ...] = ()  # sentences on what the config announces and the file does not have
    module_weights: ModuleWeights = ()  # where they are not the adapter's
    extras: tuple[str, ...] = ()  # tensors that no weight could hold, which stand in the file and not in its specs
    own_names: tuple[str, ...] = ()  # modules under names that the format alone has, since no base told others
    only_for: str = ""  # the runtime in whose order its rows are; empty for the order of the model
    left_out: tuple[str, ...] = ()  # modules and extras that --drop has left out
    known_sha256: str = ""  # of the weights file, where it need not be read for that

    @property
    def base_hint(self) -> str:
        """A sentence on the base that it was trained on, for a remedy; empty if the config does not name one."""
        base = self.config.base_model
        return f"{self.name} says it was trained on {shell_word(base)}" if base else ""

    def only(self, modules: Iterable[str]) -> Adapter:
        """Return the adapter with these of its modules alone."""
        wanted = frozenset(modules)
        return replace(self, updates={module: update for module, update in self.updates.items() if module in wanted})

    def load(self, spec: UpdateSpec) -> Update:
        """Read the tensors of one update.

        Raises:
            InputError: a tensor holds nan or inf.
        """
        return spec.cls.load(spec, self.file, self.name)

    def in_modules_to_save(self, module: str) -> bool:
        """Return whether `module` is, or is inside, a module that the config lists in modules_to_save."""
        listed = self.config.peft.get("modules_to_save")
        if not isinstance(listed, list) or self.updates[module].cls is not ReplaceTensor:
            return False
        return any(isinstance(entry, str) and is_in_listed_module(entry, module) for entry in listed)

    def is_duplicate_bias(self, module: str, others: Container[str]) -> bool:
        """Return whether `module` is a head's bias that is in `others` under the owner's name, with the same values.

        `cls.predictions.decoder.bias` is `cls.predictions.bias` in transformers, and PEFT saves both.
        """
        owner, _, last = module.rpartition(".")
        other = f"{owner.rpartition('.')[0]}.{last}"
        if other not in others or not all(self.updates[m].cls is ReplaceTensor for m in (module, other)):
            return False
        one, two = (self.updates[path].tensors["value"] for path in (module, other))
        return self.file.specs[one] == self.file.specs[two] and self.file.read(one) == self.file.read(two)

    @cached_property
    def sha256(self) -> str:
        """The hash of the weights file, as `sha256sum` prints it; of several files that of their hashes in a row."""
        if self.known_sha256:
            return self.known_sha256
        hashes = [sha256_file(path) for path in paths_of([self.file])]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    @cached_property
    def scales_sha256(self) -> str:
        """The hash of what the weights file does not determine: each module's scale and the indices of its rows."""
        lines = [
            " ".join([module, spec.scale.hex(), *map(str, spec.detail.hashed if spec.detail else ())])
            for module, spec in sorted(self.updates.items())
        ]
        return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
