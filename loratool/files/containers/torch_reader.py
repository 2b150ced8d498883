"""Read a torch file (`.bin`, `.pt`, `.pth`, `.ckpt`) as a `WeightsFile`, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError
from ..weights_file import WeightsFile
from .torch_archive import TorchArchive
from .torch_pickle import REMEDY, SavedTensor

# Keys under which training tools save the weights in a larger dict; the first with tensors counts.
STATE_DICT_KEYS = ("state_dict", "model", "module", "model_state_dict", "params", "params_ema", "ema")


class TorchFile(WeightsFile):
    """A torch file; opening reads only the pickle.

    The weights are the saved dict. If it has no tensors itself, they are its first value under a key of
    `STATE_DICT_KEYS` that has some. Tied weights are under each of their names, with equal `begin` and spec. `ignored`
    names everything else.

    Raises:
        InputError: the file has something other than plain weights.
    """

    file_format = "torch"

    def __init__(self, path: Path) -> None:
        self._open(path)
        self.metadata = None
        try:
            archive = TorchArchive(path, self.file, 0, self.nbytes)
            tensors, self.ignored = self._choose(archive.top)
            places = [(archive.place(name, tensor), name) for name, tensor in tensors.items()]
            places.sort(key=lambda item: (item[0][1], item[1]))
            self.specs = {name: spec for (spec, _), name in places}
            self.begin = {name: begin for (_, begin), name in places}
        except BaseException:
            self.file.close()
            raise

    def _refuse(self, why: str, remedy: str | None = None) -> InputError:
        return InputError(why, culprit=str(self.path), remedy=remedy)

    def _choose(self, top: Any) -> tuple[dict[str, SavedTensor], tuple[str, ...]]:
        """Return the dict of weights in the saved object, and the names of everything else."""

        def tensors(value: Any) -> dict[Any, SavedTensor]:
            return {k: v for k, v in value.items() if type(v) is SavedTensor} if type(value) is dict else {}

        if type(top) is not dict:
            raise self._refuse(f"holds a {type(top).__name__.strip('_').lower()}, not a dict of tensors", REMEDY)
        inner = next((key for key in STATE_DICT_KEYS if tensors(top.get(key))), None)
        weights = tensors(top[inner] if inner else top)
        if inner and tensors(top):
            raise self._refuse(f"holds tensors both at its top and in {inner}: which are the weights?", REMEDY)
        if not weights:
            raise self._refuse(
                f"holds no tensors, neither at its top nor in one of {', '.join(STATE_DICT_KEYS)}", REMEDY
            )
        for name in weights:
            if not is_name(name):
                raise self._refuse("has a tensor whose name is not text, or is reserved", REMEDY)
        beside = [key for key in top if key != inner and (inner or key not in weights)]
        beside += [f"{inner}.{key}" for key in top[inner] if key not in weights] if inner else []
        return weights, tuple(key if type(key) is str else "?" for key in beside)


def is_name(name: object) -> bool:
    """Return whether a key of a saved dict is a valid tensor name in a safetensors file."""
    return type(name) is str and name != "__metadata__" and not any("\ud800" <= c <= "\udfff" for c in name)
