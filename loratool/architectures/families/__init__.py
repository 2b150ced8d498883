"""Look a module up in the tables of model families: which family it is of, its names in all namings, and its rows.

A family is a file here with one literal table and a row of `FAMILIES` (image models), of `ENCODERS` (their text
encoders) or of `LAYOUTS` (what language models fuse). A path is looked up with its dots as `_`, so that kohya's
flattened names are found as well: no two modules of a family are alike then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from . import clip, flux, gpt2, phi3, sd1, sd2, sd3, sdxl, t5
from .table import Block, Fused, ModelFamily, Rows, Run
from .unet import STEMS, diffusers_to_sgm, sgm_to_diffusers, unet_paths

# Where nothing tells two families apart, the first counts.
FAMILIES: dict[str, ModelFamily] = {f.key: f for f in (sd1.FAMILY, sd2.FAMILY, sdxl.FAMILY, sd3.FAMILY, flux.FAMILY)}


ENCODERS: dict[str, ModelFamily] = {f.key: f for f in (clip.FAMILY, t5.FAMILY)}


LAYOUTS: dict[str, ModelFamily] = {f.key: f for f in (phi3.FAMILY, gpt2.FAMILY)}


@dataclass(frozen=True)
class Located:
    """A module of a family, found under any of its names."""

    family: ModelFamily
    path: str  # with its dots, in the naming that it was found in
    maker: tuple[str, ...]  # the maker's modules that have rows of it
    diffusers: tuple[str, ...]  # diffusers' modules that have rows of it
    rows: tuple[tuple[int, Fused], ...] = ()  # (rows / columns, what it is of diffusers' then); 0 is any other ratio


@dataclass(frozen=True)
class Span:
    """Rows of a module that are rows of diffusers' module."""

    start: int  # rows [start, stop) of the module
    stop: int
    module: str  # diffusers'
    skip: int  # its row that `start` is
    whole: int  # how many rows it has


def locate(family: ModelFamily, path: str, blocks: int = 0) -> Located | None:
    """Find a module by its name in any naming of a family, with dots or flattened; None if the family has no such.

    Args:
        blocks: how many blocks a stack has at least; by default as many as the largest known model.
    """
    return _index(family, blocks).get(path.replace(".", "_")) or _locate_by_end(family, path)


def to_diffusers(family: ModelFamily, path: str) -> tuple[str, ...]:
    """Return diffusers' modules that a module's rows are of; a path that is not in the table is returned unchanged."""
    found = locate(family, path)
    return found.diffusers if found else (sgm_to_diffusers(path) if family.up_attention else path,)


def to_maker(family: ModelFamily, path: str) -> tuple[str, ...]:
    """Return the maker's modules that a module's rows are of; a path that is not in the table is returned unchanged."""
    found = locate(family, path)
    if found:
        return found.maker
    return (_sgm_of(family, sgm_to_diffusers(path)) if family.up_attention else path,)


def kernel_of(family: ModelFamily, path: str) -> tuple[int, ...]:
    """Return the kernel of the convolution that a module is; empty for a linear layer, and where it is not known."""
    names = to_diffusers(family, path)
    size = next((size for end, size in family.kernels.items() for name in names if f".{name}".endswith(f".{end}")), 0)
    return (size, size) if size else ()


def parts_of(
    located: Located, columns: int, rows: int = 0, known: Mapping[str, int] | None = None, queries: int = 0
) -> tuple[Span, ...] | None:
    """Return which rows of diffusers' modules a module consists of, in its order; None if no such matrix is known.

    Args:
        columns: of the module's matrix.
        rows: of the module's matrix; 0 if unknown.
        known: diffusers' module -> its rows, as far as they are known.
        queries: rows of a language model's query projection; 0 if unknown.
    """
    for ratio, fused in located.rows:
        sizes = rows_of_runs(fused, columns, rows, known, queries)
        if sizes is None and not rows:
            whole = next((r * columns for end, r in located.family.ratios.items() if located.path.endswith(end)), 0)
            sizes = rows_of_runs(fused, columns, whole, known, queries) if whole else None
        if sizes is None or (ratio and sum(sizes) != ratio * columns):
            continue
        spans, start = [], 0
        for run, size in zip(_runs(fused), sizes, strict=True):
            spans.append(Span(start, start + size, run.module, run.part * size, run.parts * size))
            start += size
        return tuple(spans)
    return None


