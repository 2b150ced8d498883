"""Find the second moments of modules' inputs in a file of llama-imatrix, which has the names of GGUF's tensors.

The tables of `architectures.gguf` map the names. A model's config.json decides the architecture. An adapter has none,
so all architectures that have a name must agree on its meaning. The order of a tensor's rows does not matter, because
inputs are its columns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS
from ...adapters.gguf_names import has_own_names
from ...adapters.gguf_parts import EMBEDDING, STACK, GgufModel
from ...adapters.updates.update import UpdateSpec
from ...architectures.experts import PEFT_TAKES_AS_PLAIN
from ...architectures.gguf import ARCHITECTURES, architecture_of
from ...architectures.gguf.table import Facts
from ...architectures.heads import first_count, text_fields
from ...errors import InputError
from ...files.imatrix_file import ImatrixFile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ...numerics.forms import Wide

LAYER = re.compile(r"\.\d{1,6}(?=\.|$)")  # the first number in a path

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")  # fields of config.json with the number of layers

SHOWN = 3  # names in a message


def open_imatrix(name: str | os.PathLike[str] | None, opened: ExitStack) -> ImatrixFile | None:
    """Open a file of llama-imatrix, which `opened` closes; None without a name."""
    if name is None:
        return None
    file = ImatrixFile(name)
    opened.callback(file.close)
    return file


@dataclass(frozen=True)
class _Place:
    """A tensor of the file with the inputs of a module."""

    tensor: str
    expert: int | None = None  # number of the module's matrix, if the tensor is a stack
    either_side: bool = False  # A may be on the side of a stack's outputs (PEFT up to 0.18, later for some models)
    order: Callable[[int, str], list[int] | None] | None = None  # as `Part.columns`; None for the module's order


class InputMoments:
    """The weights of the inputs of a model's or an adapter's modules.

    Attributes:
        path: of the file.
        known, missing: the requested modules whose inputs are in the file, and the others.
    """

    def __init__(self, file: ImatrixFile, models: Sequence[GgufModel], layers: int = 0) -> None:
        """Store the file and the models that the modules can be of.

        Args:
            models: empty if the modules have GGUF's names.
            layers: the model's number of layers; 0 if unknown.
        """
        self.path, self._file, self._models, self._layers = file.path, file, models, layers
        self._found: dict[str, list[_Place]] = {}  # by paths in layer 0
        self.known, self.missing = dict[str, None](), dict[str, None]()

    @classmethod
    def of_model(cls, file: ImatrixFile, config: Mapping[str, Any], name: str) -> InputMoments:
        """Return the moments for a model with this config.json; `name` is for messages.

        Raises:
            InputError: the config lacks a field that its architecture's rows need.
        """
        models = [GgufModel.of_config(config, name)] if architecture_of(config) else _all_models()
        return cls(file, models, first_count(text_fields(config), *LAYER_COUNTS))

    @classmethod
    def of_adapter(cls, file: ImatrixFile, adapter: Adapter) -> InputMoments:
        """Return the moments for an adapter's modules; raise InputError for an image model's."""
        if FORMATS[adapter.format].can.components == "many":
            raise InputError("is for an image model, and llama-imatrix measures language models", culprit=adapter.name)
        return cls(file, [] if has_own_names(adapter) else _all_models())

    def warnings(self) -> tuple[str, ...]:
        """Return a sentence if the file and the model have different numbers of layers."""
        layers = self._file.layers
        if not self._layers or layers in (0, self._layers):
            return ()
        message = f"{self.path.name} has inputs of {layers} layers, but the model has {self._layers}"
        return (f"{message}: is it the file of this model?",)

    def weights(self, module: str, sizes: tuple[int, int, int]) -> npt.NDArray[np.float32] | None:
        """Return the weights of a module's inputs, (E, in) as from `input_weights`; None without any.

        Args:
            sizes: (E, out, in) of the module's stack of matrices.

        Raises:
            InputError: the file is of another model, by the number of inputs or of experts, or is damaged.
        """
        from ...numerics.input_weights import input_weights

        moments = self._moments(module, *sizes)
        weights = None if moments is None else input_weights(moments)
        (self.missing if weights is None else self.known)[module] = None
        return weights

    def column_factors(self, module: str, update: UpdateSpec) -> Wide | None:
        """Return factors (E, 1, in) for A (E, r, in) of an update with a rank: the weights of its inputs.

        They are in float64. The result is None without weights; errors are those of `weights`.
        """
        from ...adapters.stacked import stack_sizes
        from ...numerics.arrays import doubled

        weights = self.weights(module, stack_sizes(update))
        return None if weights is None else doubled(weights)[:, None]

    def require_known(self, updates: Mapping[str, UpdateSpec] | None = None) -> None:
        """Raise InputError if the file has none of the requested modules, or none of these updates."""
        from ...adapters.stacked import stack_sizes

        for module, update in (updates or {}).items():
            self.weights(module, stack_sizes(update))
        if self.missing and not self.known:
            some, stored = (", ".join([*each][:SHOWN]) for each in (self.missing, self._file.sizes))
            raise InputError(
                f"has nothing on the inputs of {some} and the other modules: it has {stored}, ...",
                culprit=str(self.path),
                remedy="is it the file of this model?",
            )

    def _moments(self, module: str, matrices: int, outputs: int, inputs: int) -> Wide | None:
        """Return the mean squares of a module's inputs, (matrices, inputs); None if the file has none."""
        place = next((each for each in self._locate(module) if each.tensor in self._file.sizes), None)
        if place is None:
            return None
        if place.either_side and (outputs == inputs or self._file.sizes[place.tensor] != matrices * inputs):
            return None
        count = self._file.matrices(place.tensor, inputs)
        if not (count == matrices if place.expert is None else place.expert < count):
            what = f"{module} has {matrices}" if place.expert is None else f"{module} is none of these"
            message = f"has {count} matrices in {self.path.name}, and {what}: it belongs to another model"
            raise InputError(message, culprit=place.tensor)
        moments = self._file.moments(place.tensor, inputs, place.expert or 0, matrices)
        if place.order and (columns := place.order(inputs, module)):
            moments[:, columns] = moments.copy()
        return moments

    def _locate(self, module: str) -> list[_Place]:
        """Return the tensors with a module's inputs; empty if architectures disagree on them."""
        if not self._models:
            return [] if module == EMBEDDING else [_Place(f"{module}.weight")]
        first = LAYER.sub(".0", module, 1)  # all layers are alike
        if first not in self._found:
            is_sure = len(self._models) == 1
            meanings = [each for model in self._models if (each := _meaning(model, first, is_sure)) is not None]
            agreed = len({_inputs(places) for places in meanings}) == 1
            by_tensor = {each.tensor: each for places in reversed(meanings) for each in places}
            self._found[first] = [*by_tensor.values()] if agreed else []
        number = LAYER.search(module)
        layer = f"blk{number[0]}." if number else ""
        return [replace(each, tensor=re.sub(r"\bblk\.0\.", layer, each.tensor)) for each in self._found[first]]


