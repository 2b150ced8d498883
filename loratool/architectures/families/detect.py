"""Tell the family of an adapter's modules or of a base's tensors, by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from . import ENCODERS, FAMILIES
from .lookup import locate, to_diffusers
from .table import DENOISERS, ModelFamily, Naming
from .unet import STEMS

# Modules of blocks that image models share with others: a ViT (`timm/models/vision_transformer.py`), MPT
# (`llmfoundry/models/mpt`), Meta's Llama (`llama/model.py`), and Phi-3, which is a part of OmniGen.
SHARED = re.compile(
    r"blocks\.\d+\.(?:norm\d|attn\.(?:qkv|proj|out_proj|[qk]_norm)|mlp\.fc[12])"
    r"|layers\.\d+\.(?:feed_forward\.w[123]|attention_norm|ffn_norm)"
    r"|(?:llm\.)?(?:blocks|layers)\.\d+\.(?:self_attn\.\w+_\w+|mlp\.\w+|\w+_layernorm)"
)


def detect(modules: Iterable[tuple[str, str, tuple[int, ...]]], numbered: bool = False) -> tuple[ModelFamily, ...]:
    """Return the image families that modules are of; several, in the table's order, where nothing tells them apart.

    A family is of them if it has every module of the denoiser and every component. Then names that only one has decide,
    then widths, then the number of blocks, then the naming that kohya's files have.

    Args:
        modules: (component, path in any naming, shape of the matrix, empty if it is not known).
        numbered: whether a prefix numbers the first text encoder, as only families with several have it.
    """
    every = list(modules)
    paths = [path for component, path, _ in every if component in DENOISERS]
    texts = [path for component, path, _ in every if component not in DENOISERS]
    if paths:
        fitting = [family for family in FAMILIES.values() if _fits(family, every, paths)]
    else:
        in_encoder = any(locate(encoder, path) for encoder in ENCODERS.values() for path in texts)
        fitting = list(FAMILIES.values()) if in_encoder else []
    t5 = {path for path in texts if locate(ENCODERS["t5"], path)}
    has = {"t5" if path in t5 else component for component, path, _ in every}
    several = [f for f in fitting if has <= _parts(f) and (not numbered or len(f.components) > 2)]
    fitting = several or fitting
    scores = [_evidence(family, every, paths) for family in fitting]
    return tuple(family for family, score in zip(fitting, scores, strict=True) if score == max(scores))


def _parts(family: ModelFamily) -> set[str]:
    """Return the names of a family's components, that of a T5 without its number."""
    return {"t5" if component.encoder == "t5" else component.name for component in family.components}


def _fits(family: ModelFamily, modules: Iterable[tuple[str, str, tuple[int, ...]]], paths: Iterable[str]) -> bool:
    """Return whether a family has all of the denoiser's modules, or its UNet some, whose others are listed and left."""
    if family.up_attention:
        return any(name.startswith(STEMS) for path in paths for name in to_diffusers(family, path))
    ratios = family.ratios.items()
    shapes = [
        (ratio, shape)
        for _, path, shape in modules
        for end, ratio in ratios
        if len(shape) > 1 and _ends_with(path, end)
    ]
    return all(shape[0] == ratio * shape[1] for ratio, shape in shapes) and all(locate(family, path) for path in paths)


def _ends_with(path: str, *ends: str) -> bool:
    """Return whether a path has one of these ends, be it flattened or with the dots of another naming."""
    return path.replace(".", "_").endswith(tuple(end.replace(".", "_") for end in ends))


def _evidence(
    family: ModelFamily, modules: Iterable[tuple[str, str, tuple[int, ...]]], paths: list[str]
) -> tuple[int, int, int, int]:
    """Return (names, widths, counts, naming): 1 for what tells this family, -1 for what speaks against it, else 0."""
    names = [name for path in paths for name in to_diffusers(family, path)]
    telling = bool(family.telling) and any(re.search(family.telling, name) for name in names)
    columns = [
        (
            width,
            [
                shape[1]
                for c, path, shape in modules
                if c == width.component and len(shape) > 1 and _ends_with(path, *width.ends)
            ],
        )
        for width in family.widths
    ]
    widths = [any(each in width.columns for each in found) for width, found in columns if found]
    own = family.kohya is Naming.MAKER and any(path not in to_diffusers(family, path) for path in paths)
    return int(telling), (1 if all(widths) else -1) if widths else 0, _counts_agree(family, names), int(own)


def _counts_agree(family: ModelFamily, names: Iterable[str]) -> int:
    """Return 1 if of each stack the last block of a known model is there, -1 if one is there that none has, else 0."""
    every = list(names)
    found = []
    for block in family.blocks if not family.up_attention else ():
        stem = re.compile(re.escape(block.diffusers).replace(r"\{i\}", "([0-9]+)") + r"\.")
        numbers = [int(match[1]) for name in every if (match := stem.match(name))]
        if numbers and block.counts:
            last = max(numbers) + 1
            found.append(-1 if last > max(block.counts) else int(last in block.counts))
    return min(found, default=0)


def family_of_names(shapes: Mapping[str, tuple[int, ...]]) -> ModelFamily | None:
    """Return the image family of a base's denoiser; None if it is of no known one.

    Of the families with a mark in the names it is the one that has most of the modules, then the one whose widths
    agree, then the first.

    Args:
        shapes: path of each module, in any naming -> shape of its weight.
    """
    names = "\n".join(shapes)
    marked = [family for family in FAMILIES.values() if any(mark in names for mark in family.marks)]
    scores = [
        (sum(locate(family, path) is not None for path in shapes), _widths_agree(family, shapes)) for family in marked
    ]
    return next((f for f, score in zip(marked, scores, strict=True) if score == max(scores) and score[0]), None)


def _widths_agree(family: ModelFamily, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return 1 if a module has a width that tells the family, -1 if one has another, else 0."""
    return _evidence(family, [("unet", path, shape) for path, shape in shapes.items()], [])[1]
