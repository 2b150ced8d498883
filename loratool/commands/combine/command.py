"""Run `combine`: merge several adapters into one, exactly (`cat`) or by methods from papers (`methods.table`).

It plans from headers, and then computes one module at a time. The error is that of the factors as written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np

from ...adapters.edited import edited_output, require_same_init, require_writable, write_edited
from ...adapters.image_metadata import about_training, common_metadata, former_metadata
from ...adapters.truncated import Figures, in_all
from ...adapters.updates.dora import BEFORE_NORM, DoRA
from ...binding.modules.module_weights import by_component, require_patterns_used, spell_weight, weight_of
from ...binding.modules.selection import parse_patterns
from ...binding.weights.input_moments import InputMoments, open_imatrix
from ...errors import UsageError
from ...files.dtypes import FACTOR_DTYPES, dtypes_of
from ...files.output.model_card import code, shown_name
from ...files.output.output import naming_output
from ...files.output.paths import check_output_path
from ...files.weights_file import paths_of
from ...numerics.forms import FORMS
from ...streaming.parallel import choose_device
from ...transform.expand import expand
from ...transform.in_memory import convert_to_common_format, loss_warnings, rank_notes
from ...transform.lazy import start
from ...transform.rank_rules import read_rule
from ...transform.request import request_for
from ...views.combine import CombineReport, ModuleCombine
from ...views.parts.writing import command_line
from ..adapter_requests import parse_adapters
from ..arguments import dtype_word, parse_count, parse_size, parse_words
from ..cards import (
    adapter_card,
    error_share,
    few_names,
    kept_or_none,
    options_of,
    output_facts,
    rank_range,
    short,
    source_facts,
    weighted_word,
)
from ..diff.related import require_related, require_same_names
from ..inputs import WeightedAdapter, open_adapters
from .align import align_adapters
from .call import Combine
from .combination import Combination, CombineChoices
from .methods.table import METHODS, NOT_COMPRESSED


def run_combine(call: Combine) -> CombineReport:
    """Combine several adapters into one that does what they do with their weights."""
    budgets = {"params": parse_count(call.params), "size": parse_size(call.size)}
    rule = read_rule({"rank": call.rank, "energy": call.energy, **budgets}, call.rank_rule)
    given = parse_adapters(call.adapters, parse_words(call.drop))
    weights = [weight for each in given for weight in (each.weight, *each.module_weights.values())]
    density = _check(call.method, call.density, weights)
    by = _choose_rank_method(call.rank_method, call.method, rule, call.max_rank)
    if call.imatrix is not None:
        _require_cut(call.method, by, rule is not None or call.max_rank is not None)
    with ExitStack() as opened:
        loaded = tuple(zip(open_adapters(given, call.alpha, opened), (each.weight for each in given), strict=True))
        asked = loaded
        dropped = [name for adapter, _ in loaded for name in adapter.excluded]
        require_patterns_used((adapter, adapter.updates) for adapter, _ in loaded)
        of_modules = [{m: weight_of(adapter, weight, m) for m in adapter.updates} for adapter, weight in loaded]
        components = tuple(by_component(adapter.module_weights) for adapter, _ in loaded)
        if call.to is None:
            require_writable(loaded[0][0])
        path, is_file = edited_output(loaded[0][0], call.to, call.out, "combined")
        file = open_imatrix(call.imatrix, opened)
        read = [*paths_of(adapter.file for adapter, _ in loaded), *([file.path] if file else [])]
        exists = check_output_path(path, is_file, read, call.force, dry_run=call.dry_run)
        with request_for("combine"):
            states = [expand(start(adapter), call.exclude) for adapter, _ in loaded]
        alike = convert_to_common_format(states, call.to, parse_patterns(call.exclude), path.absolute().parent, opened)
        loaded = tuple((state.adapter, weight) for state, (_, weight) in zip(alike.states, loaded, strict=True))
        aligned = align_adapters(alike, of_modules, parse_patterns(call.target), METHODS[call.method].linear)
        former = [former_metadata(adapter.file.metadata or {}, new_ranks=True) for adapter, _ in asked]
        metadata, differing = common_metadata([about_training(each) for each in former])
        aligned = replace(
            aligned,
            metadata=metadata,
            differing=differing,
            left_out=(
                *dropped,
                *alike.excluded,
                *aligned.left_out,
            ),
            warnings=(
                *aligned.warnings,
                *loss_warnings(alike.states),
            ),
        )
        choices = CombineChoices(
            call.method,
            density,
            by,
            call.seed,
            choose_device(call.device),
            FORMS[FACTOR_DTYPES[dtype_word(call.dtype)]],
        )
        moments = None if file is None else InputMoments.of_adapter(file, loaded[0][0])
        if moments:
            moments.require_known(aligned.updates)
        work = opened.enter_context(closing(Combination(loaded, aligned, choices, moments, call.progress)))
        require_same_init(loaded[0][0], work.choose(rule, call.max_rank))
        require_same_names(loaded)
        if "unrelated" not in call.allow:
            require_related(loaded)

        def report() -> CombineReport:
            return _report(work, str(path), call.dry_run, components)

        if call.dry_run:
            work.try_all()
        else:
            opened.enter_context(naming_output(path))
            words = (*map(weighted_word, asked), *options_of(call))
            make = (lambda: _card(asked, words, loaded[0][0].format, report())) if call.card else None
            write_edited(work.edited(), path, is_file, [adapter.file for adapter, _ in loaded], make)
        return replace(
            report(),
            exists=exists,
            shared=work.shared() if call.dry_run else None,
            sha256={adapter.name: adapter.sha256 for adapter, _ in asked},
        )


def _card(asked: WeightedAdapter, words: Sequence[str], library: str, report: CombineReport) -> bytes:
    """Return the output's model card. `words` are those of its command."""
    density = "" if report.density is None else f" at density {short(report.density)}"
    weights = [f"weight {code(spell_weight(weight, adapter.module_weights))}" for adapter, weight in asked]
    energy = f"{kept_or_none(report.kept)} of the result's energy is kept"
    if report.rank_method == "ctm":
        energy = f"computed in shared directions, which hold {kept_or_none(report.kept)} of the deltas' energy"
    facts = [
        *source_facts([(adapter, what) for (adapter, _), what in zip(asked, weights, strict=True)]),
        f"combined by {report.method}{density} to {rank_range(m.rank for m in report.modules)}, in "
        f"{len(report.modules)} modules",
        f"{energy}; the error is {error_share(report.error)} of the result",
        *output_facts(report.imatrix, report.weighted_error),
    ]
    commands = (command_line("combine", *words, "-o", "combined"), command_line("inspect", "combined", "--strict"))
    title = f"{few_names([shown_name(adapter.name) for adapter, _ in asked])} combined"
    return adapter_card(title, library, [adapter for adapter, _ in asked], facts, commands, report.left_out)


