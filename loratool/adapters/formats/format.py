"""Interface of adapter formats: recognize and read files, name tensors, write files, and list what they can store.

A subclass of `Format` is one convention in one module; an instance of it is a row of the table `FORMATS`. Commands and
their options use formats only through the table, so a new format is a module and a row. `Format.write` may write any
file or folder.
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

# The bases that have a default format, in the order in which formats are listed: a model's folder, a single file of an
# image model under its maker's names, a diffusers pipeline.
BASES = ("model", "single file", "pipeline")


@dataclass(frozen=True)
class Capabilities:
    """The features that files of a format can store."""

    kinds: frozenset[type[Update]]  # kinds that are written unchanged; reading depends on the tensors' roles
    writes: bool  # whether loratool writes them
    components: Literal["one", "many"]  # models in a file: one, or the components of an image model
    # where a module's alpha is: in a tensor, in a config, in the metadata by component, or nowhere
    alpha: Literal["tensor", "config", "metadata", "none"]
    usual_for: str | None = None  # a base of BASES that has this as its default format
    folder: bool = False  # an output can be a folder; otherwise it is one file
    starts: bool = False  # files record which initialization changed the base
    kernels: bool = True  # a convolution's factors keep its kernel
    one_scale: bool = False  # all modules have one scale and one rank
    input_norms: bool = False  # files distinguish DoRA along the inputs from DoRA along the outputs
    zero_alpha_is_rank: bool = False  # an alpha of 0 means the rank
    depends_on_base: bool = False  # names or row order depend on config.json of --base
    named_by_model: bool = False  # names are those of a file of the base, so that writing needs the base
    slices: bool = False  # files do not record which slices of a fused module are adapted; --enable-lora gives them


@dataclass(frozen=True)
class ReadOptions:
    """Facts for a reader that the file may lack."""

    alpha: float | None = None  # for files without an alpha; it must not contradict a stored one
    lenient: bool = False  # record a module's missing factor, rank or alpha in `UpdateSpec.fault`, raise no error
    # which slices of its rows a MergedLinear adapts; empty if the option was not given, None if there is no such option
    enabled_slices: tuple[bool, ...] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)  # the base's config.json; empty without a base


class Format(ABC):
    """One convention of adapters on disk."""

    key: ClassVar[str]  # for --from and --to
    title: ClassVar[str]  # for the help of --to
    can: ClassVar[Capabilities]
    ends: ClassVar[Mapping[str, str]] = {}  # role -> suffix of the names of new tensors
    flattened: ClassVar[bool] = False  # modules' names have `_` for the dots of their paths
    # what an image model's module has without factors, a key of VALUE_ENDS -> suffix of the name of its new tensor
    value_ends: ClassVar[Mapping[str, str]] = {}
    container: ClassVar[str] = "safetensors"  # a key of CONTAINERS
    loaded_by: ClassVar[tuple[str, ...]] = ()  # keys of PROGRAMS that read it instead of a model's default format
    also_loaded_by: ClassVar[tuple[str, ...]] = ()  # others that look for all of its names, and get another format

    @abstractmethod
    def claims(self, names: Iterable[str]) -> bool:
        """Return whether tensors of these names are of this format."""

    def claims_config(self, fields: Mapping[str, Any]) -> bool:
        """Return whether a config is this format's; it decides where the tensors' names do not."""
        return False

    @abstractmethod
    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`; `name` is what the user typed.

        Raises:
            InputError: a tensor is not of this format.
            NeedsFlag: the file lacks something that an option could give.
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
        """Return the prefix of a component's modules in this format's files.

        Raises:
            InputError: it is empty, because this format has no files of that model.
        """
        if not prefix:
            part = "the denoiser" if component in DENOISERS else component
            message = f"is for {part} of {FAMILIES[family].title}, and {self.key} has no files for it"
            raise InputError(message, culprit=path, remedy="convert to diffusers")
        return prefix

    def naming(self, family: str) -> Naming:
        """Return the spelling of a denoiser's modules: its maker's (sgm's, Black Forest Labs'), or another."""
        return Naming.DIFFUSERS

    @final
    def tensor_name(self, module: str, role: str) -> str:
        """Return the name of a module's tensor; `role` is a key of `ends`."""
        return f"{module}.{self.ends[role]}"

    def magnitude_shape(self, rows: int, ones: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of DoRA's magnitudes along the rows; `ones` has a 1 for each size of a kernel."""
        return (1, rows, *ones) if ones else (rows,)

    def names(self, source: Adapter, updates: Mapping[str, UpdateSpec]) -> dict[str, tuple[str, str]]:
        """Return the output name of each tensor of a language model's adapter -> its module and role.

        The role of a weight under the factors (`UpdateSpec.base`) is `base`; `misfits` refuses tensors without a name.
        """
        if self.can.components == "many":
            raise UsageError(f"{self.key} files are for image models")
        return {self.tensor_name(m, role): (m, role) for m, update in updates.items() for role in update.tensors}

    def misfits(self, source: Adapter, updates: Mapping[str, UpdateSpec], model: Mapping[str, Any]) -> dict[str, str]:
        """Return the modules of a language model's adapter that the format cannot store, each with the reason.

        Args:
            model: the base's config.json; empty if unknown.

        Raises:
            NeedsFlag: the answer depends on the base.
        """
        columns = (module for module, update in updates.items() if update.along_inputs and not self.can.input_norms)
        # given the base's file, the new weight is compared with the base's
        based = {module: update for module, update in updates.items() if update.base and not self.can.named_by_model}
        named = {module for module, role in self.names(source, based).values() if role == "base"} if based else set()
        return {
            **dict.fromkeys(columns, "DoRA with norms of its inputs"),
            **dict.fromkeys(based.keys() - named, f"a new weight under its factors, which {self.key} cannot store"),
        }

    def model_notes(self, model: Mapping[str, Any]) -> tuple[str, ...]:
        """Return sentences for the user on what is unknown of a language model, given its config.json or {}."""
        return ()

    def describe(
        self, family: str, former: Mapping[str, str], modules: Mapping[str, NewModule]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return PEFT's config and the metadata for an image model's modules, by name.

        Args:
            former: entries of the source's metadata that still apply.
        """
        return config_of_component(modules), {**former, "format": "pt"}

    def notes(self, family: str, modules: Mapping[str, NewModule]) -> tuple[str, ...]:
        """Return sentences for the user on parts of an image adapter that loaders ignore."""
        return ()

    def edited_name(self, name: str, named: Collection[str]) -> str:
        """Return the name of a tensor in an edited adapter; `named` are adapter names that keys may contain."""
        return name

    def edited_alpha(self, module: str) -> str | None:
        """Return the name of the alpha beside edited factors of scale 1; None if none is needed."""
        return None

    def edited_metadata(self, config: AdapterConfig, ranks: Mapping[str, int]) -> dict[str, str]:
        """Return the metadata that loaders need beside edited factors of these ranks by module."""
        return {}

    @final
    def output(self, out: str | os.PathLike[str] | None, name: str, in_folder: bool = True) -> tuple[Path, bool]:
        """Return the path of an output and whether it is a file; `name` is the default name.

        Args:
            in_folder: without `out`, prefer a folder to a file.

        Raises:
            UsageError: `out` is not a valid name, or names a folder and the format has single files.
        """
        ending = CONTAINERS[self.container][0]
        preferred = name if in_folder and self.can.folder else name + ending
        path, is_file = check_output_name(preferred if out is None else out, self.container)
        if not (is_file or self.can.folder):
            raise UsageError(f"{self.key} adapters are single files", culprit=str(path), remedy=f"name it X{ending}")
        return path, is_file

    def with_standard_names(self, adapter: Adapter) -> Adapter:
        """Return the adapter with the module names of other formats; `adapter` is one that `read` returned.

        Raises:
            NeedsFlag: the names depend on the base.
            InputError: the names are unknown.
        """
        return adapter

    def spelling(self, tensor: str) -> str:
        """Return the suffix of a factor's name if the format has several spellings of it, else ""."""
        return ""

    def as_file(self, content: AdapterContent) -> AdapterContent:
        """Return the content with the names and metadata of a file, as `read` expects them."""
        return content

    @final
    def opened(self, name: str, like: WeightsFile, content: AdapterContent) -> Adapter:
        """Return the adapter that a file of this content would open as, without writing it.

        Args:
            like: an open file that the content is made of, as in `VirtualFile`.
        """
        stored = self.as_file(content)
        file = VirtualFile(like, stored.specs, stored.load, stored.metadata)
        alpha = 1.0 if self.can.alpha == "none" else None
        return self.read(name, file, ReadOptions(alpha, model=content.model))

    def write(self, path: Path, is_file: bool, content: AdapterContent, inputs: Collection[WeightsFile]) -> None:
        """Write an adapter with `fill`, completely or not at all."""
        with partial_place(path, is_file) as place:
            self.fill(place, content, inputs)

    def fill(self, place: Path | BinaryIO, content: AdapterContent, inputs: Collection[WeightsFile]) -> None:
        """Write an adapter into a folder or a file that `partial_place` opened.

        Args:
            inputs: the files that the tensors are made of.

        Raises:
            InputError: one of `inputs` changed during the write.
        """
        assert not isinstance(place, Path), "a format with folders fills them itself"
        stored = self.as_file(content)
        fill_file(place, stored.specs, stored.load, stored.metadata, inputs)
