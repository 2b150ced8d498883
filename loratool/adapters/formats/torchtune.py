"""Read torchtune's format: `adapter_model.pt`, or `adapter_0.pt` of older versions.

Tensors are `layers.0.attn.q_proj.lora_a.weight` (r, in), `.lora_b.weight` (out, r), and DoRA's `.magnitude` (out). Rows
of q and k may be in another order than transformers'. The order depends on the model's config.json: the base's, or the
copy that torchtune writes beside the adapter. Rank and alpha are in `adapter_config.json` beside it, else in the run's
recipe. Defined by torchtune 0.6.1: `torchtune/modules/peft/{lora,dora}.py`,
`torchtune/training/checkpointing/_checkpointer.py`, `torchtune/training/metric_logging.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, final

from ...architectures.heads import KEYS, QUERIES, halves_of_pairs, heads_of
from ...architectures.torchtune import HEAD, IN_LAYERS, INTERLEAVED, ROTATED
from ...errors import InputError, NeedsFlag
from ...files.checkpoint import read_folder_config
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..updates.dora import DoRA
from ..updates.low_rank import LowRank
from .format import Capabilities, Format, ReadOptions
from .made_tensors import MadeTensor, copied, made_of
from .peft import read_as_peft
from .peft_config import find_config
from .plain_yaml import read_plain_yaml

if TYPE_CHECKING:
    from ...numerics.forms import Bits

_NAME = re.compile(r"(?:layers\.(\d+)\.)?(.+)\.(lora_a\.weight|lora_b\.weight|magnitude)")

RECIPE = "torchtune_config.yaml"

_ENDS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


@final
class Torchtune(Format):
    """Torch files of one model's factors, under torchtune's names."""

    key = "torchtune"
    title = "torchtune: its adapter_model.pt, read only"
    can = Capabilities(
        kinds=frozenset({LowRank, DoRA}),
        writes=False,
        components="one",
        alpha="config",
        kernels=False,
        depends_on_base=True,
    )

    def claims(self, names: Iterable[str]) -> bool:
        return any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in names)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: no known model has a tensor of this name, or the config.json is of an unknown or another model.
            NeedsFlag: the order of rows, or alpha, is unknown.
        """
        model, tensors = _model_of(name, file, options), dict[str, MadeTensor]()
        for tensor in file.specs:
            match = _NAME.fullmatch(tensor)
            layer, module, end = match.groups() if match else (None, "", "")
            if layer is not None and module in IN_LAYERS:
                path = f"model.layers.{layer}.{IN_LAYERS[module]}"
            elif layer is None and module == HEAD:
                path = "lm_head"
            else:
                raise InputError("is not a tensor of a known torchtune model", culprit=tensor)
            of_rows = end != "lora_a.weight" and module in ROTATED
            heads = _interleaved_heads(tensor, module, model, options.lenient) if of_rows else 0
            tensors[f"{path}.{_ENDS[end]}"] = in_halves(file, tensor, heads) if heads else copied(file, tensor)
        fields = {**_recipe_of(file), **find_config(file)[0]}
        # torchtune's config lacks it
        config = {**fields, "use_dora": any(each.endswith(".lora_magnitude_vector") for each in tensors)}
        is_ordered = any(match[2] in ROTATED for match in map(_NAME.fullmatch, file.specs) if match)
        unknown = "its rows of q and k are in torchtune's order; reordering them needs the model's config.json"
        notes = (unknown,) if is_ordered and not model else ()
        return read_as_peft(self.key, name, file, tensors, config, options, notes)


def _recipe_of(file: WeightsFile) -> dict[str, Any]:
    """Return rank and alpha of the run's recipe in the folder above those of the epochs; {} without a recipe."""
    folder = file.path.absolute().parent
    recipe = next((each / RECIPE for each in (folder, folder.parent) if (each / RECIPE).is_file()), None)
    settings = read_plain_yaml(recipe, "model") if recipe else {}
    numbers = {"r": settings.get("lora_rank"), "lora_alpha": settings.get("lora_alpha")}
    return {field: value for field, value in numbers.items() if type(value) is int}


def _model_of(name: str, file: WeightsFile, options: ReadOptions) -> Mapping[str, Any]:
    """Return the config.json beside the adapter, else the base's.

    Raises:
        InputError: the two give different orders of rows.
    """
    beside, base = read_folder_config(file.path.parent), options.model
    if beside and base and _order_of(beside) != _order_of(base):
        raise InputError(
            f"the config.json beside it is of a {beside.get('model_type')} and the base a {base.get('model_type')}, or "
            "their heads differ: its rows would be in another order",
            culprit=name,
        )
    return beside or base


def _order_of(model: Mapping[str, Any]) -> tuple[bool | None, int, int]:
    heads = heads_of(model)
    return INTERLEAVED.get(str(model.get("model_type"))), heads.queries, heads.keys


def _interleaved_heads(tensor: str, module: str, model: Mapping[str, Any], lenient: bool) -> int:
    """Return the number of heads whose rows a projection interleaves; 0 for transformers' order.

    Raises:
        InputError: the model is unknown, or its config.json lacks the number of heads.
        NeedsFlag: there is no config.json. `lenient` allows this: ranks and norms do not depend on the order.
    """
    if not model:
        if lenient:
            return 0
        raise NeedsFlag(
            "has rows in torchtune's order; reordering them needs the model's config.json",
            culprit=tensor,
            flags="--base BASE",
            why=", or put its config.json beside the adapter",
        )
    kind = str(model.get("model_type"))
    if kind not in INTERLEAVED:
        known = ", ".join(INTERLEAVED)
        raise InputError(f"is of {kind}: the order of its rows is known only for {known}", culprit=tensor)
    counts, is_query = heads_of(model), module == ROTATED[0]
    heads = counts.queries if is_query else counts.keys
    if not heads:
        field = (QUERIES if is_query else KEYS)[0]
        raise InputError(f"has rows in heads, and the model's config.json does not say {field}", culprit=tensor)
    return heads if INTERLEAVED[kind] else 0


def in_halves(file: WeightsFile, name: str, heads: int) -> MadeTensor:
    """Return a tensor with the rows of each of `heads` heads reordered from interleaved to halves.

    Raises:
        InputError: the rows do not divide by the heads.
    """
    shape = file.specs[name].shape
    try:
        order = halves_of_pairs(heads, shape[0] if shape else 0)
    except ValueError:
        raise InputError(f"is {file.specs[name]}, whose rows do not make {heads} heads", culprit=name) from None

    def turn(rows: Bits) -> Bits:
        return rows[order]

    return made_of(file, name, shape, turn)
