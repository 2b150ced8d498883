"""Define what a format of adapters is: it recognizes files, reads them, names tensors, writes, and says what it holds.

A subclass of `Format` is one convention in one file, and an instance of it a row of the table `FORMATS`. Commands and
their options know formats only through the table, so that a new one is a file and a row. Its container is its own:
`Format.write` may write any file or folder.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, final

from ...architectures.families import FAMILIES
from ...architectures.families.table import DENOISERS, Naming
from ...durable.partial import partial_place
from ...errors import InputError, UsageError
from ...files.containers.virtual import VirtualFile
from ...files.output.output import CONTAINERS
from ...files.output.paths import check_output_name
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..config import AdapterConfig
from ..updates.update import Update, UpdateSpec
from .content import AdapterContent, NewModule
from .peft_config import config_of_component
from .single_file import fill_file

# The bases that a format can be the usual one for, in the order in which formats are listed: a model's folder, a single
# file of an image model under its makers' names, a diffusers pipeline.
BASES = ("model", "single file", "pipeline")


@dataclass(frozen=True)
class Capabilities:
    """List what files of a format hold."""

    kinds: frozenset[type[Update]]  # that are written as they are; what is read goes by the tensors' roles
    writes: bool  # whether loratool writes them
    components: Literal["one", "many"]  # models that a file is for: any one, or the parts of an image model
    # where a module's alpha stands: in a tensor, in a config, in the metadata by component, or nowhere
    alpha: Literal["tensor", "config", "metadata", "none"]
    usual_for: str | None = None  # of BASES: it is the format of an adapter made for one, if no other is asked for
    folder: bool = False  # an output can be a folder; else it is one file
    starts: bool = False  # they say which initialization changed the base
    kernels: bool = True  # a convolution's factors keep its kernel
    one_scale: bool = False  # all modules have one scale, and one rank
    input_norms: bool = False  # they tell DoRA along the inputs from DoRA along the outputs
    zero_alpha_is_rank: bool = False  # an alpha of 0 stands for the rank
    told_by_model: bool = False  # config.json of --base tells their names, or the order of their rows
    named_by_model: bool = False  # and these are those of a file of the base, so that nothing is written without it
    slices: bool = False  # they do not say which slices of a fused module are adapted, and --enable-lora does


@dataclass(frozen=True)
class ReadOptions:
    """Tell a reader what the file may not say."""

    alpha: float | None = None  # for files that do not say it; it must not contradict one that does
    lenient: bool = False  # record a module's missing factor, rank or alpha in `UpdateSpec.fault`, raise no error
    # which slices of its rows a MergedLinear adapts; empty if the option was not given, None if there is no such option
    enabled_slices: tuple[bool, ...] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)  # the base's config.json; empty if no base is at hand


class Format(ABC):
    """One convention of adapters on disk."""

    key: ClassVar[str]  # for --from and --to
    title: ClassVar[str]  # for the help of --to
    can: ClassVar[Capabilities]
    ends: ClassVar[Mapping[str, str]] = {}  # role -> how the names of new tensors end
    container: ClassVar[str] = "safetensors"  # a key of CONTAINERS
    loaded_by: ClassVar[tuple[str, ...]] = ()  # keys of RUNTIMES that read it instead of the usual one of a model

    @abstractmethod
    def claims(self, names: Iterable[str]) -> bool:
        """Return whether tensors of these names are of this format."""

    def claims_config(self, fields: Mapping[str, Any]) -> bool:
        """Return whether a config is this format's, so that tensors beside it are whose names do not tell."""
        return False

    @abstractmethod
    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`, which the user calls `name`.

        Raises:
            InputError: a tensor is not one that the format can hold.
            NeedsFlag: the file does not say what an option could.
            UsageError: the alpha of `options` contradicts the file.
        """

    def module_name(self, component: str, path: str, family: str) -> str:
        """Return an image model's module in this format's names.

        Args:
            path: in the names of `naming`.
            family: a key of FAMILIES.
        """
        return path

    @final
    def require_prefix(self, prefix: str, component: str, path: str, family: str) -> str:
        """Return what a component's modules begin with in this format's files.

        Raises:
            InputError: it is empty, as there are no such files of that model.
        """
        if not prefix:
            part = "the denoiser" if component in DENOISERS else component
            message = f"is of {part} of {FAMILIES[family].title}, of which there are no {self.key} files"
            raise InputError(message, culprit=path, remedy="convert to diffusers")
        return prefix

    def naming(self, family: str) -> Naming:
        """Return whose names a denoiser's modules have: its maker's (sgm's, Black Forest Labs'), or another's."""
        return Naming.DIFFUSERS

    @final
    def tensor_name(self, module: str, role: str) -> str:
        """Return the name of a module's tensor; `role` is a key of `ends`."""
        return f"{module}.{self.ends[role]}"

    def magnitude_shape(self, rows: int, ones: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of DoRA's magnitudes of the rows of a matrix; of a kernel's sizes `ones` are as many 1."""
        return (1, rows, *ones) if ones else (rows,)

    def names(self, source: Adapter, kept: Mapping[str, UpdateSpec]) -> dict[str, tuple[str, str]]:
        """Return the names that the tensors of a language model's adapter get, each with its module and role.

        The role of a weight under the factors (`UpdateSpec.base`) is `base`; `misfits` refuses those without a name.
        """
        if self.can.components == "many":
            raise UsageError(f"{self.key} files are for image models")
        return {self.tensor_name(m, role): (m, role) for m, update in kept.items() for role in update.tensors}

    def misfits(self, source: Adapter, kept: Mapping[str, UpdateSpec], model: Mapping[str, Any]) -> dict[str, str]:
        """Return what of a language model's adapter the format cannot hold, each module with what it is.

        Args:
            model: the base's config.json; empty if it is not known.

        Raises:
            NeedsFlag: only the base could tell.
        """
        columns = (module for module, update in kept.items() if update.along_inputs and not self.can.input_norms)
        # with the base's file at hand, the new weight is compared with the base's
        based = {module: update for module, update in kept.items() if update.base and not self.can.named_by_model}
        named = {module for module, role in self.names(source, based).values() if role == "base"} if based else set()
        return {
            **dict.fromkeys(columns, "DoRA with norms of its inputs"),
            **dict.fromkeys(based.keys() - named, f"a new weight under its factors, which {self.key} has no place for"),
        }

    def model_notes(self, model: Mapping[str, Any]) -> tuple[str, ...]:
        """Return sentences for the user on what of a language model is not known, given its config.json or none."""
        return ()

    def describe(
        self, family: str, former: Mapping[str, str], modules: Mapping[str, NewModule]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return PEFT's config and the metadata for an image model's modules, by name.

        Args:
            former: what the source's metadata says that stays true.
        """
        return config_of_component(modules), {**former, "format": "pt"}

    def notes(self, family: str, modules: Mapping[str, NewModule]) -> tuple[str, ...]:
        """Return sentences for the user on what loaders do not read of an image adapter."""
        return ()

    def edited_name(self, name: str, named: Collection[str]) -> str:
        """Return the name of a tensor in an edited adapter; `named` are adapters' names that keys may contain."""
        return name

    def edited_alpha(self, module: str) -> str | None:
        """Return the name of the alpha beside edited factors of scale 1, or None where that needs none."""
        return None

    def edited_metadata(self, config: AdapterConfig, ranks: Mapping[str, int]) -> dict[str, str]:
        """Return the metadata that loaders need beside edited factors of these ranks by module."""
        return {}

    @final
    def output(self, out: str | os.PathLike[str] | None, name: str, in_folder: bool = True) -> tuple[Path, bool]:
        """Return the path of an output and whether it is a file; `name` is that of a folder where `out` is not given.

        Args:
            in_folder: without `out`, a folder is preferred to a file.

        Raises:
            UsageError: `out` is no name for one, or for a folder where the format has single files.
        """
        ending = CONTAINERS[self.container][0]
        preferred = name if in_folder and self.can.folder else name + ending
        path, is_file = check_output_name(preferred if out is None else out, self.container)
        if not (is_file or self.can.folder):
            raise UsageError(f"{self.key} adapters are single files", culprit=str(path), remedy=f"name it X{ending}")
        return path, is_file

    def in_other_names(self, adapter: Adapter) -> Adapter:
        """Return an adapter that `read` made under the names that other formats have for its modules.

        Raises:
            NeedsFlag: only the base tells them.
            InputError: they are not known.
        """
        return adapter

    def spelling(self, tensor: str) -> str:
        """Return how a factor's name ends, where a format has several spellings of it; else nothing."""
        return ""

    def as_file(self, content: AdapterContent) -> AdapterContent:
        """Return the tensors, under the names, and the metadata that a file of them has, for `read`."""
        return content

    @final
    def opened(self, name: str, like: WeightsFile, content: AdapterContent) -> Adapter:
        """Return the adapter that opening a file of this content would give, without writing it.

        Args:
            like: an open file that it is made of, as in `VirtualFile`.
        """
        stored = self.as_file(content)
        file = VirtualFile(like, stored.specs, stored.load, stored.metadata)
        alpha = 1.0 if self.can.alpha == "none" else None
        return self.read(name, file, ReadOptions(alpha, model=content.model))

    def write(self, path: Path, is_file: bool, content: AdapterContent, inputs: Collection[WeightsFile]) -> None:
        """Write an adapter, whole or not at all, as `fill` does."""
        with partial_place(path, is_file) as place:
            self.fill(place, content, inputs)

    def fill(self, place: Path | BinaryIO, content: AdapterContent, inputs: Collection[WeightsFile]) -> None:
        """Write an adapter into a folder or a file of `partial_place`.

        Args:
            inputs: the files that the tensors are made of.

        Raises:
            InputError: one of `inputs` changed meanwhile.
        """
        assert not isinstance(place, Path), "a format with folders fills them itself"
        stored = self.as_file(content)
        fill_file(place, stored.specs, stored.load, stored.metadata, inputs)
