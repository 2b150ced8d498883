"""Run `combine`: several adapters as one, exactly (`cat`) or by the methods of the literature (`methods.METHODS`).

It plans from headers, and then makes one module at a time: concatenated factors, or, if a method's result has no low
rank, one dense matrix and its best factors of the requested rank. The error is that of the factors as written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ...adapters.edited import (
    EditedAdapter,
    edited_output,
    require_same_init,
    require_writable,
    write_edited,
)
from ...adapters.formats import written_formats
from ...adapters.image_metadata import about_training, common_metadata, former_metadata
from ...adapters.stacked import FACTOR_TORCH_DTYPES as DTYPES
from ...adapters.stacked import parameters_per_rank, round_factors, stack_factors
from ...adapters.updates.update import UpdateSpec
from ...binding.module_weights import by_component, require_patterns_used, spell_weight, weight_of
from ...binding.selection import parse_patterns
from ...errors import InputError, UsageError
from ...files.dtypes import dtypes_of
from ...files.model_card import code, shown_name
from ...files.output import naming_output
from ...files.output_paths import check_output_path
from ...files.tensor_ref import is_finite
from ...files.weights_file import paths_of
from ...numerics.factored_svd import distance, factored_svd, singular_values
from ...numerics.seeded_random import Draw
from ...numerics.svd import TruncatedSVD, truncated_svd
from ...reports.report import WritingReport
from ...reports.writing import command_line
from ...streaming.workers import Progress, choose_device
from ..arguments import (
    Count,
    Patterns,
    Positive,
    Size,
    StrPath,
    checked,
    current_call,
    one_of,
    parse_count,
    parse_size,
    words_of,
)
from ..cards import (
    adapter_card,
    error_share,
    few_names,
    kept_or_none,
    options_of,
    rank_range,
    short,
    source_facts,
    weighted_word,
)
from ..choices import COMBINE_ALLOW
from ..convert.as_low_rank import as_low_rank
from ..convert.in_memory import conversion_warnings, convert_to_common_format, rank_notes
from ..convert.request import request_for
from ..diff.related import require_related, require_same_names
from ..inputs import Adapters, Drop, WeightedAdapter, open_adapters, parse_adapters
from ..machine import require_ieee
from ..rank_rules import BUDGETS, RANK_RULES, SingularValues, choose_ranks, read_rule
from .align import AlignedAdapters, align_adapters
from .methods import METHODS, REFUSED, WeightedDelta

DENSITY = 0.5  # peft's and the papers' range is 0.2 to 0.9


ROWS = 1024  # of a dense result, compared with its factors at a time


@dataclass(frozen=True)
class ModuleCombine:
    """ranks: of the adapters, 0 where one lacks the module; rank: of what is written. norm: ||D|| of the method's
    result D; kept: the share of ||D||^2 that the rank holds; error: ||D' - D|| / ||D|| of what is written.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    norm: float
    kept: float
    error: float


@dataclass(frozen=True)
class CombineReport(WritingReport):
    """The result of `combine`. kept, error: over all modules; carried: tensors beside the factors, added up or as they
    were; left_out: what --drop, --target and --exclude leave out; parameters, nbytes: of the output. components: of
    each adapter, components and patterns with another weight than its own; the last that matches a module wins.
    dtypes: of what is written, scalars left out, the commonest first. metadata_left_out: keys in which files differ.
    """

    shown_by: ClassVar[str] = "document.combine_document"
    rows: ClassVar[str] = "modules"

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    density: float | None
    out: str
    dry_run: bool
    modules: tuple[ModuleCombine, ...]
    kept: float
    error: float
    parameters: int
    nbytes: int
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    components: tuple[Mapping[str, float], ...]
    dtypes: tuple[str, ...] = ()
    metadata_left_out: tuple[str, ...] = ()


