"""Copy the modules of sentence-transformers that were trained with an adapter, and warn of those that cannot be copied.

sentence-transformers saves all modules of the model beside its adapter. A dense layer is trained unless it is frozen,
so the base's would be wrong after the adapter's transformer.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ...files.checkpoint import open_weights
from ...files.folder.sentence_transformers import DENSE, module_folders, transformer_folder
from ...files.folder.side_files import is_copy, matches
from .merge_plan import MergePlan

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"  # the weights of a dense layer


def take_trained_modules(plan: MergePlan, is_file: bool) -> MergePlan:
    """Return the plan with the weights of dense layers beside an adapter, if they differ from the base's.

    They are copied only from one adapter of weight 1, and only if both files are safetensors of the same shapes. Any
    other case is a warning.

    Args:
        is_file: whether the output is a single file, which has no modules.

    Raises:
        InputError: a folder's modules.json names modules outside the folder, or a module's weights are damaged.
    """
    if is_file or plan.base.parts:
        return plan
    root = plan.base.root
    for adapter, weight in plan.adapters:
        folder = adapter.file.path.parent
        folders = [name for name in module_folders(folder) if name != transformer_folder(folder)]
        absent = [name for name in folders if not (root / name).is_dir()]
        other = [name for name in folders if name not in absent and _has_other_weights(folder / name, root / name)]
        alone = len(plan.adapters) == 1 and weight == 1 and not adapter.module_weights
        if absent:
            what = (
                f"{adapter.name} has modules of sentence-transformers that the base does not have ({', '.join(absent)})"
            )
            plan = replace(plan, warnings=(*plan.warnings, f"{what}: they are not in the output"))
        if other and alone and all(_is_alike(folder / name, root / name) for name in other):
            files = {f"{name}/{SAFE}": folder / name / SAFE for name in other}
            edits = replace(plan.edits, files={**plan.edits.files, **files})
            note = f"modules: {', '.join(other)} as beside {adapter.name}, trained with it"
            plan = replace(plan, edits=edits, notes=(*plan.notes, note))
        elif other:
            what = f"{adapter.name} has other weights than the base in {', '.join(other)}, which the output keeps"
            why = "copy the folder over if it was trained with the adapter"
            plan = replace(plan, warnings=(*plan.warnings, f"{what}: {why}"))
    return plan


def _has_other_weights(folder: Path, base: Path) -> bool:
    files = [name for name in (SAFE, PICKLED) if (folder / name).is_file()]
    equal = (name for name in files if (base / name).is_file() and is_copy(folder / name, base / name))
    return bool(files) and not any(equal)


def _is_alike(folder: Path, base: Path) -> bool:
    """Return whether the weights of two modules have the same names, types and shapes, in safetensors."""
    if not (folder / SAFE).is_file() or not (base / SAFE).is_file() or not matches(f"{folder.name}/{SAFE}", DENSE):
        return False
    with closing(open_weights(folder / SAFE)) as ours, closing(open_weights(base / SAFE)) as theirs:
        return ours.specs == theirs.specs
