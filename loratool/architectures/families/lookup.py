"""Look up a module in the table of its family: its names in all namings, and its rows.

A path is looked up with its dots as `_`, so that kohya's flattened names are also found. No two modules of a family
have the same flattened name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from .table import Fused, ModelFamily, Naming, Rows, Run
from .unet import SGM_OUTSIDE, diffusers_to_sgm, sgm_to_diffusers, unet_paths

NUMBER = re.compile(r"[0-9]+")
BLOCK = re.compile(r"0|[1-9][0-9]{0,8}")  # the number of a block
PLACE = re.compile(r"[0-9]+|{i}")  # a number of a template

# Prefixes of the flattened names of a UNet's modules
UNET_STARTS = (
    *("down_blocks_", "mid_block_", "up_blocks_", "input_blocks_", "middle_block_", "output_blocks_"),
    *(name.replace(".", "_") for name in (*SGM_OUTSIDE, *SGM_OUTSIDE.values())),
)


@dataclass(frozen=True)
class Located:
    """A module of a family, found under any of its names."""

    family: ModelFamily
    path: str  # with dots, in the naming in which it was found
    maker: tuple[str, ...]  # the maker's modules that have rows of it
    diffusers: tuple[str, ...]  # diffusers' modules that have rows of it
    rows: tuple[tuple[int, Fused], ...] = ()  # (rows / columns, diffusers' rows for this ratio); 0 is any other ratio
    comfy: tuple[str, ...] = ()  # ComfyUI's modules that have rows of it

    def names(self, naming: Naming) -> tuple[str, ...]:
        """Return the modules of a naming that have rows of it."""
        return {Naming.MAKER: self.maker, Naming.DIFFUSERS: self.diffusers, Naming.COMFY: self.comfy}[naming]


@dataclass(frozen=True)
class Span:
    """Rows of a module that are rows of diffusers' module."""

    start: int  # rows [start, stop) of the module
    stop: int
    module: str  # diffusers'
    skip: int  # the number of row `start` in it
    module_rows: int  # its number of rows


def locate(family: ModelFamily, path: str, naming: Naming | None = None) -> Located | None:
    """Find a module by its name in any naming of a family, with dots or flattened; None if the family has no such name.

    The result is also None if two namings use the name for different modules and `naming` does not decide.
    """
    flat = path.replace(".", "_")
    if family.up_attention:
        return _unet_index(family).get(flat) if flat.startswith(UNET_STARTS) else None
    candidates = _of_table(family, flat, naming)
    return (
        next((each for each in candidates if each.path == path), *candidates[:1])
        if candidates
        else _locate_by_end(family, path)
    )


def to_diffusers(family: ModelFamily, path: str) -> tuple[str, ...]:
    """Return diffusers' modules that have a module's rows; a path that is not in the table is returned unchanged."""
    located = locate(family, path)
    return located.diffusers if located else (sgm_to_diffusers(path) if family.up_attention else path,)


def kernel_of(family: ModelFamily, path: str) -> tuple[int, ...]:
    """Return the kernel of a convolution; empty for a linear layer and an unknown kernel."""
    names = to_diffusers(family, path)
    kernels = family.kernels.items()
    return next((kernel for end, kernel in kernels for name in names if f".{name}".endswith(f".{end}")), ())


def complete_parts(located: Located) -> tuple[str, ...]:
    """Return diffusers' modules that a module consists of; empty if it lacks rows of one, or its size decides."""
    shares = []
    for _, fused in located.rows:
        runs = _runs(fused)
        shares.append({run.module: sum(Fraction(1, r.parts) for r in runs if r.module == run.module) for run in runs})
    is_complete = all(share == shares[0] and set(share.values()) == {1} for share in shares)
    return tuple(shares[0]) if shares and is_complete else ()