@checked
@require_ieee
def combine(
    adapters: Adapters,
    out: StrPath | None = None,
    *,
    method: Annotated[str, one_of((*METHODS, *REFUSED))] = "cat",
    density: float | None = None,
    seed: int = 0,
    rank: Positive | None = None,
    energy: float | None = None,
    params: Count | None = None,
    size: Size | None = None,
    rank_rule: tuple[Annotated[str, one_of(RANK_RULES)], float] | None = None,
    max_rank: Positive | None = None,
    target: Patterns = (),
    exclude: Patterns = (),
    to: Annotated[str, one_of(written_formats())] | None = None,
    dtype: Annotated[str, one_of(DTYPES)] = "fp32",
    drop: Drop = (),
    alpha: float | None = None,
    allow: Annotated[str | Sequence[str], words_of(COMBINE_ALLOW)] = (),
    device: str = "auto",
    card: bool = True,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CombineReport:
    """Combine several adapters into one that does what they do with their weights.

    Args:
        adapters: one or several, each a path, (path, weight) or (path, weight, weights of its components and of modules
            by pattern, like {"te": 0.4, "down_proj": 0}), or all as {path: weight}.
        out: a folder, or a file if it ends in .safetensors.
        method: a key of COMBINE_METHODS.
        density: the share of entries that the method keeps, 0.5 by default.
        seed: of the random numbers, which follow from it, the module's name and the adapter's content.
        rank, energy, params, size, rank_rule, max_rank: as in `resize`; by default a module's rank is the sum of the
            adapters' ranks.
        target, exclude: patterns of modules to combine, and of those to leave out (`selection.Selection`).
        drop: keys of DROP_CHOICES, of what is left out of the adapters.
        to: a key of `written_formats`, by default the first adapter's format; adapters of other formats are converted.
        dtype: of the factors, a key of FACTOR_TORCH_DTYPES.
        alpha: for files without an alpha.
        allow: keys of COMBINE_ALLOW.
        card: write README.md, a model card, into the output's folder.
        force: replace an output that exists.
        dry_run: check everything and write nothing.
        progress: called with the modules done and the modules in all.

    Raises:
        UsageError: options contradict each other.
        InputError: the adapters do not belong together.
        NeedsFlag: tensors have no sum, or the adapters look like those of two models. Nothing is written then.
    """
    budgets = {"params": parse_count(params), "size": parse_size(size)}
    rule = read_rule({"rank": rank, "energy": energy, **budgets}, rank_rule)
    if rule and rule[0] == "noise":
        raise UsageError(
            "the rule noise is of one file's rounding, and a combination is of several",
            remedy="give --rank-rule noise to resize, of each adapter, before they are combined",
        )
    given = parse_adapters(adapters, drop)
    weights = [weight for each in given for weight in (each.weight, *each.module_weights.values())]
    density = _check(method, density, dtype, rule, weights)
    with ExitStack() as opened:
        loaded = tuple(zip(open_adapters(given, alpha, opened), (each.weight for each in given), strict=True))
        asked = loaded
        dropped = [name for adapter, _ in loaded for name in adapter.left_out]
        require_patterns_used((adapter, adapter.updates) for adapter, _ in loaded)
        of_modules = [{m: weight_of(adapter, weight, m) for m in adapter.updates} for adapter, weight in loaded]
        components = tuple(by_component(adapter.module_weights) for adapter, _ in loaded)
        if to is None:
            require_writable(loaded[0][0])
        path, is_file = edited_output(loaded[0][0], to, out, "combined")
        read = paths_of(adapter.file for adapter, _ in loaded)
        exists = check_output_path(path, is_file, read, force, dry_run=dry_run)
        with request_for("combine"):
            found = [as_low_rank(adapter, exclude) for adapter, _ in loaded]
        loaded = tuple((each.adapter, weight) for each, (_, weight) in zip(found, loaded, strict=True))
        alike = convert_to_common_format(loaded, to, parse_patterns(exclude), path.absolute().parent, opened)
        loaded, aligned = alike.loaded, align_adapters(alike, of_modules, parse_patterns(target))
        said = [former_metadata(adapter.file.metadata or {}, new_ranks=True) for adapter, _ in asked]
        metadata, differing = common_metadata([about_training(each) for each in said])
        aligned = replace(
            aligned,
            metadata=metadata,
            differing=differing,
            left_out=(
                *dropped,
                *(module for each in alike.made for module in each.dropped),
                *aligned.left_out,
            ),
            warnings=(
                *aligned.warnings,
                *dict.fromkeys(line for each in found for line in each.warnings()),
                *conversion_warnings(alike.made),
            ),
        )
        work = _Combination(loaded, aligned, method, density, seed, choose_device(device), DTYPES[dtype], progress)
        require_same_init(loaded[0][0], work.choose(rule, max_rank))
        require_same_names(loaded)
        if "unrelated" not in allow:
            require_related(loaded)

        def report() -> CombineReport:
            return work.report(str(path), dry_run, components)

        if dry_run:
            work.try_all()
        else:
            opened.enter_context(naming_output(path))
            words = (*map(weighted_word, asked), *options_of(current_call()))
            make = (lambda: _card(asked, words, loaded[0][0].format, report())) if card else None
            write_edited(work.edited(), path, is_file, [adapter.file for adapter, _ in loaded], make)
        return replace(report(), exists=exists)


def _card(asked: WeightedAdapter, words: Sequence[str], library: str, report: CombineReport) -> bytes:
    """Return the output's model card; `words` are those of its command."""
    density = "" if report.density is None else f" at density {short(report.density)}"
    weights = [f"weight {code(spell_weight(weight, adapter.module_weights))}" for adapter, weight in asked]
    facts = [
        *source_facts([(adapter, what) for (adapter, _), what in zip(asked, weights, strict=True)]),
        f"combined by {report.method}{density} to {rank_range(m.rank for m in report.modules)}, in "
        f"{len(report.modules)} modules",
        f"{kept_or_none(report.kept)} of the sum's energy is kept; the error is {error_share(report.error)} of it",
    ]
    commands = (command_line("combine", *words, "-o", "combined"), command_line("inspect", "combined", "--strict"))
    title = f"{few_names([shown_name(adapter.name) for adapter, _ in asked])} combined"
    return adapter_card(title, library, [adapter for adapter, _ in asked], facts, commands, report.left_out)


def _check(
    method: str, density: float | None, dtype: str, rule: tuple[str, float] | None, weights: Sequence[float]
) -> float | None:
    """Return the density, or None for a method that has none; raise UsageError for options that do not go together."""
    if method in REFUSED:
        raise UsageError(f"--method {method} is not offered: {REFUSED[method]}")
    row = METHODS[method]
    if density is not None and not row.prunes:
        raise UsageError(f"--density is for methods that leave entries out, and {method} does not")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"--density {density:g} is not between 0 and 1")
    if row.dense and rule and rule[0] == "sv_cumulative":
        raise UsageError(f"sv_cumulative needs all singular values of a dense matrix, which {method} does not compute")
    for weight in weights:
        if abs(weight) > torch.finfo(torch.float32).max:
            raise UsageError(f"the weight {weight:g} is too large")
    if not row.negative and min(weights) < 0:
        raise UsageError(f"{method} divides by sums of weights, so none can be negative", remedy="use --method ties")
    return (DENSITY if density is None else density) if row.prunes else None


