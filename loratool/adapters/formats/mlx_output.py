"""Convert the factors and config of an adapter to MLX's layout; list what a file of MLX cannot store.

mlx-lm wraps exactly the modules in `keys`, which are full paths here, with one rank and one scale for all. So factors
of a smaller rank are padded with zeros. It has no biases, no towers and no full tensors beside factors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...architectures.experts import PEFT_TAKES_AS_PLAIN, TRANSPOSED_EXPERTS
from ...architectures.fused_rows import nested_configs
from ...architectures.mlx_names import MlxNames, mlx_names, mlx_path, stacks_of
from ...architectures.renames import canonical
from ...architectures.roles import EMBEDDINGS, HEADS
from ...architectures.ties import INPUT_EMBEDDINGS, UNTIED_BY_DEFAULT
from ...errors import InputError, NeedsFlag
from ...files.dtypes import TensorSpec
from ..updates.dora import DoRA
from ..updates.update import UpdateSpec
from .content import AdapterContent
from .mlx_stacks import StackLayout, cut_share, share_ranks, share_sides
from .peft_config import lora_config, parse_config

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers

MARKS = ("lora_parameters", "fine_tune_type")  # fields that only MLX's config has
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
PEFT_FIELDS = {*lora_config({}, {"": 1}), "base_model_name_or_path"}


@dataclass(frozen=True)
class _Module:
    """A module of the output, and the tensors that it is made of."""

    A: str  # names of tensors of the content
    B: str
    magnitude: str | None
    experts: int  # 0 for a layer of one matrix
    layout: StackLayout
    ranks: tuple[int, ...]  # the content's ranks that it uses


def mlx_content(content: AdapterContent) -> AdapterContent:
    """Return the tensors and config in MLX's layout.

    Args:
        content: tensors of PEFT's shapes under `<module>.lora_a`, `.lora_b` and `.m`, with PEFT's config. Its modules
            have the names of transformers' class if its model is known, else MLX's.

    Raises:
        InputError: the modules have several scales.
    """
    modules, scale = _modules(content)
    rank = max(len(module.ranks) for module in modules.values())
    specs: dict[str, TensorSpec] = {}
    of: dict[str, tuple[_Module, str]] = {}
    for path, module in modules.items():
        module_specs = _specs(content, module, rank)
        specs |= {f"{path}.{end}": spec for end, spec in module_specs.items()}
        of |= {f"{path}.{end}": (module, end) for end in module_specs}

    def load(name: str) -> Numbers:
        import numpy as np

        module, end = of[name]
        if end == "m":
            assert module.magnitude
            return content.load(module.magnitude)
        side = _side(content, module, end)
        filled = np.zeros(specs[name].shape, side.bits.dtype)
        filled[tuple(map(slice, side.shape))] = side.bits
        return replace(side, bits=filled)

    dora = any(module.magnitude for module in modules.values())
    lora = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(modules)}
    return AdapterContent(specs, load, _config(content, "dora" if dora else "lora", lora))


def _side(content: AdapterContent, module: _Module, end: str) -> Numbers:
    """Return the factor that MLX calls `end`, at the module's rank."""
    if not module.experts:
        return content.load(module.A if end == "lora_a" else module.B).T
    A, B = cut_share(content.load(module.A), content.load(module.B), module.experts, module.layout)
    ranks = list(module.ranks)
    return A[:, ranks] if end == "lora_a" else B[:, :, ranks]


def _specs(content: AdapterContent, module: _Module, rank: int) -> dict[str, TensorSpec]:
    """Return the specs of MLX's tensors of a module by suffix."""
    A, B = content.specs[module.A], content.specs[module.B]
    if module.experts:
        width, out = share_sides(A.shape, B.shape, module.layout)
        of_A, of_B = (B, A) if module.layout.transposed else (A, B)
        shape_A, shape_B = (module.experts, rank, width), (module.experts, out, rank)
        return {"lora_a": replace(of_A, shape=shape_A), "lora_b": replace(of_B, shape=shape_B)}
    specs = {"lora_a": replace(A, shape=(A.shape[1], rank)), "lora_b": replace(B, shape=(rank, B.shape[0]))}
    return {**specs, "m": content.specs[module.magnitude]} if module.magnitude else specs