def rows_of_runs(
    fused: Fused, columns: int, rows: int = 0, known: Mapping[str, int] | None = None, queries: int = 0
) -> tuple[int, ...] | None:
    """Return how many rows each run of a fused matrix has, with the arguments of `parts_of`; None as there."""
    runs, rules = _runs(fused), fused.sizes or (None,) * len(fused.runs)
    told = [(known or {}).get(run.module, 0) // run.parts for run in runs]
    sizes = [
        rule * columns if isinstance(rule, int) else (queries or size) if rule == "queries" else 0
        for rule, size in zip(rules, told, strict=True)
    ]
    shares = [size for size, rule in zip(told, rules, strict=True) if rule is None and size]
    open_runs = rules.count(None)
    if "queries" in rules and not any(s for s, rule in zip(sizes, rules, strict=True) if rule == "queries"):
        if not rows or not shares:
            return None
        sizes[rules.index("queries")] = rows - sum(sizes) - shares[0] * open_runs
    if open_runs:
        share, rest = (shares[0], 0) if shares else divmod(rows - sum(sizes), open_runs)
        if rest:
            return None
        sizes = [share if rule is None else size for size, rule in zip(sizes, rules, strict=True)]
    wrong = any(size and size != made for size, made in zip(told, sizes, strict=True))
    return None if wrong or min(sizes) < 1 or (rows and sum(sizes) != rows) else tuple(sizes)


def detect(modules: Iterable[tuple[str, str, tuple[int, ...]]], numbered: bool = False) -> tuple[ModelFamily, ...]:
    """Return the image families that modules are of; several, in the table's order, where nothing tells them apart.

    A family is of them if it has every module of the denoiser and every component. Then names that only one has decide,
    then widths, then the naming that kohya's files have.

    Args:
        modules: (component, path in any naming, shape of the matrix, empty if it is not known).
        numbered: whether a prefix numbers the first text encoder, as only families with several have it.
    """
    every = list(modules)
    paths = [path for component, path, _ in every if component == "unet"]
    texts = [path for component, path, _ in every if component != "unet"]
    if paths:
        fitting = [family for family in FAMILIES.values() if _fits(family, every, paths)]
    else:
        in_encoder = any(locate(encoder, path) for encoder in ENCODERS.values() for path in texts)
        fitting = list(FAMILIES.values()) if in_encoder else []
    has = {component for component, _, _ in every}
    several = [f for f in fitting if has <= {c.name for c in f.components} and (not numbered or len(f.components) > 2)]
    fitting = several or fitting
    scores = [_evidence(family, every, paths) for family in fitting]
    return tuple(family for family, score in zip(fitting, scores, strict=True) if score == max(scores))


def _fits(family: ModelFamily, modules: Iterable[tuple[str, str, tuple[int, ...]]], paths: Iterable[str]) -> bool:
    """Return whether a family has all of the denoiser's modules, or its UNet some, whose others are listed and left."""
    if family.up_attention:
        return any(name.startswith(STEMS) for path in paths for name in to_diffusers(family, path))
    ratios = family.ratios.items()
    shapes = [(ratio, shape) for _, path, shape in modules for end, ratio in ratios if shape and path.endswith(end)]
    return all(shape[0] == ratio * shape[1] for ratio, shape in shapes) and all(locate(family, path) for path in paths)


def _evidence(
    family: ModelFamily, modules: Iterable[tuple[str, str, tuple[int, ...]]], paths: list[str]
) -> tuple[int, int, int]:
    """Return (names, widths, naming): 1 for what only this family has, -1 for a width that it has not, else 0."""
    names = [name for path in paths for name in to_diffusers(family, path)]
    telling = bool(family.telling) and any(re.search(family.telling, name) for name in names)
    widths = [
        shape[1] in width.columns
        for width in family.widths
        for component, path, shape in modules
        if shape and component == width.component and path.endswith(width.ends)
    ]
    own = family.kohya_maker_names and any(path not in to_diffusers(family, path) for path in paths)
    return int(telling), (1 if any(widths) else -1) if widths else 0, int(own)


def family_of_names(paths: Iterable[str]) -> ModelFamily | None:
    """Return the image family of a base's denoiser, by the paths of its modules; None if it is of no known one."""
    every = list(paths)
    marked = [f for f in FAMILIES.values() if any(mark in path for mark in f.marks for path in every)]
    blocks = count_blocks(every)
    return max(marked, key=lambda family: sum(bool(locate(family, path, blocks)) for path in every), default=None)


def count_blocks(paths: Iterable[str]) -> int:
    """Return how many blocks a stack has at most, by the numbers in the names; 0 where all tables have as many."""
    most = max((int(each) for path in paths for each in re.findall(r"\b\d{1,3}\b", path)), default=0) + 1
    return most if any(most > block.count for f in FAMILIES.values() for block in f.blocks) else 0


def names_maker(family: ModelFamily, path: str) -> bool:
    """Return whether a path is in the maker's naming and not in diffusers' too."""
    if family.up_attention:
        return sgm_to_diffusers(path) != path
    found = locate(family, path)
    return found is not None and path in found.maker and path not in found.diffusers


def names_of(family: ModelFamily, blocks: int) -> Mapping[str, Located]:
    """Return every name of a family, flattened, with the module that it means, at least up to a number of blocks."""
    return _index(family, blocks)


@lru_cache(maxsize=256)
def _index(family: ModelFamily, blocks: int) -> dict[str, Located]:
    found = _unet_index(family) if family.up_attention else _table_index(family, blocks)
    return {path.replace(".", "_"): each for path, each in found.items()}


def _unet_index(family: ModelFamily) -> dict[str, Located]:
    found: dict[str, Located] = {}
    for path in unet_paths():
        sgm = _sgm_of(family, path)
        each = Located(family, path, (sgm,), (path,), ((0, Fused((path,))),))
        # An upsampler has two numbers, by whether its block has attention: in another UNet it may be the other.
        spellings = {path, sgm, diffusers_to_sgm(path), diffusers_to_sgm(path, False)}
        found |= {name: replace(each, path=name) for name in spellings}
    return found


def _sgm_of(family: ModelFamily, path: str) -> str:
    """Return sgm's path of a UNet's module from diffusers'."""
    level = re.match(r"up_blocks\.(\d+)\.", path)
    attends = not level or int(level[1]) >= len(family.up_attention) or family.up_attention[int(level[1])]
    return diffusers_to_sgm(path, attends)


Alternatives = tuple[tuple[int, Fused], ...]


def _table_index(family: ModelFamily, blocks: int) -> dict[str, Located]:
    maker: dict[str, Alternatives] = {}
    aliases: dict[str, Alternatives] = {}
    for number, block in _numbered(family, blocks):
        maker_stem, stem = (each.replace("{i}", number) for each in (block.maker, block.diffusers))
        names = {**block.names, **{name: name for name in block.alike}}
        for name, rows in names.items():
            plain: Alternatives = ((0, _absolute(stem, rows)),)
            ratio, other = block.by_ratio.get(name, (0, rows))
            maker[_join(maker_stem, name)] = ((ratio, _absolute(stem, other)), *plain) if ratio else plain
        aliases |= {_join(maker_stem, n): ((0, _absolute(stem, rows)),) for n, rows in block.aliases.items()}
        modules = dict.fromkeys(run.module for rows in names.values() for run in _runs(_absolute("", rows)))
        for other_stem in block.stems:
            further = other_stem.replace("{i}", number)
            aliases |= {_join(further, m): ((0, _absolute(stem, m)),) for m in modules}
    maker |= {name: ((0, _absolute("", rows)),) for name, rows in family.outside.items()}
    maker |= {name: ((0, _absolute("", name)),) for name in family.alike}
    aliases |= {name: ((0, _absolute("", rows)),) for name, rows in family.outside_aliases.items()}
    makers: dict[str, dict[str, None]] = {}
    for name, each in maker.items():
        for module in _modules(each):
            makers.setdefault(module, {})[name] = None
    own: dict[str, Alternatives] = {module: ((0, _absolute("", module)),) for module in makers}
    found = {}
    for name, each in {**own, **aliases, **maker}.items():
        modules_of = _modules(each)
        theirs = tuple(dict.fromkeys(name for module in modules_of for name in makers[module]))
        found[name] = Located(family, name, (name,) if name in maker else theirs, modules_of, each)
    return found


def _numbered(family: ModelFamily, blocks: int) -> Iterator[tuple[str, Block]]:
    """Yield every block with each of its numbers."""
    for block in family.blocks:
        for number in range(max(block.count, blocks) if block.maker != "*" else 0):
            yield str(number), block


def _locate_by_end(family: ModelFamily, path: str) -> Located | None:
    """Find a module of a family whose blocks have any path, by the end of its name."""
    for block in family.blocks if family.blocks and family.blocks[0].maker == "*" else ():
        for name, rows in block.names.items():
            for end in (name, *(run.module for run in _runs(_absolute("", rows)))):
                if f".{path}".endswith(f".{end}"):
                    stem = path.removesuffix(end).removesuffix(".")
                    fused = _absolute(stem, rows)
                    modules = tuple(run.module for run in _runs(fused))
                    own = ((0, fused),) if end == name else ((0, Fused((path,))),)
                    return Located(family, path, (_join(stem, name),), modules if end == name else (path,), own)
    return None


def _join(stem: str, name: str) -> str:
    return ".".join(each for each in (stem, name) if each)


def _absolute(stem: str, rows: Rows) -> Fused:
    """Return what a name of the table stands for, with the paths below a stem."""
    fused = rows if isinstance(rows, Fused) else Fused((rows,))
    return replace(fused, runs=tuple(replace(run, module=_join(stem, run.module)) for run in _runs(fused)))


def _runs(fused: Fused) -> tuple[Run, ...]:
    return tuple(run if isinstance(run, Run) else Run(run) for run in fused.runs)


def _modules(rows: Iterable[tuple[int, Fused]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.module for _, fused in rows for run in _runs(fused)))
