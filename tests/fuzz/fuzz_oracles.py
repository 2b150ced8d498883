"""Ask the formats' own software, in a copy of the server of cases: it may crash, or take all memory."""

from __future__ import annotations

import hashlib
import pickle
import re
from contextlib import suppress
from types import SimpleNamespace
from typing import Any


class _Plain(pickle.Unpickler):
    """Pickle's own machine, for the protocols that `weights_only` does not read, with the names of plain weights."""

    NAMES = re.compile(
        r"torch\._utils\._rebuild_(tensor(_v[23])?|parameter)|collections\.OrderedDict|torch\.\w+Storage|"
        r"torch\.storage\.UntypedStorage|torch\.(Tensor|Size|float\w+|bfloat16|u?int\d+|bool)"
    )

    def find_class(self, module: str, name: str) -> Any:
        if not self.NAMES.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def torch_tensors(path: str) -> list[dict[str, str]]:
    """Return what torch.load finds without running anything: of each dict of tensors the hashes of the numbers."""
    import torch

    found: list[dict[str, str]] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
            found.append({name: digest(tensor) for name, tensor in tensors.items()})
            for inner in value.values():
                look(inner)

    plain = SimpleNamespace(
        __name__="plain", Unpickler=_Plain, load=lambda file, **options: _Plain(file, **options).load()
    )
    for options in ({"weights_only": True}, {"weights_only": False, "pickle_module": plain}):
        with suppress(Exception):
            look(torch.load(path, map_location="cpu", **options))
            return found
    raise ValueError("torch.load does not read it")


def safetensors_tensors(path: str) -> dict[str, str]:
    """Return the same of a safetensors file."""
    from safetensors.torch import load_file

    return {name: digest(tensor) for name, tensor in load_file(path).items()}


def digest(tensor: Any) -> str:
    """Return a tensor's dtype and shape, and a hash of its numbers."""
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    data = bytes(plain.reshape(-1).view(torch.uint8).numpy()) if plain.numel() else b""
    return f"{plain.dtype} {tuple(plain.shape)} {hashlib.sha1(data).hexdigest()}"