class _Combination:
    """The computation of the combined adapter, with the figures for its report."""

    def __init__(
        self,
        loaded: WeightedAdapter,
        aligned: AlignedAdapters,
        method: str,
        density: float | None,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None,
    ) -> None:
        self._loaded, self._aligned, self._method, self._density = loaded, aligned, method, density
        self._seed, self._device, self._dtype, self._progress = seed, device, dtype, progress
        self._ranks = {module: self._natural(module) for module in aligned.groups}
        self._found: dict[str, tuple[float, float, float]] = {}
        self._done, self._steps = 0, len(aligned.groups)

    def _natural(self, module: str) -> int:
        """Return the sum of the ranks, for methods other than `cat` at most the matrix's smaller side."""
        total = sum(member.update.rank for member in self._aligned.groups[module])
        return total if self._method == "cat" else max(1, min(total, *_sides(self._aligned.updates[module])))

    def _deltas(self, module: str) -> list[list[WeightedDelta]]:
        """Return the adapters' deltas for each matrix of the module, which is one, or a stack of experts."""
        factors = []
        for member in self._aligned.groups[module]:
            weight, scale = member.weight, member.update.scale
            if not math.isfinite(weight * scale):
                raise UsageError(f"the weight {weight} times the scale {scale} is too large", culprit=module)
            factors.append(tuple(side.to(self._device) for side in stack_factors(member.adapter.load(member.update))))
        members = self._aligned.groups[module]
        draws = [member.adapter.sha256 if METHODS[self._method].random else "" for member in members]
        return [
            [
                WeightedDelta(B[e], A[e], member.weight, f"{self._seed} {module} {e} {drawn}")
                for (B, A), member, drawn in zip(factors, members, draws, strict=True)
            ]
            for e in range(len(factors[0][0]))
        ]

    def choose(self, rule: tuple[str, float] | None, max_rank: int | None) -> Mapping[str, int]:
        """Choose and return the output's rank for each module."""
        if rule is None:
            self._ranks = {module: min(rank, max_rank or rank) for module, rank in self._ranks.items()}
            return self._ranks
        name, value = rule
        spectra = {module: SingularValues((), 0.0, 0, True) for module in self._ranks}
        if name != "rank":
            self._steps *= 2
            spectra = {module: self._spectrum(module, max_rank) for module in self._ranks}
        if name in BUDGETS:
            value = self.edited().budget(name, value)
        self._ranks = choose_ranks(name, value, spectra, max_rank)
        return self._ranks

    def _spectrum(self, module: str, max_rank: int | None) -> SingularValues:
        """Return the result's singular values, those of a dense one only up to the natural rank or --max-rank."""
        with _factored(module):
            if METHODS[self._method].dense:
                squares, total = torch.zeros(max(max_rank or 0, self._ranks[module]), dtype=torch.float64), 0.0
                for _, top in self._tops(module, len(squares)):
                    squares[: len(top.S)] += top.S.square().cpu()
                    total += top.total
            else:
                squares = singular_values(*self._side_by_side(module)).square().sum(0).cpu()
                total = float(squares.sum())
        self._step()
        return SingularValues(tuple(squares.tolist()), total, parameters_per_rank(self._aligned.updates[module]), True)

    def _step(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._steps)

    def _side_by_side(self, module: str) -> tuple[Tensor, Tensor]:
        """Return B (E, out, r) and A (E, r, in) of a method whose result is factors."""
        found = [METHODS[self._method].run(deltas, self._density or 1.0) for deltas in self._deltas(module)]
        return torch.stack([B for B, _ in found]), torch.stack([A for _, A in found])

    def _tops(self, module: str, rank: int) -> Iterator[tuple[Tensor, TruncatedSVD]]:
        """Yield the dense result of each matrix of the module, and its truncated SVD."""
        for e, deltas in enumerate(self._deltas(module)):
            D = METHODS[self._method].run(deltas, self._density or 1.0)
            assert isinstance(D, Tensor)
            if not is_finite(D):
                raise InputError("the combined change overflows float32", culprit=module)
            yield D, truncated_svd(D, rank, Draw(self._seed, f"{module} {e}").generator(self._device))

    def _factors(self, module: str) -> tuple[Tensor, Tensor]:
        with _factored(module):
            found = self._best(module) if METHODS[self._method].dense else self._exact(module)
        self._step()
        return found

    def _exact(self, module: str) -> tuple[Tensor, Tensor]:
        B, A = self._side_by_side(module)
        rank, svd = self._ranks[module], factored_svd(B, A)
        if B.shape[-1] != rank:
            B, A = svd.truncated(rank)
        B, A = round_factors(module, (B, A), self._dtype)
        squared_error = float(distance(svd, factored_svd(B, A)).square().sum())
        self._note(module, float(svd.S.square().sum()), float(svd.S[..., :rank].square().sum()), squared_error)
        return B, A

    def _best(self, module: str) -> tuple[Tensor, Tensor]:
        rank, total, kept, squared_error = self._ranks[module], 0.0, 0.0, 0.0
        pairs = []
        for D, top in self._tops(module, rank):
            padding = rank - len(top.S)
            U, V = (side.double() * top.S.sqrt() for side in (top.U, top.V))
            sides = (torch.nn.functional.pad(side, (0, padding)) for side in (U, V))
            B, V = round_factors(module, (next(sides), next(sides)), self._dtype)
            pairs.append((B, V.mT))
            total, kept = total + top.total, kept + top.energy
            for start in range(0, len(D), ROWS):
                block = slice(start, start + ROWS)
                squared_error += float((B[block].double() @ V.mT.double() - D[block]).square().sum())
        self._note(module, total, kept, squared_error)
        return torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])

    def _note(self, module: str, total: float, kept: float, squared_error: float) -> None:
        """Keep a module's figures for the report, from ||D||^2, its share in the rank, and ||D' - D||^2."""
        share = (min(1.0, kept / total), math.sqrt(squared_error / total)) if total else (1.0, 0.0)
        self._found[module] = (math.sqrt(total), *share)

    def edited(self) -> EditedAdapter:
        aligned, ranks = self._aligned, self._ranks
        return EditedAdapter(
            template=self._loaded[0][0],
            updates=aligned.updates,
            ranks=ranks,
            factors=self._factors,
            carried=aligned.carried,
            dtype=self._dtype,
            fields=aligned.fields,
            metadata=aligned.metadata,
            differing=aligned.differing,
        )

    def try_all(self) -> None:
        """Compute everything for the figures of a dry run, and keep no tensors."""
        for module in self._ranks:
            self._factors(module)
        for each in self._aligned.carried.values():
            each.load()

    def report(self, out: str, dry_run: bool, components: tuple[Mapping[str, float], ...]) -> CombineReport:
        specs, aligned = self.edited().specs(), self._aligned
        rows = tuple(self._row(module) for module in self._ranks)
        total = math.fsum(row.norm**2 for row in rows)
        return CombineReport(
            adapters=tuple(adapter.name for adapter, _ in self._loaded),
            weights=tuple(weight for _, weight in self._loaded),
            method=self._method,
            density=self._density,
            out=out,
            dry_run=dry_run,
            modules=rows,
            kept=math.fsum(row.kept * row.norm**2 for row in rows) / total if total else 1.0,
            error=math.sqrt(math.fsum((row.error * row.norm) ** 2 for row in rows) / total) if total else 0.0,
            parameters=sum(spec.size for spec in specs.values()),
            nbytes=sum(spec.nbytes for spec in specs.values()),
            carried=tuple(aligned.carried),
            left_out=aligned.left_out,
            warnings=(*aligned.warnings, *rank_notes(self._loaded[0][0], self._ranks)),
            components=components,
            dtypes=dtypes_of(specs.values()),
            metadata_left_out=aligned.differing,
        )

    def _row(self, module: str) -> ModuleCombine:
        ranks_of = {id(member.adapter): member.update.rank for member in self._aligned.groups[module]}
        ranks = tuple(ranks_of.get(id(adapter), 0) for adapter, _ in self._loaded)
        return ModuleCombine(module, ranks, self._ranks[module], *self._found[module])


@contextmanager
def _factored(module: str) -> Iterator[None]:
    """Turn LAPACK's failure to converge into an InputError: it fails only on numbers near the limit of float64."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError("the combined change is too large to be factored", culprit=module) from error


def _sides(update: UpdateSpec) -> tuple[int, int]:
    return update.specs["B"].shape[0], math.prod(update.specs["A"].shape[1:])