def _modules(content: AdapterContent) -> tuple[dict[str, _Module], float]:
    """Return the modules of the output by MLX's names, and their common scale."""
    config = parse_config("", {key: value for key, value in content.config.items() if key not in MARKS}, None)
    types = tuple(nested_configs(content.model))
    names = mlx_names(types) or MlxNames()
    listed = tuple(f".{name}" for name in config.peft.get("target_parameters") or ())
    modules: dict[str, _Module] = {}
    scales: set[float] = set()
    for A in (name for name in content.specs if name.endswith(".lora_a")):
        module = A.removesuffix(".lora_a")
        B, m, total = f"{module}.lora_b", f"{module}.m", content.specs[A].shape[0]
        is_stack = bool(listed) and f".{module}".endswith(listed)
        rank = (config.rank_of(module) or total) if is_stack else total
        scales.add(config.scale_of(module, rank))
        if total % rank:
            raise InputError(f"A has {total} rows, which are not a stack of rank {rank}", culprit=module)
        experts, magnitude = total // rank if is_stack else 0, m if m in content.specs else None
        entry = _Module(A, B, magnitude, experts, StackLayout(), tuple(range(rank)))
        path = canonical(module, types)
        if is_stack and types:
            modules |= _shares(
                content, path, entry, names, _mistakes_layout(types, str(config.peft.get("peft_version")))
            )
        else:
            modules[mlx_path(path, names) if types else path] = entry
    if len(scales) != 1:
        raise InputError("its modules have several scales, and a file of MLX has one", remedy="add --plain")
    return modules, scales.pop()


def _shares(
    content: AdapterContent, path: str, stack: _Module, names: MlxNames, transposed: bool
) -> dict[str, _Module]:
    """Return MLX's stacks that share the rows of a stack of the class, except those without ranks."""
    layouts: dict[str, StackLayout] = {}
    for target in stacks_of(path, names):
        _, part, parts = names.shares[target.rpartition(".")[2]]
        layouts[target] = StackLayout(part, parts, names.interleaved and parts > 1, transposed)
    if len(layouts) == 1:
        return {target: replace(stack, layout=layout) for target, layout in layouts.items()}
    ranks = share_ranks(content.load(stack.A), content.load(stack.B), stack.experts, list(layouts.values()))
    used_ranks = zip(layouts.items(), ranks, strict=True)
    return {
        target: replace(stack, layout=layout, ranks=tuple(ranks_of_share))
        for (target, layout), ranks_of_share in used_ranks
        if ranks_of_share
    }