def _check(method: str, density: float | None, weights: Sequence[float]) -> float | None:
    """Return the density, or None for a method without one. Raise UsageError for options that exclude each other."""
    row = METHODS[method]
    if density is not None and row.density is None:
        raise UsageError(f"--density has no effect on {method}, which keeps all entries")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"--density {density:g} is not between 0 and 1")
    density = row.density if density is None else density
    if row.spread and density and not row.spread < density < 1 - row.spread and density != 1:
        raise UsageError(
            f"{method} needs a --density between {row.spread:g} and {1 - row.spread:g}, not {density:g}: it keeps "
            f"entries with probabilities up to {row.spread:g} lower or higher"
        )
    for weight in weights:
        if abs(weight) > float(np.finfo(np.float32).max):
            raise UsageError(f"the weight {weight:g} is too large")
    if not row.negative and min(weights) < 0:
        raise UsageError(
            f"{method} divides by sums of weights, so weights cannot be negative", remedy="use --method ties"
        )
    return density


def _choose_rank_method(asked: str | None, method: str, rule: tuple[str, float] | None, max_rank: int | None) -> str:
    """Return the requested key of RANK_METHODS, or the default. Raise UsageError if it has no meaning here."""
    row, name = METHODS[method], rule[0] if rule else None
    rank_method = asked or ("ctm" if method not in NOT_COMPRESSED and name == "rank" else "truncate")
    if rank_method == "ctm" and method in NOT_COMPRESSED:
        raise UsageError(f"{method} does not support --rank-method ctm: {NOT_COMPRESSED[method]}")
    if rank_method == "ctm" and name != "rank":
        what, remedy = ("without --rank", "add --rank") if name is None else (f"with {name}", "give --rank instead")
        raise UsageError(f"--rank-method ctm {what} does not know how many directions to use", remedy=remedy)
    if row.flat and rank_method != "ctm" and (rule or max_rank):
        what = f"{method} makes all singular values equal, so its result cannot be truncated"
        raise UsageError(what, remedy="use --rank with --rank-method ctm")
    if row.dense and name == "sv_cumulative":
        raise UsageError(f"sv_cumulative needs all singular values of a dense matrix, which {method} does not compute")
    return rank_method


