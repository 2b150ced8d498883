"""Plan a language model's adapter for the other layout: q, k, v and gate, up as fused modules, or as split ones.

Both ways are exact. A split module gets its rows of B, and the ranks that reach them. A fused one gets the ranks of its
slices one after the other, or their common A (`factors.make_factors`). With grouped-query attention only the base's
config.json tells how many rows are q's, k's and v's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError, NeedsFlag
from ...files.checkpoint import open_checkpoint, read_json_file
from .module_map import RowSlice, TargetModule, fuse_modules
from .source_modules import SourceModule

# suffix of a fused module's path -> its split modules, in the order of their rows
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "attn.c_attn": ("q_proj", "k_proj", "v_proj"),
}


C_ATTN = "attn.c_attn"  # GPT-2's, whose slices are square


Sizes = Mapping[str, int]  # split module -> its rows


def read_qkv_rows(base: str | os.PathLike[str] | None) -> Sizes:
    """Read the rows of q_proj, k_proj and v_proj from the config of a base; empty without a base.

    Args:
        base: a checkpoint's folder, a file in one, or a config.json.

    Raises:
        InputError: the config does not tell its attention heads and their size.
    """
    if base is None:
        return {}
    if Path(base).suffix == ".json" and Path(base).name == "config.json":
        config = read_json_file(Path(base))
    else:
        checkpoint = open_checkpoint(base)
        checkpoint.close()
        config = checkpoint.config
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    heads = _count(config, "num_attention_heads")
    groups = _count(config, "num_key_value_heads") or heads
    width = _count(config, "head_dim") or (_count(config, "hidden_size") // heads if heads else 0)
    if not heads or not width:
        raise InputError("its config.json does not say its attention heads and their size", culprit=os.fspath(base))
    return {"q_proj": heads * width, "k_proj": groups * width, "v_proj": groups * width}


def _count(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    return value if type(value) is int and 0 < value < 1 << 31 else 0


def plan_qkv(sources: list[SourceModule], layout: str, sizes: Sizes) -> list[TargetModule]:
    """Return a target for every module, split or fused as the layout has it.

    Args:
        layout: a key of QKV_LAYOUTS.

    Raises:
        NeedsFlag: only a base can tell the rows of a module.
        InputError: the rows are not those of the base, or of any model.
    """
    if layout == "split":
        return [target for source in sources for target in _split(source, sizes)]
    targets: list[TargetModule] = []
    to_fuse: dict[str, dict[str, SourceModule]] = {}
    for source in sources:
        path = next((fused for end in FUSED if (fused := _fused_path(source.path, end))), None)
        if path is None:
            targets.append(_unchanged(source))
        else:
            to_fuse.setdefault(path, {})[source.path.rpartition(".")[2]] = source
    return targets + [_fuse(path, parts, sizes) for path, parts in to_fuse.items()]


def _fused_path(path: str, end: str) -> str | None:
    """Return the path of the fused module with the suffix `end` that holds this split module, or None."""
    block, _, name = f".{path}".rpartition(".")
    middle, _, fused = end.partition(".")
    return f"{block}.{fused}"[1:] if name in FUSED[end] and block.endswith(f".{middle}") else None


def _fused_suffix(path: str) -> str | None:
    """Return the key of FUSED that a path ends in, or None."""
    return next((end for end in FUSED if f".{path}".endswith(f".{end}")), None)


def _unchanged(source: SourceModule) -> TargetModule:
    rows = source.update.shape[0]
    return TargetModule("", source.path, rows, (RowSlice(source, 0, rows),), "exact")


def _split(source: SourceModule, sizes: Sizes) -> list[TargetModule]:
    rows, width = source.update.shape[:2]
    end = _fused_suffix(source.path)
    if end is None:
        return [_unchanged(source)]
    names = FUSED[end]
    if len(names) == 2:
        parts = [rows // 2] * 2
    else:
        parts = [width if end == C_ATTN else _size(source.path, name, sizes) for name in names]
    if sum(parts) != rows:
        terms = " + ".join(map(str, parts))
        raise InputError(f"has {rows} rows, which are not {terms}: it is of another model", culprit=source.path)
    stem, start, targets = source.path.rpartition(".")[0], 0, []
    for name, size in zip(names, parts, strict=True):
        targets.append(
            TargetModule("", f"{stem}.{name}".lstrip("."), size, (RowSlice(source, start, start + size),), "split")
        )
        start += size
    return targets


def _fuse(path: str, parts: Mapping[str, SourceModule], sizes: Sizes) -> TargetModule:
    end = _fused_suffix(path)
    assert end is not None
    names = FUSED[end]
    if end == C_ATTN:
        sizes = dict.fromkeys(names, next(iter(parts.values())).update.shape[1])
    rows = {name: source.update.shape[0] for name, source in parts.items()}
    alike = [rows[name] for name in names[-2:] if name in rows]  # key and value, gate and up
    if len(set(alike)) > 1:
        raise InputError(f"would have parts of {alike[0]} and {alike[1]} rows, which no model has", culprit=path)
    if len(rows) < len(names):
        rows = _infer_missing_rows(path, names, rows, sizes)
    wrong = next((n for n in rows if n in sizes and rows[n] != sizes[n]), None)
    if wrong:
        whose = "GPT-2's matrices" if end == C_ATTN else "the base"
        raise InputError(f"has {rows[wrong]} rows of {wrong}, and {whose} {sizes[wrong]}", culprit=path)
    at = {name: sum(rows[each] for each in names[:i]) for i, name in enumerate(names)}
    placed = [RowSlice(source, 0, rows[name], at[name]) for name, source in parts.items()]
    return fuse_modules("", path, placed, sum(rows.values()))


def _infer_missing_rows(path: str, names: tuple[str, ...], rows: Mapping[str, int], sizes: Sizes) -> dict[str, int]:
    """Return the rows of all split modules: gate has as many as up, and k as v; others must be in `sizes`."""
    found = {}
    for name in names:
        like = {"gate_proj": "up_proj", "up_proj": "gate_proj", "k_proj": "v_proj", "v_proj": "k_proj"}.get(name, name)
        found[name] = rows.get(name) or rows.get(like) or _size(path, name, sizes)
    return found


def _size(path: str, name: str, sizes: Sizes) -> int:
    if name not in sizes:
        raise NeedsFlag(
            f"the adapter alone does not say how many of its rows are {name}'s",
            culprit=path,
            remedy="add --base with the model or its config.json",
        )
    return sizes[name]
