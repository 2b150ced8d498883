"""From one adapter convention to another: what each target module is made of, and what cannot be carried.

Factors are copied as they are wherever one module stays one, so a way and its way back give the same bytes; the scale
goes into the target's alpha. Where a convention fuses what the other splits, a part has its rows of B and the ranks
that reach them, and a whole has its parts' ranks one after the other: exact both ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import Adapter, UpdateSpec
from .architectures.image import (
    DOUBLE,
    FLUX_OUTSIDE,
    FLUX_SWAPPED,
    OPENCLIP,
    SINGLE,
    component_of,
    diffusers_to_sgm,
    sgm_to_diffusers,
)
from .architectures.image_names import flattened
from .errors import InputError, NeedsFlag
from .updates import DoRA, LowRank

SINGLE_COMPONENT = ("peft", "loralib")
FLUX_BLOCKS = (("double_blocks", "transformer_blocks", DOUBLE), ("single_blocks", "single_transformer_blocks", SINGLE))
MLP_RATIO = 4  # of Flux: what linear1's last part has beside the hidden width


@dataclass(frozen=True)
class Source:
    """A module of the adapter: component and path, dotted, as it is spelled there."""

    module: str
    update: UpdateSpec
    component: str
    path: str


@dataclass(frozen=True)
class Part:
    """Rows start:stop of a source module's B, at rows `at` on of the target's."""

    source: Source
    start: int
    stop: int
    at: int = 0


@dataclass(frozen=True)
class Target:
    """A module to be: `rows` in all, of its parts. how: `exact` (the very factors), `split`, `fused` or `swapped`."""

    component: str
    path: str
    rows: int
    parts: tuple[Part, ...]
    how: str


def read_sources(adapter: Adapter) -> tuple[list[Source], list[str]]:
    """The modules with low-rank factors, and those that no image convention can carry."""
    sources, impossible = [], []
    for module, update in adapter.updates.items():
        component, path = component_of(module)
        dotted = flattened().get(path) if adapter.flattened else path
        if update.kind not in ("lora", "dora") or dotted is None:
            impossible.append(module)
            continue
        sources.append(Source(module, update, component or "unet", dotted))
    return sources, impossible


def family_of(sources: list[Source]) -> str | None:
    """`flux`, `sdxl`, `sd1`, or None for what is no image model of these."""
    paths = [s.path for s in sources if s.component == "unet"]
    texts = [s.path for s in sources if s.component != "unet"]
    if any(p.startswith(("double_blocks.", "single_blocks.", "single_transformer_blocks.")) for p in paths):
        return "flux"
    unet = [sgm_to_diffusers(path) for path in paths]
    outside = {*FLUX_OUTSIDE, *FLUX_OUTSIDE.values(), *FLUX_SWAPPED, *FLUX_SWAPPED.values()}
    if any(path.startswith("transformer_blocks.") or path in outside for path in unet):
        return "flux"
    if not any(path.startswith(("down_blocks.", "mid_block.", "up_blocks.", "conv_")) for path in unet):
        known = any(re.search(r"encoder\.(layers|block)\.\d+\.", path) for path in texts)
        return (
            "sd1" if known and not any(s.component == "text_encoder_2" for s in sources) else "sdxl" if known else None
        )
    deep = any(re.search(r"transformer_blocks\.[1-9]", path) for path in unet)
    widths = {s.update.shape[1] for s in sources if s.path.endswith("attn2.to_k")}
    large = deep or 2048 in widths or any(s.component == "text_encoder_2" for s in sources)
    return "sdxl" if large or (not widths and any("put_blocks." in path for path in paths)) else "sd1"


def plan_targets(sources: list[Source], family: str, own: bool) -> list[Target]:
    """own: the model's own names (sgm's, Black Forest Labs'); else diffusers'. Raises InputError where two modules
    would become one.
    """
    whole: list[Target] = []
    pieces: dict[tuple[str, str], list[Part]] = {}
    for source in sources:
        if source.component != "unet":
            whole += _text(source)
        elif family != "flux":
            path = sgm_to_diffusers(source.path)
            attends = family != "sd1" or not path.startswith("up_blocks.0.")  # else its upsampler is second, not third
            whole.append(_as_it_is(source, diffusers_to_sgm(path, attends) if own else path))
        elif own:
            _fuse(source, whole, pieces)
        else:
            whole += _split(source)
    whole += [_joined(key, parts) for key, parts in pieces.items()]
    seen: set[tuple[str, str]] = set()
    for target in whole:
        if (target.component, target.path) in seen:
            raise InputError("two modules of the adapter would become this one", culprit=target.path)
        seen.add((target.component, target.path))
    return whole


def _as_it_is(source: Source, path: str) -> Target:
    rows = source.update.shape[0]
    return Target(source.component, path, rows, (Part(source, 0, rows),), "exact")


def _text(source: Source) -> list[Target]:
    """A text encoder's module in Hugging Face's names: of an OpenCLIP's fused q, k, v three."""
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", source.path)
    names = OPENCLIP.get(layer[2], ()) if layer else ()
    if not layer or not names:
        return [_as_it_is(source, source.path)]
    size, how = source.update.shape[0] // len(names), "exact" if len(names) == 1 else "split"
    return [
        Target(
            source.component,
            f"text_model.encoder.layers.{layer[1]}.{name}",
            size,
            (Part(source, i * size, (i + 1) * size),),
            how,
        )
        for i, name in enumerate(names)
    ]


