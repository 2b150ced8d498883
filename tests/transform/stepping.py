"""Make small adapters for the tests of steps, and say what of them is true by dense float64 matrices.

The matrices come from the numbers as they were drawn and from files as safetensors reads them, never from our classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import open_adapter
from loratool.adapters.updates.experts import Experts
from loratool.adapters.updates.update import Stack
from loratool.binding.modules.image_modules import SourceModule
from loratool.transform.lazy import LazyFile, Transformed
from loratool.transform.module_map import RowSlice, TargetModule, fuse_modules

WIDTH = 24
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Factors:
    """The numbers of a module as a file has them."""

    A: Tensor  # (r, in, *kernel), of a stack (E * r, in)
    B: Tensor  # (out, r, ...), of a stack (out, r * E), for each rank the experts
    alpha: float
    experts: int = 0  # 0 of a plain module
    others: Mapping[str, Tensor] = field(default_factory=dict)  # end of the name -> tensor

    @property
    def rank(self) -> int:
        return len(self.A) // max(1, self.experts)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def drawn(
    out: int,
    rank: int,
    seed: int = 0,
    dtype: torch.dtype | tuple[torch.dtype, torch.dtype] = torch.float32,
    alpha: float | None = None,
    experts: int = 0,
    kernel: tuple[int, ...] = (),
) -> Factors:
    """Draw a module of WIDTH inputs; `dtype` of both sides, or of A and of B."""
    g, E = torch.Generator().manual_seed(seed), max(1, experts)
    of_A, of_B = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    A = torch.randn(E * rank, WIDTH, *kernel, generator=g, dtype=torch.float64).to(of_A)
    B = (torch.randn(out, rank * E, *(1 for _ in kernel), generator=g, dtype=torch.float64) * 0.3).to(of_B)
    return Factors(A, B, rank if alpha is None else alpha, experts)


def small_integers(out: int, rank: int, seed: int, dtype: torch.dtype, alpha: float) -> Factors:
    """Draw a module of integers, whose products float64 adds up without rounding."""
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randint(-3, 4, shape, generator=g).to(dtype) for shape in ((rank, WIDTH), (out, rank)))
    return Factors(A, B, alpha)


def opened(folder: Path, modules: Mapping[str, Factors]) -> Adapter:
    """Write PEFT's files by safetensors and open them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, each in modules.items():
        key = f"base_model.model.{module}"
        tensors |= {f"{key}.lora_A.weight": each.A.contiguous(), f"{key}.lora_B.weight": each.B.contiguous()}
        tensors |= {f"{key}.{end}": tensor for end, tensor in each.others.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ends = {end for each in modules.values() for end in each.others}
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": {f"^{module}$": len(each.A) for module, each in modules.items()},
        "alpha_pattern": {f"^{module}$": each.alpha for module, each in modules.items()},
        "target_modules": list(modules),
        "use_dora": "lora_magnitude_vector" in ends,
        "lora_bias": "lora_B.bias" in ends,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter, updates = open_adapter(folder), {}
    for module, update in adapter.updates.items():
        each = modules[module.removesuffix(".bias")]
        stack = {"cls": Experts, "detail": Stack(each.experts)} if each.experts else {}
        updates[module] = replace(update, scale=each.scale, **stack)
    return replace(adapter, updates=updates)


def rows_of(each: Factors) -> Tensor:
    """Return a module's change in float64, as (out, in), a stack's matrices below each other."""
    if not each.experts:
        return each.scale * each.B.double().flatten(1) @ each.A.double().flatten(1)
    rank = each.rank
    return torch.cat(
        [
            each.scale * each.B.double()[:, e :: each.experts] @ each.A.double()[e * rank : (e + 1) * rank]
            for e in range(each.experts)
        ]
    )


def made_rows(adapter: Adapter, module: str) -> Tensor:
    """Return the same of a module as a step made it, from its tensors and the scale that headers say."""
    update = adapter.updates[module]
    A, B = (adapter.file.tensor(update.tensors[role]) for role in "AB")
    E = update.experts if update.cls is Experts else 0
    return rows_of(Factors(A, B, update.scale * (len(A) // max(1, E)), E))


def relative(made: Tensor, true: Tensor) -> float:
    return float((made - true).norm() / true.norm())


def _source(adapter: Adapter, module: str) -> SourceModule:
    return SourceModule(module, adapter.updates[module], "", module)


def to_fuse(adapter: Adapter, modules: Sequence[str], target: str, rows: int = 0) -> dict[str, TargetModule]:
    """Return the target that has the rows of some modules below each other."""
    parts, at = [], 0
    for module in modules:
        count = adapter.updates[module].specs["B"].shape[0]
        parts.append(RowSlice(_source(adapter, module), 0, count, at))
        at += count
    return {target: fuse_modules("", target, parts, rows or at)}


def to_split(adapter: Adapter, module: str, ends: Mapping[str, int]) -> dict[str, TargetModule]:
    """Return the targets that have a module's rows, so many each."""
    found, source, start = {}, _source(adapter, module), 0
    for target, count in ends.items():
        found[target] = TargetModule("", target, count, (RowSlice(source, start, start + count),), "split")
        start += count
    return found


def to_swap(adapter: Adapter, module: str, first: int) -> dict[str, TargetModule]:
    """Return the target in which the first rows of a module come last."""
    source, rows = _source(adapter, module), adapter.updates[module].specs["B"].shape[0]
    parts = (RowSlice(source, first, rows, 0), RowSlice(source, 0, first, rows - first))
    return {module: TargetModule("", module, rows, parts, "swapped")}


def counted(state: Transformed) -> Counter[str]:
    """Count from now on how often the last step makes each of its modules."""
    file, counts = state.adapter.file, Counter[str]()
    assert isinstance(file, LazyFile)

    def make_of(module: str) -> None:
        each = file._planned[module]

        def make() -> object:
            counts[module] += 1
            return each.make()

        made[module] = replace(each, make=make)

    made: dict[str, object] = {}
    for module in file._planned:
        make_of(module)
    file._planned = made
    return counts