def _meaning(model: GgufModel, module: str, is_sure: bool) -> list[_Place] | None:
    """Return the tensors with a module's inputs in a model; None if the model has no such module.

    Args:
        is_sure: the module is of this model, and its stacks have the sides of the model's class.
    """
    expert, parts = model.locate(module)
    swaps = bool(PEFT_TAKES_AS_PLAIN.intersection(model.model_types))
    places = [
        _Place(
            f"{part.module}.weight",
            expert,
            part.module.endswith(STACK) and expert is None and (swaps or not is_sure),
            partial(part.columns, model.facts),
        )
        for part in parts
        if part.module != EMBEDDING  # its inputs are tokens
        and not part.weight.heads  # llama.cpp multiplies other states there
        and not (part.weight.columns and model.architecture.missing_facts(model.facts, [part.weight]))
    ]
    return places if parts else None


def _inputs(places: list[_Place]) -> tuple[tuple[str, int | None], ...]:
    """Return which inputs places have: those of gate and up are the same, in one tensor of both or in two."""
    return tuple(
        (each.tensor.replace("_gate_up_", f"_{part}_"), each.expert)
        for each in places
        for part in (("gate", "up") if "_gate_up_" in each.tensor else ("",))
    )


def _all_models() -> list[GgufModel]:
    return [
        GgufModel(architecture, Facts(), (model_type,))
        for architecture in ARCHITECTURES.values()
        for model_type in (*architecture.model_types, *architecture.wrappers)
    ]
