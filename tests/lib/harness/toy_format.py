"""Define a format that nobody has, as one class: what a new format costs is held by `test_seams_format`.

Its tensors stand transposed and its folder has a config of its own, as no other format's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar, final

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.content import AdapterContent
from loratool.adapters.formats.format import Capabilities, Format, ReadOptions
from loratool.adapters.formats.peft_config import parse_config
from loratool.adapters.formats.single_file import write_single_file
from loratool.adapters.updates.headers import spec_from_roles
from loratool.adapters.updates.low_rank import LowRank
from loratool.adapters.updates.update import UpdateSpec
from loratool.durable.fileio import write_file
from loratool.files.containers.virtual import VirtualFile
from loratool.files.dtypes import TensorSpec
from loratool.files.weights_file import WeightsFile

if TYPE_CHECKING:
    from loratool.numerics.arrays import Numbers

ROLES = {"toy_a": "A", "toy_b": "B"}


def turned(content: AdapterContent | WeightsFile) -> dict[str, TensorSpec]:
    return {name: replace(spec, shape=spec.shape[::-1]) for name, spec in content.specs.items()}


@final
class Toy(Format):
    """Folders or files of transposed factors of one model, with a config beside them or in the metadata."""

    key = "toy"
    title = "toy: a folder of toy_a and toy_b"
    can = Capabilities(
        kinds=frozenset({LowRank}), writes=True, components="one", alpha="config", folder=True, kernels=False
    )
    ends: ClassVar[Mapping[str, str]] = {role: end for end, role in ROLES.items()}

    def claims(self, names: Iterable[str]) -> bool:
        return any(name.endswith(tuple(f".{end}" for end in ROLES)) for name in names)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        stored = (file.metadata or {}).get("toy") or (file.path.parent / "toy.json").read_text()
        config = parse_config(name, {**json.loads(stored), "peft_type": "LORA"}, options.alpha)
        found: dict[str, dict[str, str]] = {}
        for tensor in file.specs:
            module, _, end = tensor.rpartition(".")
            found.setdefault(module, {})[ROLES[end]] = tensor
        seen = VirtualFile(file, turned(file), lambda key: file.numbers(key).T, {})
        updates = {m: spec_from_roles(m, r, seen, config, lenient=options.lenient) for m, r in found.items()}
        return Adapter(name, self.key, seen, config, updates)

    def names(self, source: Adapter, kept: Mapping[str, UpdateSpec]) -> dict[str, tuple[str, str]]:
        return {self.tensor_name(m, role): (m, role) for m, update in kept.items() for role in update.tensors}

    def as_file(self, content: AdapterContent) -> AdapterContent:
        def load(key: str) -> Numbers:
            return content.load(key).T

        return AdapterContent(turned(content), load, content.config, {"toy": json.dumps(content.config)})

    def fill(self, place: Path | BinaryIO, content: AdapterContent, inputs: Collection[WeightsFile]) -> None:
        if not isinstance(place, Path):
            super().fill(place, content, inputs)
            return
        stored = self.as_file(content)
        write_single_file(place / "toy.safetensors", stored.specs, stored.load, {}, inputs)
        write_file(place / "toy.json", json.dumps(content.config).encode())
