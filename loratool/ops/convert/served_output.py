"""Write the modules of a runtime as PEFT's folder, with one rank and one scale where it knows one, and their config."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...adapters.formats.content import ONLY_FOR, AdapterContent
from ...adapters.formats.peft import wrappers_of
from ...adapters.formats.peft_config import config_of
from ...adapters.stacked import round_factors
from ...adapters.weight_kinds import WEIGHT_KINDS
from ...architectures.runtimes.runtime import Runtime
from ...errors import InputError
from ...files.dtypes import TensorSpec, safetensors_name
from ...files.tensor_ref import is_finite
from .factors import EPSILON, NO_LOSS, Loss, ModuleFactors, alpha_for_scale, common_scale, fold_scale, relative_error
from .request import ModuleConvert
from .served import Factors, ServedModule

# Fields of PEFT's config that say nothing of the factors
_KEPT_FIELDS = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")


class ServedOutput:
    """Make the tensors, the config and the report of a runtime's modules."""

    def __init__(
        self, runtime: Runtime, source: Adapter, there: Mapping[str, ServedModule], dtype: torch.dtype | None
    ) -> None:
        self.runtime, self.source, self.there, self.dtype = runtime, source, there, dtype
        self._load = Factors(source)
        self._wrappers = wrappers_of([path for path, module in there.items() if module.stack])
        scales = list(dict.fromkeys(module.scale for module in there.values() if module.update))
        self._ranks: dict[str, int] = {}  # of modules that have to have the same
        for module in there.values():
            self._ranks[self._alike(module)] = max(module.rank, self._ranks.get(self._alike(module), 0))
        self.scale = None if runtime.reads["alpha_pattern"] == "yes" else common_scale(scales)
        self._last: tuple[str, ModuleFactors] | None = None

    def _alike(self, module: ServedModule) -> str:
        """Return what modules of one rank have in common: all, or the matrices of one projection of all experts."""
        return "" if self.runtime.one_rank else re.sub(r"(?<=\.experts\.)\d+(?=\.)", "", module.path)

    def _rank(self, module: ServedModule) -> int:
        return self._ranks[self._alike(module)]

    def made(self, path: str) -> ModuleFactors:
        """Return a module's factors as they are written, with their scale and whether they are exact."""
        if self._last is None or self._last[0] != path:
            self._last = path, self._made(self.there[path])
        return self._last[1]

    def _made(self, module: ServedModule) -> ModuleFactors:
        B, A = (side.to(module.dtype) for side in self._load(module))
        found = ModuleFactors(A, B, module.scale)
        if self.scale is not None and module.scale != self.scale and module.update:
            ratio = module.scale / self.scale
            found = replace(fold_scale(replace(found, scale=ratio)), scale=self.scale)
        missing = self._rank(module) - module.rank
        A = torch.cat([found.A, found.A.new_zeros(*A.shape[:-2], missing, A.shape[-1])], -2)
        B = torch.cat([found.B, found.B.new_zeros(*B.shape[:-1], missing)], -1)
        if self.dtype is not None:
            narrow_B, narrow_A = round_factors(module.path, (B, A), self.dtype)
            same = torch.equal(narrow_A.double(), A.double()) and torch.equal(narrow_B.double(), B.double())
            A, B, found = narrow_A, narrow_B, replace(found, exact=found.exact and same)
        if self.runtime.half and not (is_finite(A.half()) and is_finite((B.double() * found.scale).half())):
            message = f"overflows float16, in which {self.runtime.title} has factors and scales"
            raise InputError(message, culprit=module.path, remedy="merge the adapter into its base")
        return replace(found, A=A, B=B)

    def keys(self, path: str) -> tuple[str, str]:
        """Return the names of A and B."""
        module = self.there[path]
        if module.transposed:
            return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"
        wrapper = self._wrappers[path] if module.stack else path
        return f"{wrapper}.lora_A.weight", f"{wrapper}.lora_B.weight"

    def specs(self) -> dict[str, TensorSpec]:
        """Return the type and the shape of each tensor, by its name."""
        found = {}
        for path, module in self.there.items():
            made = self.made(path) if self._folds(module) or self.runtime.half else None
            letters = safetensors_name(self.dtype or (made.B if made else module).dtype)
            rank, (*experts, out, width) = self._rank(module), module.shape
            count = math.prod(experts) * rank
            for key, shape in zip(self.keys(path), ((count, width), (out, count)), strict=True):
                found[key] = TensorSpec(letters, shape)
        return found

    def _folds(self, module: ServedModule) -> bool:
        return self.scale is not None and module.scale != self.scale and module.update is not None

    def content(self) -> AdapterContent:
        """Return the adapter to write."""
        specs = self.specs()
        place = {key: (path, side) for path in self.there for side, key in enumerate(self.keys(path))}

        def load(key: str) -> Tensor:
            path, side = place[key]
            made = self.made(path)
            A, B = made.A, made.B
            if self.there[path].stack:
                A, B = WEIGHT_KINDS["experts"].lay(A.transpose(0, 1), B.permute(2, 0, 1), ())
            return (A, B)[side].contiguous()

        turned = any(module.heads for module in self.there.values())
        return AdapterContent(specs, load, self._config(), {ONLY_FOR: self.runtime.key} if turned else {})

    def _scale(self, module: ServedModule) -> float:
        return module.scale if self.scale is None else self.scale

    def _alpha(self, module: ServedModule) -> tuple[int, float]:
        rank = self._rank(module)
        return rank, alpha_for_scale(self._scale(module), rank)

    def _config(self) -> dict[str, Any]:
        """Return the fields of PEFT's config, with those that are not of the factors from the source's."""
        both = {path: self._alpha(module) for path, module in self.there.items()}
        made = config_of(both, [path for path, module in self.there.items() if module.stack])
        for field, of in (("rank_pattern", 0), ("alpha_pattern", 1)):
            made[field] = _patterns({path: each[of] for path, each in both.items()}, made[field])
        if self.runtime.targets == "last names":
            made["target_modules"] = sorted({path.rpartition(".")[2] for path in both})
        former = {key: value for key, value in self.source.config.peft.items() if key in _KEPT_FIELDS}
        return {**made, **former}

    def rows(self, origins: Mapping[str, tuple[str, ...]], losses: Mapping[str, Loss]) -> Iterator[ModuleConvert]:
        """Yield a row for each module that has an update.

        Args:
            origins: module of the source -> modules of the adapter as it was opened.
            losses: module of the source -> what was lost before.
        """
        for path, module in self.there.items():
            if module.update is None:
                continue
            name, (rank, alpha) = module.update.module, self._alpha(module)
            former, scale = losses.get(name, NO_LOSS), self._scale(module)
            restated = abs(alpha / rank / scale - 1.0) if scale else 0.0
            error = math.hypot(self._error(path), restated, former.relative)
            how = "truncated" if former.how == "truncated" else "rounded" if error else self._how(module)
            yield ModuleConvert(path, origins.get(name, (name,)), how, rank, alpha, error)

    def _how(self, module: ServedModule) -> str:
        if self._folds(module):
            return "folded"
        assert module.update is not None
        return "exact" if module.shape == module.update.shape else "split"

    def _error(self, path: str) -> float:
        module = self.there[path]
        if not (self._folds(module) or self.dtype):
            return 0.0
        made = self.made(path)
        if made.exact:
            return 0.0
        B, A = (side.double() for side in self._load(module))
        return max(EPSILON, relative_error((B * module.scale, A), (made.B.double() * made.scale, made.A)))

    def notes(self) -> tuple[str, ...]:
        """Return sentences on ranks that were padded."""
        padded = [module for module in self.there.values() if module.update and module.rank < self._rank(module)]
        if not padded:
            return ()
        to, alike = max(map(self._rank, padded)), "one rank" if self.runtime.one_rank else "one rank of all experts"
        return (f"{len(padded)} modules are padded with zeros to rank {to}, as {self.runtime.title} knows {alike}",)


def _patterns(values: Mapping[str, float], made: Mapping[str, float]) -> dict[str, float]:
    """Return one expression for all paths that differ in numbers alone, where these have one value.

    A runtime may try every expression on every tensor, and a mixture of experts has thousands.
    """
    alike: dict[str, set[float]] = {}
    for path, value in values.items():
        alike.setdefault(_numberless(path), set()).add(value)
    found: dict[str, float] = {}
    for path, value in values.items():
        own = f"^{re.escape(path)}"
        if own in made:
            found[f"^{_numberless(path)}" if len(alike[_numberless(path)]) == 1 else own] = value
    return found


def _numberless(path: str) -> str:
    """Return an expression that matches a path with any numbers in it."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(path))
