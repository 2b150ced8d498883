"""Rename a denoiser's tensors to its maker's names or diffusers', as a checkpoint that is streamed like any other.

Both spellings have the same numbers in the same types: rows are split, concatenated and moved as bytes. If a file also
has text encoders and a VAE, --drop selects the denoiser alone.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...architectures.components import DENOISER_PREFIXES, FOLDERS
from ...architectures.families import FAMILIES
from ...architectures.families.detect import detect
from ...architectures.families.table import ModelFamily, Naming
from ...architectures.image import image_modules
from ...architectures.renamed_tensors import RenamedTensor, count_missing, rename_tensors, unknown_tensors
from ...binding.modules.image_modules import KNOWN
from ...errors import InputError, NeedsFlag, UsageError, shell_word
from ...files.checkpoint import Checkpoint
from ...files.containers.regrouped import RegroupedFile, StoredRows
from ...files.dtypes import DTYPES, TensorSpec
from ...files.folder.model_folder import SINGLE_NAMES
from ...files.output.paths import check_output_name
from ..choices import DENOISER_DROP_CHOICES
from ..namings import MODEL_NAMINGS
from .shared_tensors import find_shared_storage

(COMPONENTS,) = DENOISER_DROP_CHOICES

FOLDER_NAMING, FILE_NAMING = MODEL_NAMINGS


@dataclass(frozen=True)
class RenamedDenoiser:
    """A denoiser under other names."""

    family: ModelFamily
    checkpoint: Checkpoint  # of one file that is nowhere
    left_out: tuple[str, ...]  # tensors of the input that it does not have
    renamed: int  # tensors that have another name now, but for a prefix
    regrouped: int  # tensors that are not one tensor of the input as it was
    lacking: tuple[str, ...]  # of the maker's tensors, those that diffusers does not have

    def notes(self, to: str) -> Iterator[str]:
        """Yield notes on what loaders need besides the tensors."""
        if to == FOLDER_NAMING and not self.checkpoint.config:
            yield f"to load it, diffusers needs the config.json of its {self.family.diffusers_class} beside it"
        if self.lacking:
            yield f"the maker's file also has {', '.join(self.lacking)}, which diffusers does not have"


def place_denoiser(out: str | os.PathLike[str] | None, to: str) -> tuple[Path, bool]:
    """Return the output's path, and whether it is a single file.

    Raises:
        UsageError: a folder for the naming of single files.
    """
    if out is None:
        return (Path("converted"), False) if to == FOLDER_NAMING else (Path("converted.safetensors"), True)
    path, is_file = check_output_name(out)
    if to == FILE_NAMING and not is_file:
        raise UsageError(f"--to {to} writes a file", culprit=str(path), remedy="name a .safetensors file with -o")
    return path, is_file


def rename_denoiser(base: Checkpoint, to: str, removed: Collection[str], alone: bool) -> RenamedDenoiser:
    """Return the denoiser of a checkpoint under the names of `to`, a key of MODEL_NAMINGS.

    Args:
        removed: tensors that are excluded in any case.
        alone: whether everything besides the denoiser is excluded too.

    Raises:
        NeedsFlag: there is more than the denoiser.
        InputError: there is no known denoiser, it is quantized, or its tensors are not those of the tables.
    """
    _refuse(base, removed)
    specs = {name: spec for name, spec in base.stored.items() if name not in removed}
    family, prefix, tensors, unused = _rename(base, specs, Naming.DIFFUSERS if to == FOLDER_NAMING else Naming.MAKER)
    if to == FOLDER_NAMING and not family.diffusers_class:
        raise InputError(f"is {family.title}; diffusers has no class for it", culprit=str(base.path))
    for model, start in family.unrenamed.items():
        if to == FILE_NAMING and any(name.startswith(start) for name in tensors):
            raise InputError(
                f"is {model}; its maker uses diffusers' names",
                culprit=str(base.path),
                remedy=f"use --to {FOLDER_NAMING} -o X.safetensors",
            )
    new = {name: TensorSpec(_dtype_of(name, tensor, specs), tensor.shape) for name, tensor in tensors.items()}
    beside = [name for name in specs if not _is_inside(name, prefix)]
    if beside and not alone:
        starts = (prefix if name.startswith(prefix) else "" for name in beside)
        firsts = (
            start + name.removeprefix(start).partition(".")[0] for start, name in zip(starts, beside, strict=True)
        )
        parts = ", ".join(f"{first}.*" for first in dict.fromkeys(firsts))
        raise NeedsFlag(
            f"has {len(beside)} tensors beside its denoiser ({parts})",
            culprit=str(base.path),
            flags=f"--drop {COMPONENTS}",
            why="to exclude them",
        )
    rows = {
        name: [StoredRows(base.shard_of[each.tensor], each.tensor, each.start, each.stop) for each in tensor.rows]
        for name, tensor in tensors.items()
    }
    metadata = {key: value for shard in base.shards for key, value in (shard.metadata or {"format": "pt"}).items()}
    file = RegroupedFile(base.shards[0], base.folder / SINGLE_NAMES[1], new, rows, metadata)
    own_config = base.config.get("_class_name") == family.diffusers_class or not base.given_as_file
    configured = to == FOLDER_NAMING and "_class_name" in base.config and own_config
    config = base.config if configured else {}
    unsplit = [
        n for n, each in tensors.items() if len(each.rows) == 1 and each.shape == specs[each.rows[0].tensor].shape
    ]
    maker_only = (*family.unused, *(f"{start}*" for start in family.beside))
    return RenamedDenoiser(
        family,
        Checkpoint(base.path, base.folder, not configured, (file,), None, config),
        (*(name for name in base.stored if name in removed), *(beside if alone else ()), *unused),
        sum(tensors[name].rows[0].tensor != prefix + name for name in unsplit),
        len(tensors) - len(unsplit),
        tuple(name for name in maker_only if to == FILE_NAMING and name not in tensors),
    )


def _refuse(base: Checkpoint, removed: Collection[str]) -> None:
    """Raise InputError for checkpoints that cannot be renamed tensor by tensor."""
    culprit = str(base.path)
    if base.parts:
        unet = next((part.path for part in base.parts if FOLDERS.get(part.prefix[:-1]) == "unet"), None)
        raise InputError(
            "is a pipeline; convert takes one component",
            culprit=culprit,
            remedy=f"pass {shell_word(unet)}" if unet else None,
        )
    if base.weights or base.coded or base.declared:
        raise InputError(
            f"is quantized ({base.quantized}), so its tensors cannot be renamed",
            culprit=culprit,
            remedy="dequantize it first, with convert --dtype bf16",
        )
    shared = find_shared_storage(base, removed)
    if shared:
        name, other = next(iter(shared.items()))
        raise InputError(f"shares its storage with {other}, which no known denoiser does", culprit=name)


def _is_inside(name: str, prefix: str) -> bool:
    """Return whether a tensor belongs to the denoiser."""
    starts = (start for family in FAMILIES.values() for start in family.beside)
    return name.startswith(prefix) and not name.removeprefix(prefix).startswith(tuple(starts))


def _rename(
    base: Checkpoint, specs: Mapping[str, TensorSpec], to: Naming
) -> tuple[ModelFamily, str, dict[str, RenamedTensor], tuple[str, ...]]:
    """Return the denoiser's family, the prefix of its tensors, the renamed tensors, and the names without a new one.

    The table of the family has all of the tensors, and the config names its class, if there is a config. If several
    families fit and name tensors differently, widths and numbers of blocks decide, if they point to the same family
    as the fewest missing modules outside of the blocks.

    Raises:
        InputError: no family has all of the tensors, two call them otherwise, or one's tensors are not complete.
    """
    unet = image_modules({name: spec.shape for name, spec in specs.items()}).parts.get("unet")
    if unet is None or unet.table is None:
        raise InputError(f"has no known denoiser ({KNOWN})", culprit=str(base.path))
    path, name = next(iter(unet.tensors.items()))
    prefix = next(prefix for prefix in DENOISER_PREFIXES if name.startswith(prefix + path))
    shapes = {name: spec.shape for name, spec in specs.items() if _is_inside(name, prefix)}
    marked = [f for f in FAMILIES.values() if any(mark in name for mark in f.marks for name in specs)]
    marked = [unet.table, *(family for family in marked if family is not unet.table)]
    likely = [family for family in marked if family.diffusers_class == base.config.get("_class_name")] or marked
    fitting = [family for family in likely if not unknown_tensors(family, shapes, prefix)] or likely[:1]
    renamed, errors = {}, {}
    for family in fitting:
        try:
            renamed[family] = rename_tensors(family, shapes, to, prefix)
        except InputError as error:
            errors[family] = error
    if errors or any(renamed[family] != renamed[fitting[0]] for family in fitting):
        fitting = _likeliest(fitting, shapes, prefix) or fitting
    first, *others = fitting
    if first in errors and not any(family in renamed for family in others):
        raise errors[first]
    other = next((family for family in others if renamed.get(family) != renamed.get(first)), None)
    if other:
        raise InputError(
            f"can be {first.title} or {other.title}, which name their tensors differently",
            culprit=str(base.path),
            remedy="put the model's config.json beside it",
        )
    return first, prefix, *renamed[first]


def _likeliest(
    families: Sequence[ModelFamily], shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> list[ModelFamily]:
    """Return the families that fit the sizes and miss the fewest modules. Empty if these are different families."""
    weights = {name: shape for name, shape in shapes.items() if name.endswith(".weight")}
    modules = [("unet", name.removeprefix(prefix).removesuffix(".weight"), shape) for name, shape in weights.items()]
    likely = set(families).intersection(detect(modules)) or set(families)
    missing = {family: count_missing(family, shapes, prefix) for family in families}
    return [family for family in families if family in likely and missing[family] == min(missing.values())]


def _dtype_of(name: str, tensor: RenamedTensor, specs: Mapping[str, TensorSpec]) -> str:
    """Return the dtype of a tensor.

    Raises:
        InputError: its rows have several dtypes, or are not a whole number of bytes.
    """
    first, *others = (each.tensor for each in tensor.rows)
    dtype = specs[first].dtype
    other = next((each for each in others if specs[each].dtype != dtype), None)
    if other:
        raise InputError(
            f"is {dtype}, but {other} is {specs[other].dtype}, and both become rows of {name}",
            culprit=first,
            remedy="first run `loratool convert` with --dtype only",
        )
    if DTYPES[dtype] < 8:
        raise InputError(f"has dtype {dtype}, and its rows can end within a byte", culprit=first)
    return dtype
