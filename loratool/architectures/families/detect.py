"""Find the family of an adapter's modules or of a base's tensors, by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from . import ENCODERS, FAMILIES
from .lookup import Located, locate, to_diffusers
from .table import DENOISERS, ModelFamily, Naming
from .unet import STEMS

# Modules of blocks that image models share with other models: a ViT (`timm/models/vision_transformer.py`), MPT
# (`llmfoundry/models/mpt`), Meta's Llama (`llama/model.py`), and Phi-3, which is a part of OmniGen.
SHARED = re.compile(
    r"blocks\.\d+\.(?:norm\d|ffn\.\d|attn\.(?:qkv|proj|out_proj|[qk]_norm)|mlp\.(?:fc[12]|\w+_proj))"
    r"|layers\.\d+\.(?:feed_forward\.w[123]|attention_norm|ffn_norm)"
    r"|(?:llm\.)?layers\.\d+\.(?:self_attn\.(?!to_|add_)\w+|mlp\.\w+|\w+_layernorm)"
)


def detect(modules: Iterable[tuple[str, str, tuple[int, ...]]], numbered: bool = False) -> tuple[ModelFamily, ...]:
    """Return the image families that modules can be of, in the table's order; several if nothing distinguishes them.

    A candidate has every module of the denoiser and every component. Candidates are excluded if their known models have
    other widths or fewer blocks, then if the names mix several namings. Among the rest, names that only one family has
    decide, then whether all blocks of a known model are present.

    Args:
        modules: (component, path in any naming, shape of the matrix, empty if unknown, with 0 for unknown rows).
        numbered: a prefix numbers the first text encoder, as in families with several.
    """
    every = list(modules)
    paths = [path for component, path, _ in every if component in DENOISERS]
    fitting = families_with(every, numbered)
    scores = [_evidence(family, every, paths) for family in fitting]
    return tuple(family for family, score in zip(fitting, scores, strict=True) if score == max(scores))


def families_with(
    modules: Iterable[tuple[str, str, tuple[int, ...]]], numbered: bool = False
) -> tuple[ModelFamily, ...]:
    """Return the image families that have every module of the denoiser and every component, of any size.

    Args:
        modules, numbered: as for `detect`.
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
    return tuple(several or fitting)


def _parts(family: ModelFamily) -> set[str]:
    """Return the names of a family's components, without the number of a T5."""
    return {"t5" if component.encoder == "t5" else component.name for component in family.components}


def _fits(family: ModelFamily, modules: Iterable[tuple[str, str, tuple[int, ...]]], paths: Iterable[str]) -> bool:
    """Return whether a family has all of the denoiser's modules; a UNet may have some, if the others are listed."""
    if family.up_attention:
        named = any(name.startswith(STEMS) for path in paths for name in to_diffusers(family, path))
        return named or all(locate(family, path) for path in paths)
    if not all(locate(family, path) for path in paths):  # first, as one path of another model decides it
        return False
    shapes = [(path, shape) for _, path, shape in modules if len(shape) > 1 and shape[0]]
    return all(
        shape[0] == ratio * shape[1]
        for end, ratio in family.ratios.items()
        for path, shape in shapes
        if _ends_with(path, end)
    )


def _ends_with(path: str, *ends: str) -> bool:
    """Return whether a path has one of these ends, flattened or with the dots of another naming."""
    return path.replace(".", "_").endswith(tuple(end.replace(".", "_") for end in ends))


def _evidence(
    family: ModelFamily, modules: Iterable[tuple[str, str, tuple[int, ...]]], paths: list[str]
) -> tuple[bool, bool, bool, bool]:
    """Return (sizes, naming, names, blocks): whether each agrees with the family or identifies it."""
    names = [name for path in paths for name in to_diffusers(family, path)]
    numbers = _numbers(family, names)
    telling = bool(family.telling) and any(re.search(family.telling, name) for name in names)
    complete = [
        numbers_of_stack == set(range(len(numbers_of_stack))) and len(numbers_of_stack) in counts
        for numbers_of_stack, counts in numbers
    ]
    # The only stack of another family may begin with as many blocks as one of several stacks has.
    all_blocks = (
        bool(complete) and all(complete) and len(complete) >= min(2, sum(bool(b.counts) for b in family.blocks))
    )
    return has_sizes(family, modules), _is_of_one_naming(family, paths), telling, all_blocks


def has_sizes(family: ModelFamily, modules: Iterable[tuple[str, str, tuple[int, ...]]]) -> bool:
    """Return whether a known model of a family has the blocks and columns of `modules` (as for `detect`)."""
    every = list(modules)
    names = [n for component, path, _ in every if component in DENOISERS for n in to_diffusers(family, path)]
    fewer = all(max(blocks) < max(counts) for blocks, counts in _numbers(family, names))
    return fewer and _widths_agree(family, every)


def _widths_agree(family: ModelFamily, modules: Iterable[tuple[str, str, tuple[int, ...]]]) -> bool:
    """Return whether the number of columns of each module occurs in a known model of a family."""
    for component, path, shape in modules if family.widths else ():
        part = "unet" if component in DENOISERS else component
        located = locate(family, path) if component in DENOISERS else None
        names = located.diffusers if located else () if component in DENOISERS else (path,)
        for width in family.widths if len(shape) > 1 else ():
            is_of_it = width.component == part and any(f".{name}".endswith(width.ends) for name in names)
            if is_of_it and shape[1] not in width.columns:
                return False
    return True


def _is_of_one_naming(family: ModelFamily, paths: Iterable[str]) -> bool:
    """Return whether all paths have one naming, the maker's, diffusers' or ComfyUI's, as in any one file."""
    if family.up_attention:
        return True
    located_all = [located for path in paths if (located := locate(family, path))]
    named_paths = [(each.path, each) for each in located_all]
    return any(all(path in each.names(naming) or not _named(each) for path, each in named_paths) for naming in Naming)


def _named(located: Located) -> bool:
    """Return whether a path is a name of one of the namings, not an alias."""
    return any(located.path in located.names(naming) for naming in Naming)


def _numbers(family: ModelFamily, names: Iterable[str]) -> list[tuple[set[int], tuple[int, ...]]]:
    """Return, for each stack with blocks in `names`, the numbers of the blocks and the counts in known models."""
    every, stacks = list(names), []
    for block in family.blocks if not family.up_attention else ():
        stem = re.compile(re.escape(block.diffusers).replace(r"\{i\}", "([0-9]{1,9})") + r"\.")
        numbers = {int(match[1]) for name in every if (match := stem.match(name))}
        if numbers and block.counts:
            stacks.append((numbers, block.counts))
    return stacks


def family_of_names(shapes: Mapping[str, tuple[int, ...]]) -> ModelFamily | None:
    """Return the image family of a base's denoiser; None if it is unknown.

    Among the families with a mark in the names, most modules decide, then agreement of the widths, then the order of
    the table. A family with less than a quarter of the modules is another model.

    Args:
        shapes: path of each module, in any naming -> shape of its weight.
    """
    names = "\n".join(shapes)
    modules = [("unet", path, shape) for path, shape in shapes.items()]
    marked = [family for family in FAMILIES.values() if any(mark in names for mark in family.marks)]
    scores = [
        (sum(locate(family, path) is not None for path in shapes), _widths_agree(family, modules)) for family in marked
    ]
    return next(
        (f for f, score in zip(marked, scores, strict=True) if score == max(scores) and 4 * score[0] > len(shapes)),
        None,
    )