def _require_cut(method: str, rank_method: str, is_limited: bool) -> None:
    """Raise UsageError if nothing of a method's result is truncated, so that --imatrix has nothing to choose."""
    if METHODS[method].flat:
        raise UsageError(f"--imatrix decides what to truncate, but the result of {method} cannot be truncated")
    if rank_method == "ctm":
        message = "--imatrix decides what to truncate, but --rank-method ctm truncates nothing"
        raise UsageError(message, remedy="add --rank-method truncate")
    if not (is_limited or METHODS[method].dense):
        message = f"--imatrix decides what to truncate, but {method} without a rank truncates nothing"
        cut = "--rank" if method in NOT_COMPRESSED else "--rank and --rank-method truncate"
        raise UsageError(message, remedy=f"add {cut}")


def _report(work: Combination, out: str, dry_run: bool, components: tuple[Mapping[str, float], ...]) -> CombineReport:
    specs, aligned, loaded, choices = work.edited().specs(), work.aligned, work.loaded, work.choices
    rows = tuple(_row(work, module) for module in work.ranks)
    figures = [work.figures[module] for module in work.ranks]
    total = in_all(figures)
    return CombineReport(
        adapters=tuple(adapter.name for adapter, _ in loaded),
        weights=tuple(weight for _, weight in loaded),
        method=choices.method,
        density=choices.density,
        out=out,
        dry_run=dry_run,
        modules=rows,
        kept=_kept(figures) if choices.rank_method == "ctm" else total.kept,
        error=total.error,
        weighted_error=total.weighted_error,
        parameters=sum(spec.size for spec in specs.values()),
        nbytes=sum(spec.nbytes for spec in specs.values()),
        carried=tuple(aligned.carried),
        left_out=aligned.left_out,
        warnings=(*aligned.warnings, *_dora_warnings(work), *rank_notes(loaded[0][0], work.ranks)),
        components=components,
        dtypes=dtypes_of(specs.values()),
        metadata_left_out=aligned.differing,
        rank_method=choices.rank_method,
        imatrix=str(work.moments.path) if work.moments else None,
        unweighted=tuple(module for module in work.ranks if module in work.moments.missing) if work.moments else (),
    )


def _dora_warnings(work: Combination) -> tuple[str, ...]:
    is_cut = any(work.ranks[m] < u.rank for m, u in work.aligned.updates.items() if u.cls is DoRA)
    return (BEFORE_NORM,) if is_cut else ()


def _kept(figures: Sequence[Figures]) -> float:
    """Return the mean share that compressed changes keep. Their energy is not the result's, where some may cancel."""
    return math.fsum(each.kept for each in figures) / len(figures)


def _row(work: Combination, module: str) -> ModuleCombine:
    ranks_of = {id(member.adapter): member.update.rank for member in work.aligned.groups[module]}
    ranks, figures = tuple(ranks_of.get(id(adapter), 0) for adapter, _ in work.loaded), work.figures[module]
    return ModuleCombine(
        name=module,
        ranks=ranks,
        rank=work.ranks[module],
        norm=figures.norm,
        kept=figures.kept,
        error=figures.error,
        weighted_error=figures.weighted_error,
        spectrum=figures.spectrum,
    )