def parts_of(
    located: Located, columns: int, rows: int = 0, known: Mapping[str, int] | None = None, queries: int = 0
) -> tuple[Span, ...] | None:
    """Return the rows of diffusers' modules that make up a module, in its order; None if no such matrix is known.

    Args:
        columns: of the module's matrix.
        rows: of the module's matrix; 0 if unknown.
        known: diffusers' module -> its number of rows, where known.
        queries: rows of a language model's query projection; 0 if unknown.
    """
    for ratio, fused in located.rows:
        sizes = rows_of_runs(fused, columns, rows, known, queries)
        if sizes is None and not rows:
            total = next((r * columns for end, r in located.family.ratios.items() if located.path.endswith(end)), 0)
            sizes = rows_of_runs(fused, columns, total, known, queries) if total else None
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
    """Return the number of rows of each run in a fused matrix; arguments and None as in `parts_of`."""
    runs, rules = _runs(fused), fused.sizes or (None,) * len(fused.runs)
    sizes_known = [(known or {}).get(run.module, 0) // run.parts for run in runs]
    sizes = [
        rule * columns if isinstance(rule, int) else (queries or size) if rule == "queries" else 0
        for rule, size in zip(rules, sizes_known, strict=True)
    ]
    shares = [size for size, rule in zip(sizes_known, rules, strict=True) if rule is None and size]
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
    wrong = any(size and size != actual for size, actual in zip(sizes_known, sizes, strict=True))
    return None if wrong or min(sizes) < 1 or (rows and sum(sizes) != rows) else tuple(sizes)


def names_maker(family: ModelFamily, path: str) -> bool:
    """Return whether a path is in the maker's or ComfyUI's naming and not also in diffusers'."""
    if family.up_attention:
        return sgm_to_diffusers(path) != path
    located = locate(family, path)
    return located is not None and path in (*located.maker, *located.comfy) and path not in located.diffusers


def names_scale(family: ModelFamily, path: str) -> bool:
    """Return whether the maker's name for the weight of a norm ends in `.scale`."""
    return NUMBER.sub("#", path) in _scaled(family)


@lru_cache(maxsize=256)
def _scaled(family: ModelFamily) -> frozenset[str]:
    stems = ((block, stem) for block in family.blocks for stem in (block.maker, block.comfy_stem or block.maker))
    names = (*(_join(stem, name) for block, stem in stems for name in block.tensors), *family.outside_tensors)
    return frozenset(PLACE.sub("#", name.removesuffix(".scale")) for name in names if name.endswith(".scale"))


def names_of(family: ModelFamily, blocks: int = 2) -> Mapping[str, Located]:
    """Return every flattened name of a family with its module, for the first `blocks` blocks of each stack."""
    if family.up_attention:
        return _unet_index(family)
    paths = [
        name.template.replace("{i}", str(number))
        for names in _index(family).values()
        for name in names
        for number in range(blocks if "{i}" in name.template else 1)
    ]
    by_name = {path.replace(".", "_"): locate(family, path) for path in paths}
    return {flat: each for flat, each in by_name.items() if each}


@lru_cache(maxsize=16)
def _unet_index(family: ModelFamily) -> dict[str, Located]:
    by_name: dict[str, Located] = {}
    for path in unet_paths():
        sgm = _sgm_of(family, path)
        located = Located(family, path, (sgm,), (path,), ((0, Fused((path,))),), (sgm,))
        # The number of an upsampler depends on whether its block has attention, which differs between UNets.
        spellings = {path, sgm, diffusers_to_sgm(path), diffusers_to_sgm(path, False)}
        by_name |= {name: replace(located, path=name) for name in spellings}
    return {path.replace(".", "_"): located for path, located in by_name.items()}


def _sgm_of(family: ModelFamily, path: str) -> str:
    """Return sgm's path of a UNet's module from diffusers'."""
    level = re.match(r"up_blocks\.(\d{1,9})\.", path)
    attends = not level or int(level[1]) >= len(family.up_attention) or family.up_attention[int(level[1])]
    return diffusers_to_sgm(path, attends)


Alternatives = tuple[tuple[int, Fused], ...]


@dataclass(frozen=True)
class _Name:
    """A row of a table under one of its names; `{i}` is the block's number."""

    template: str
    rows: Alternatives
    maker: tuple[str, ...]
    comfy: tuple[str, ...]

    def located(self, family: ModelFamily, number: str = "") -> Located:
        """Return the module in the block of this number; the number is empty outside the blocks."""

        def fill(text: str) -> str:
            return text.replace("{i}", number)

        rows = tuple(
            (ratio, replace(fused, runs=tuple(replace(run, module=fill(run.module)) for run in _runs(fused))))
            for ratio, fused in self.rows
        )
        maker, comfy = (tuple(fill(each) for each in names) for names in (self.maker, self.comfy))
        return Located(family, fill(self.template), maker, _modules(rows), rows, comfy)


@lru_cache(maxsize=65536)
def _of_table(family: ModelFamily, flat: str, naming: Naming | None) -> tuple[Located, ...]:
    """Return the modules that a flattened name means in all namings; empty if they are not one module."""
    numbers = NUMBER.findall(flat)
    candidates: list[Located] = []
    for name in _index(family).get(NUMBER.sub("#", flat), ()):
        places = PLACE.findall(name.template)
        block = {number for place, number in zip(places, numbers, strict=True) if place == "{i}"}
        block_numbers = [number if place == "{i}" else place for place, number in zip(places, numbers, strict=True)]
        if block_numbers == numbers and all(BLOCK.fullmatch(number) for number in block):
            candidates.append(name.located(family, *block))
    candidates = [each for each in candidates if naming and each.path in each.names(naming)] or candidates
    return tuple(candidates) if all(each.rows == candidates[0].rows for each in candidates) else ()


@lru_cache(maxsize=256)
def _index(family: ModelFamily) -> dict[str, list[_Name]]:
    """Return the names of a table, by their flattened form without numbers."""
    every: dict[str, list[_Name]] = {}
    for name in _names(family):
        others = every.setdefault(PLACE.sub("#", name.template.replace(".", "_")), [])
        if not any(other.template == name.template and other.rows == name.rows for other in others):
            others.append(name)
    return every


def _names(family: ModelFamily) -> Iterator[_Name]:
    """Yield every name of a table; of equal names the maker's comes first."""
    maker: dict[str, Alternatives] = {}
    comfy: dict[str, Alternatives] = {}
    alias: dict[str, Alternatives] = {}
    for block in (block for block in family.blocks if block.maker != "*"):
        stem_of_diffusers = block.diffusers
        for name, rows in {**block.names, **{name: name for name in block.alike}}.items():
            ratio, other = block.by_ratio.get(name, (0, rows))
            first: Alternatives = ((ratio, _absolute(stem_of_diffusers, other)),) if ratio else ()
            maker[_join(block.maker, name)] = (*first, (0, _absolute(stem_of_diffusers, rows)))
        maker |= {
            _join(block.maker, _leafless(name)): ((0, _absolute(stem_of_diffusers, _leafless(tensor))),)
            for name, tensor in block.tensors.items()
        }
        stem = block.comfy_stem or block.maker
        comfy |= {_join(stem, name): ((0, _absolute(stem_of_diffusers, rows)),) for name, rows in block.comfy.items()}
        alias |= {
            _join(block.maker, name): ((0, _absolute(stem_of_diffusers, rows)),) for name, rows in block.aliases.items()
        }
        modules = [run.module for rows in (*block.names.values(), *block.alike) for run in _runs(_absolute("", rows))]
        alias |= {
            _join(stem, name): ((0, _absolute(stem_of_diffusers, name)),) for stem in block.stems for name in modules
        }
    outside = {**family.outside, **{name: name for name in family.alike}}
    outside |= {_leafless(name): _leafless(tensor) for name, tensor in family.outside_tensors.items()}
    for table, named in ((maker, outside), (comfy, family.outside_comfy), (alias, family.outside_aliases)):
        table |= {name: ((0, _absolute("", rows)),) for name, rows in named.items()}
    makers, comfys = (_names_by_module(table) for table in (maker, comfy))
    comfys = makers | comfys
    diffusers: dict[str, Alternatives] = {module: ((0, _absolute("", module)),) for module in makers}
    for naming in (maker, comfy, alias, diffusers):
        for name, alternatives in naming.items():
            makers_names, comfys_names = (
                tuple(dict.fromkeys(each for module in _modules(alternatives) for each in names.get(module, ())))
                for names in (makers, comfys)
            )
            yield _Name(
                name,
                alternatives,
                (name,) if naming is maker else makers_names,
                (name,) if naming is comfy or name in comfys_names else comfys_names,
            )


def _names_by_module(naming: Mapping[str, Alternatives]) -> dict[str, list[str]]:
    """Return diffusers' module -> the names of a naming that have rows of it."""
    names: dict[str, list[str]] = {}
    for name, rows in naming.items():
        for module in _modules(rows):
            names.setdefault(module, []).append(name)
    return names


def _leafless(tensor: str) -> str:
    """Return the path of the module of a weight; any other tensor's name unchanged."""
    return tensor.removesuffix(".weight").removesuffix(".scale")


def _locate_by_end(family: ModelFamily, path: str) -> Located | None:
    """Find a module by the end of its name, in a family whose blocks can have any path."""
    for block in family.blocks if family.blocks and family.blocks[0].maker == "*" else ():
        for name, rows in block.names.items():
            for end in (name, *(run.module for run in _runs(_absolute("", rows)))):
                if f".{path}".endswith(f".{end}"):
                    stem = path.removesuffix(end).removesuffix(".")
                    fused = _absolute(stem, rows)
                    modules = tuple(run.module for run in _runs(fused))
                    alternatives = ((0, fused),) if end == name else ((0, Fused((path,))),)
                    return Located(
                        family, path, (_join(stem, name),), modules if end == name else (path,), alternatives
                    )
    return None


def _join(stem: str, name: str) -> str:
    return f"{stem}.{name}" if stem and name else stem or name


def _absolute(stem: str, rows: Rows) -> Fused:
    """Return the rows of the table for a name, with the stem before their paths."""
    fused = rows if isinstance(rows, Fused) else Fused((rows,))
    return Fused(tuple(Run(_join(stem, run.module), run.part, run.parts) for run in _runs(fused)), fused.sizes)


def _runs(fused: Fused) -> tuple[Run, ...]:
    return tuple(run if isinstance(run, Run) else Run(run) for run in fused.runs)


def _modules(rows: Iterable[tuple[int, Fused]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.module for _, fused in rows for run in _runs(fused)))
