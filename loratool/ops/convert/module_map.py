"""Map an image adapter's modules to those of another format: which rows each is made of, and its path there.

If one format fuses what the other splits, a split module gets its rows of B and the ranks that reach them, and a fused
one the ranks of its slices one after the other (`factors` makes them).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...adapters.updates.dora import DoRA
from ...architectures.image import (
    DITS,
    FIRST,
    FLUX_ATTENTION,
    OPENCLIP,
    SD3_LAST,
    Dit,
    diffusers_to_sgm,
    sgm_to_diffusers,
)
from ...errors import InputError, NeedsFlag
from .source_modules import MLP_RATIO, SourceModule


@dataclass(frozen=True)
class RowSlice:
    """A run of rows of a source module's B, and its place in the target's."""

    source: SourceModule
    start: int  # the first row in the source
    stop: int  # the row after the last
    at: int = 0  # the first row in the target


@dataclass(frozen=True)
class TargetModule:
    """A module of the output, made of rows of source modules."""

    component: str  # `unet`, `text_encoder`, `text_encoder_2`, ...; empty for a language model
    path: str
    rows: int  # of B in all, some of which may be in no slice
    parts: tuple[RowSlice, ...]
    how: str  # `exact` (the stored factors), `split`, `fused` or `swapped`


def plan_target_modules(sources: list[SourceModule], family: str, maker_names: bool) -> list[TargetModule]:
    """Return the targets that an image adapter's modules become, under diffusers' or the makers' names.

    Args:
        family: a key of IMAGE_FAMILIES.
        maker_names: whether to use the makers' names (sgm's, Black Forest Labs'), not diffusers'.

    Raises:
        InputError: two modules would become one, or rows do not fit.
        NeedsFlag: DoRA could not be split or fused.
    """
    targets: list[TargetModule] = []
    to_fuse: dict[tuple[str, str], list[RowSlice]] = {}
    for source in sources:
        if source.component != "unet":
            targets += _text_encoder_targets(source)
        elif family not in DITS:
            path = sgm_to_diffusers(source.path)
            # a block without attention has its upsampler as second module, not third
            attends = family not in FIRST or not path.startswith("up_blocks.0.")
            targets.append(_unchanged(source, diffusers_to_sgm(path, attends) if maker_names else path))
        elif maker_names:
            _fuse_block(DITS[family], source, targets, to_fuse)
        else:
            targets += _split_block(DITS[family], source)
    targets += [_fuse_slices(key, parts) for key, parts in to_fuse.items()]
    seen: set[tuple[str, str]] = set()
    for target in targets:
        columns = [part.source.module for part in target.parts if part.source.update.along_inputs]
        if columns and target.how in ("split", "fused"):
            raise NeedsFlag(
                f"would be {target.how}, and is DoRA along the inputs, whose norms are of the whole",
                culprit=columns[0],
                remedy=f"add --drop {','.join(columns)} to leave them out",
            )
        if (target.component, target.path) in seen:
            raise InputError("two modules of the adapter would become this one", culprit=target.path)
        seen.add((target.component, target.path))
    return targets


def _unchanged(source: SourceModule, path: str) -> TargetModule:
    rows = source.update.shape[0]
    return TargetModule(source.component, path, rows, (RowSlice(source, 0, rows),), "exact")


def _text_encoder_targets(source: SourceModule) -> list[TargetModule]:
    """Return the targets of a text encoder's module under transformers' names; OpenCLIP's q, k, v are split."""
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", source.path)
    names = OPENCLIP.get(layer[2], ()) if layer else ()
    if not layer or not names:
        return [_unchanged(source, source.path)]
    return _split_rows(source, [f"text_model.encoder.layers.{layer[1]}.{name}" for name in names])