def _swapped(source: Source, path: str) -> Target:
    rows = source.update.shape[0]
    half = rows // 2
    return Target(source.component, path, rows, (Part(source, half, rows), Part(source, 0, half, half)), "swapped")


def _split(source: Source) -> list[Target]:
    """A module of Flux in diffusers' names."""
    rows, width = source.update.shape[:2]
    if source.path in FLUX_OUTSIDE:
        return [_as_it_is(source, FLUX_OUTSIDE[source.path])]
    if source.path in FLUX_SWAPPED:
        return [_swapped(source, FLUX_SWAPPED[source.path])]
    for stem, other, table in FLUX_BLOCKS:
        found = re.fullmatch(rf"{stem}\.(\d+)\.(.+)", source.path)
        if found and found[2] in table:
            names = table[found[2]]
            sizes = [width] * 3 + [rows - 3 * width] if len(names) == 4 else [rows // len(names)] * len(names)
            targets, start = [], 0
            for name, size in zip(names, sizes, strict=True):
                part = Part(source, start, start + size)
                how = "exact" if len(names) == 1 else "split"
                targets.append(Target("unet", f"{other}.{found[1]}.{name}", size, (part,), how))
                start += size
            return targets
        if found and found[2] == "linear1_qkv":
            parts = [Part(source, i * width, (i + 1) * width) for i in range(3)]
            return [
                Target("unet", f"{other}.{found[1]}.{name}", width, (part,), "split")
                for name, part in zip(SINGLE["linear1"], parts, strict=False)
            ]
    return [_as_it_is(source, source.path)]


def _fuse(source: Source, whole: list[Target], pieces: dict[tuple[str, str], list[Part]]) -> None:
    """A module of Flux in its own names; those that are parts of one wait in `pieces` for the others."""
    outside = {other: own for own, other in FLUX_OUTSIDE.items()}
    swapped = {other: own for own, other in FLUX_SWAPPED.items()}
    if source.path in outside:
        whole.append(_as_it_is(source, outside[source.path]))
        return
    if source.path in swapped:
        whole.append(_swapped(source, swapped[source.path]))
        return
    for stem, other, table in FLUX_BLOCKS:
        found = re.fullmatch(rf"{other}\.(\d+)\.(.+)", source.path)
        if not found:
            continue
        for fused, names in table.items():
            if found[2] in names:
                path = f"{stem}.{found[1]}.{fused}"
                if len(names) == 1:
                    whole.append(_as_it_is(source, path))
                    return
                rows, width = source.update.shape[:2]
                at = names.index(found[2]) * (width if len(names) == 4 else rows)
                pieces.setdefault(("unet", path), []).append(Part(source, 0, rows, at))
                return
    whole.append(_as_it_is(source, source.path))


def _joined(key: tuple[str, str], parts: list[Part]) -> Target:
    width, rows = parts[0].source.update.shape[1], parts[0].stop
    return join(*key, parts, (3 + MLP_RATIO) * width if key[1].endswith("linear1") else 3 * rows)


def join(component: str, path: str, parts: list[Part], rows: int) -> Target:
    """One module of several. Raises NeedsFlag where some of its rows would have a magnitude and others none, and
    InputError for parts of different inputs.
    """
    other = next((p.source for p in parts if p.source.update.shape[1:] != parts[0].source.update.shape[1:]), None)
    if other:
        first = parts[0].source
        raise InputError(
            f"is {other.update.shape} and {first.path} {first.update.shape}: no parts of one matrix", culprit=other.path
        )
    magnitudes = sum(part.source.update.kind == "dora" for part in parts)
    if magnitudes and (magnitudes < len(parts) or sum(part.stop for part in parts) != rows):
        raise NeedsFlag(
            "is fused there, of parts of which some are DoRA: the others have no magnitude",
            culprit=path,
            remedy=f"add --drop {','.join(part.source.module for part in parts)} to leave them out",
        )
    return Target(component, path, rows, tuple(sorted(parts, key=lambda part: part.at)), "fused")


@dataclass(frozen=True)
class Factors:
    """A: (r, in, *kernel), B: (out, r, 1s), the scale that stands before B A, and DoRA's magnitude (out,)."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None


def make_factors(target: Target, load: Callable[[Source], LowRank]) -> Factors:
    """The very tensors where one module stays one; else of the first part's type, scales that differ folded into B."""
    updates = [load(part.source) for part in target.parts]
    made = _low_rank(target, updates)
    if not isinstance(updates[0], DoRA):
        return made
    pieces = [
        update.magnitude.flatten()[part.start : part.stop]
        for update, part in zip(updates, target.parts, strict=True)
        if isinstance(update, DoRA)
    ]
    return replace(made, magnitude=torch.cat(pieces) if len(pieces) > 1 else pieces[0].clone())


def _low_rank(target: Target, updates: list[LowRank]) -> Factors:
    first = updates[0]
    if target.how == "exact":
        return Factors(first.A, first.B, first.scale)
    if target.how == "swapped":
        return Factors(first.A, torch.cat([first.B[part.start : part.stop] for part in target.parts]), first.scale)
    if target.how == "split":
        (part,) = target.parts
        return _trimmed(first.A, first.B[part.start : part.stop], first.scale)
    scales = {update.scale for update in updates}
    scale = scales.pop() if len(scales) == 1 else 1.0
    sides = [update.B if scale == update.scale else _scaled(update.B, update.scale) for update in updates]
    dtype = next((side.dtype for side in sides if side.dtype != first.B.dtype), first.B.dtype)
    if all(update.A.shape == first.A.shape and torch.equal(update.A, first.A) for update in updates[1:]):
        B = torch.zeros(
            target.rows, first.B.shape[1], dtype=dtype
        )  # one A for all: their rows of B, one below the other
        for part, side in zip(target.parts, sides, strict=True):
            B[part.at : part.at + len(side)] = side
        return Factors(first.A.to(dtype), B, scale)
    ranks = [len(update.A) for update in updates]
    B = torch.zeros(target.rows, sum(ranks), dtype=dtype)
    for part, side, start in zip(target.parts, sides, (sum(ranks[:i]) for i in range(len(ranks))), strict=True):
        B[part.at : part.at + len(side), start : start + side.shape[1]] = side
    return Factors(torch.cat([update.A for update in updates]).to(dtype), B, scale)


def _scaled(B: Tensor, scale: float) -> Tensor:
    """In float32 where its own type cannot hold the product."""
    exact = B.double() * scale
    own = exact.to(B.dtype)
    return own if bool((own.double() == exact).all()) else exact.float()


def _trimmed(A: Tensor, B: Tensor, scale: float) -> Factors:
    """Without the ranks that reach none of these rows: a block-sparse B comes apart into what it was made of."""
    kept = B.flatten(2).abs().sum((0, 2)) > 0 if B.dim() > 2 else B.abs().sum(0) > 0
    if not bool(kept.any()):
        kept[0] = True
    return Factors(A[kept], B[:, kept], scale)


def fold(factors: Factors) -> tuple[Factors, bool]:
    """With the scale in B, and whether that is exact: in the same type if it can be, else in float32."""
    B = _scaled(factors.B, factors.scale)
    exact = bool((B.double() == factors.B.double() * factors.scale).all())
    return replace(factors, A=factors.A.to(B.dtype), B=B, scale=1.0), exact


def spell(target: Target, to: str, family: str, texts: int) -> str:
    """A target module's name. texts: how many text encoders the adapter has modules of."""
    number = target.component.removeprefix("text_encoder").lstrip("_") or "1"
    if to == "kohya":
        single = family == "sd1" and texts < 2
        prefix = "lora_unet" if target.component == "unet" else "lora_te" if single else f"lora_te{number}"
        return f"{prefix}_{target.path.replace('.', '_')}"
    if to == "comfy":
        encoders = {"1": "clip_l", "2": "clip_g", "3": "t5xxl"}
        head = "diffusion_model" if target.component == "unet" else f"text_encoders.{encoders[number]}.transformer"
        return f"{head}.{target.path}"
    if to in SINGLE_COMPONENT:
        return target.path
    denoiser = "transformer" if family == "flux" else "unet"
    return f"{denoiser if target.component == 'unet' else target.component}.{target.path}"


def uses_own_names(to: str, family: str) -> bool:
    """Whether a convention calls a model's modules by its own names; kohya's SD 1 files have diffusers'."""
    return to == "comfy" or (to == "kohya" and family != "sd1")


def alpha_of(factors: Factors) -> float:
    """What makes alpha / r the scale."""
    return factors.scale * len(factors.A)