def _mistakes_layout(types: tuple[str, ...], version: str) -> bool:
    """Return whether PEFT mistook the class's stacks for (expert, out, in), or for (expert, in, out).

    Up to 0.18 it took all stacks for (expert, in, out) (peft PR 3083).
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match and (int(match[1]), int(match[2])) < (0, 19):
        return TRANSPOSED_EXPERTS.isdisjoint(types)
    return not PEFT_TAKES_AS_PLAIN.isdisjoint(types)


def _config(content: AdapterContent, kind: str, lora: Mapping[str, Any]) -> dict[str, Any]:
    """Return MLX's config, with the other fields of the adapter's former config."""
    is_mlx = not content.config.keys().isdisjoint(MARKS)
    former = {key: value for key, value in content.config.items() if is_mlx and key not in PEFT_FIELDS}
    base = content.config.get("base_model_name_or_path")
    inner = content.model.get("text_config")
    for config in (content.model, inner if isinstance(inner, dict) else {}):
        counts = [config[key] for key in LAYERS if type(config.get(key)) is int]
        if counts:
            break
    numbers = [int(match[1]) for key in lora["keys"] if (match := re.search(r"\.(\d{1,9})\.", key))]
    layers = counts[0] if counts else max([*numbers, -1]) + 1
    named = {"model": base} if isinstance(base, str) and base else {}
    return {**named, **former, "fine_tune_type": kind, "num_layers": layers, "lora_parameters": lora}


def find_misfits(
    source: str, updates: Mapping[str, UpdateSpec], model: Mapping[str, Any], is_mlx: bool
) -> dict[str, str]:
    """Return the modules that a file of MLX cannot store, each with the reason.

    Args:
        source: the adapter's name.
        model: the base's config.json; empty if unknown.
        is_mlx: the adapter is MLX's.

    Raises:
        NeedsFlag: the answer depends on the base.
    """
    types = tuple(nested_configs(model))
    dora = any(update.cls is DoRA for update in updates.values())
    reasons: dict[str, str] = {}
    for module, update in updates.items():
        last = module.rpartition(".")[2]
        if not types and update.base:
            raise NeedsFlag(
                f"has a weight under its factors, which must be compared with the base's ({source})",
                culprit=module,
                flags="--base BASE",
                why="with the model and its weights",
            )
        if not types and not is_mlx and (update.cls.stack or last in INPUT_EMBEDDINGS):
            what = "a stack of experts" if update.cls.stack else "an embedding, which the head may be tied to"
            raise NeedsFlag(
                f"is {what}: only the model tells how MLX stores it ({source})",
                culprit=module,
                flags="--base BASE",
                why="with the model (its config.json is enough)",
            )
        reason = _of_update(module, update, dora) or (_of_model(module, update, model, is_mlx) if types else None)
        if reason:
            reasons[module] = reason
    return reasons


def _of_update(module: str, update: UpdateSpec, dora: bool) -> str | None:
    is_rows = module.rpartition(".")[2] in EMBEDDINGS
    if update.base:
        return "a new weight under its factors, which MLX cannot store"
    if re.search(r"\bexperts\.\d+\.", module):
        return "of one expert, but MLX stacks experts: first convert with --to peft --base BASE"
    if dora and update.cls is not DoRA:
        return "not DoRA, and MLX has DoRA in all modules or in none"
    if update.cls is DoRA and update.along_inputs is not is_rows:
        sides = "dimensions, and MLX's are of its tokens" if is_rows else "inputs, and MLX's are of its outputs"
        return f"DoRA with norms of its {sides}"
    return None


def is_tied(model: Mapping[str, Any]) -> bool | None:
    """Return whether a config.json ties the head to the embedding; None if it leaves that to the class."""
    inner = model.get("text_config")
    flags = [each.get("tie_word_embeddings") for each in (model, inner if isinstance(inner, dict) else {})]
    by_default = False if model.get("model_type") in UNTIED_BY_DEFAULT else None
    return next((flag for flag in flags if isinstance(flag, bool)), by_default)


def _of_model(module: str, update: UpdateSpec, model: Mapping[str, Any], is_mlx: bool) -> str | None:
    types = tuple(nested_configs(model))
    known, path = mlx_names(types), canonical(module, types)
    names, last = known or MlxNames(), path.rpartition(".")[2]
    if update.cls.stack and (known is None or not stacks_of(path, names)):
        return f"a stack of experts, and how MLX stores those of {types[0]} is unknown"
    if names.scaled and re.search(names.scaled, path):
        return f"of {types[0]}, whose weights MLX multiplies by numbers of the config"
    if path.endswith(names.absent):
        return f"a module that MLX's {types[0]} does not have"
    if names.root and not mlx_path(path, names).startswith(names.root):
        return "of a tower, which mlx-lm does not have"
    if last in HEADS and is_tied(model) is True:
        return "a head that is tied, which MLX's class does not have"
    if last in INPUT_EMBEDDINGS and is_tied(model) is not False and not is_mlx:
        return "an embedding that the head is tied to, which MLX changes as well"
    return None