def _split_rows(source: SourceModule, paths: Sequence[str], sizes: Sequence[int] = ()) -> list[TargetModule]:
    """Return the targets that a fused module is split into, one for each path.

    Args:
        sizes: their rows; equal by default.

    Raises:
        InputError: the module has other rows.
    """
    rows = source.update.shape[0]
    if len(paths) == 1:
        return [_unchanged(source, paths[0])]
    sizes = sizes or [rows // len(paths)] * len(paths)
    if sum(sizes) != rows or min(sizes) < 1:
        raise InputError(f"has {rows} rows, which are not those of {len(paths)} parts", culprit=source.module)
    targets, start = [], 0
    for path, size in zip(paths, sizes, strict=True):
        targets.append(TargetModule(source.component, path, size, (RowSlice(source, start, start + size),), "split"))
        start += size
    return targets


def _swap_halves(source: SourceModule, path: str) -> TargetModule:
    rows = source.update.shape[0]
    half = rows // 2
    return TargetModule(
        source.component, path, rows, (RowSlice(source, half, rows), RowSlice(source, 0, half, half)), "swapped"
    )


def _split_block(dit: Dit, source: SourceModule) -> list[TargetModule]:
    """Return the targets of a transformer's module under diffusers' names."""
    rows, width = source.update.shape[:2]
    if source.path in dit.outside:
        return [_unchanged(source, dit.outside[source.path])]
    if source.path in dit.swapped:
        return [_swap_halves(source, dit.swapped[source.path])]
    for stem, other, table in dit.blocks:
        found = re.fullmatch(rf"{stem}\.(\d+)\.(.+)", source.path)
        if not found or found[2] not in (*table, FLUX_ATTENTION):
            continue
        attention = found[2] == FLUX_ATTENTION
        names = [f"{other}.{found[1]}.{name}" for name in table["linear1" if attention else found[2]]]
        if found[2] == SD3_LAST and rows == 2 * width:
            return [_swap_halves(source, names[0])]
        if attention:
            return _split_rows(source, names[:3], [width] * 3)
        return _split_rows(source, names, [width] * 3 + [rows - 3 * width] if len(names) == 4 else ())
    return [_unchanged(source, source.path)]


def _fuse_block(
    dit: Dit, source: SourceModule, targets: list[TargetModule], to_fuse: dict[tuple[str, str], list[RowSlice]]
) -> None:
    """Add a transformer's module under its makers' names to `targets`, or if it is to be fused to `to_fuse`."""
    rows, width = source.update.shape[:2]
    outside = {diffusers: maker for maker, diffusers in dit.outside.items()}
    swapped = {diffusers: maker for maker, diffusers in dit.swapped.items()}
    if source.path in outside:
        targets.append(_unchanged(source, outside[source.path]))
        return
    if source.path in swapped:
        targets.append(_swap_halves(source, swapped[source.path]))
        return
    if source.path.endswith(f".{FLUX_ATTENTION}"):
        path = source.path.replace(FLUX_ATTENTION, "linear1")
        to_fuse.setdefault(("unet", path), []).append(RowSlice(source, 0, rows))
        return
    for stem, other, table in dit.blocks:
        found = re.fullmatch(rf"{other}\.(\d+)\.(.+)", source.path)
        fused, names = next(((k, v) for k, v in table.items() if found and found[2] in v), ("", ()))
        if not found or not fused:
            continue
        path = f"{stem}.{found[1]}.{fused}"
        if len(names) == 1:
            last = fused == SD3_LAST and rows == 2 * width
            targets.append(_swap_halves(source, path) if last else _unchanged(source, path))
        else:
            at = names.index(found[2]) * (width if len(names) == 4 else rows)
            to_fuse.setdefault(("unet", path), []).append(RowSlice(source, 0, rows, at))
        return
    targets.append(_unchanged(source, source.path))


def _fuse_slices(key: tuple[str, str], parts: list[RowSlice]) -> TargetModule:
    width, rows = parts[0].source.update.shape[1], parts[0].stop
    return fuse_modules(*key, parts, (3 + MLP_RATIO) * width if key[1].endswith("linear1") else 3 * rows)


def fuse_modules(component: str, path: str, parts: list[RowSlice], rows: int) -> TargetModule:
    """Return the target that fuses these slices into `rows` rows.

    Raises:
        NeedsFlag: some of its rows would have a magnitude and others none.
        InputError: the slices have different inputs, or more rows than there is place for.
    """
    other = next((p.source for p in parts if p.source.update.shape[1:] != parts[0].source.update.shape[1:]), None)
    if other:
        first = parts[0].source
        raise InputError(
            f"is {other.update.shape} and {first.path} {first.update.shape}: no parts of one matrix", culprit=other.path
        )
    ordered = sorted(parts, key=lambda part: part.at)
    ends = [part.at + part.stop for part in ordered]
    starts = [part.at for part in ordered[1:]] + [rows]
    wrong = next((p for p, end, start in zip(ordered, ends, starts, strict=True) if end > start), None)
    if wrong:
        raise InputError(f"has {wrong.stop} rows, too many for its part of {path}", culprit=wrong.source.module)
    magnitudes = sum(part.source.update.cls is DoRA for part in parts)
    if magnitudes and (magnitudes < len(parts) or sum(part.stop for part in parts) != rows):
        raise NeedsFlag(
            "is fused there, of parts of which some are DoRA: the others have no magnitude",
            culprit=path,
            remedy=f"add --drop {','.join(part.source.module for part in parts)} to leave them out",
        )
    return TargetModule(component, path, rows, tuple(ordered), "fused")
