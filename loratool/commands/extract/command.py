"""Run `extract`: write a full fine-tune's delta as an adapter, with the best factors of a rank and exact biases.

Each thread has one matrix in memory at a time. The truncated SVD of D = TUNED - BASE, in float32, goes into a journal,
so that a run that died can be resumed. When all ranks are known, the adapter is written from the journal. Every change
is in the adapter or reported with its norm.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...adapters.updates.replace import ReplaceTensor
from ...architectures.prefixes import module_path
from ...binding.modules.selection import Selection
from ...binding.names.class_names import ClassNames
from ...binding.names.peft_names import refuse_unsaid
from ...binding.ties.ties import find_tie
from ...binding.weights.input_moments import InputMoments, open_imatrix
from ...binding.weights.model_pairs import ModelPairs, pair_tensors
from ...binding.weights.model_weights import rearranged_weights
from ...durable.journal import Journal, require_same
from ...durable.partial import partial_path, partial_place
from ...errors import InputError, NeedsFlag, UsageError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import BLOCK_TYPES, FACTOR_DTYPES, dtypes_of
from ...files.imatrix_file import ImatrixFile
from ...files.output.model_card import code, name_on_hub, read_licence, shown_name
from ...files.output.output import naming_output
from ...files.output.paths import check_output_path
from ...files.weights_file import described_inputs, paths_of
from ...numerics.arrays import Device
from ...numerics.forms import FORMS
from ...streaming.journaled import journaled
from ...streaming.parallel import choose_device
from ...streaming.ranks import Job, current_job
from ...streaming.threads import one_thread
from ...transform.delta_factors import RESULTS as FACTORS
from ...transform.delta_factors import DeltaFactors, SvdChoices
from ...transform.image_base import choose_format, is_image_adapter, require_language_model, unsupported_patterns
from ...transform.rank_rules import NOISE_IS_PLAIN, RANK_RULES, rank_for, read_rule
from ...views.extract import ExtractReport, ModuleExtract
from ...views.parts.numbers import kept_share
from ...views.parts.writing import command_line
from ..arguments import dtype_word, parse_count, parse_size, parse_words
from ..cards import described_call, encode_card, input_word, kept_or_none, options_of, output_facts, rank_range
from ..inputs import open_model, refuse_own_names
from .adapter_plan import AdapterPlan, plan_adapter, plan_image_adapter, plan_language_adapter
from .call import Extract
from .changes import Compared, SortedDeltas, plan_sorting
from .extraction import Extraction, Work, compare_models

# The results that ranks return -> how a journal has them
RESULTS = {**FACTORS, Compared.__name__: Compared}

UNRELATED = 0.9  # |D|/|W| of the matrices that changed: above it, TUNED is no fine-tune of BASE

RANK = 8

LOW = 0.5  # share of the energy below which the report says what rank would keep more


def run_extract(call: Extract) -> ExtractReport:
    """Write the delta TUNED - BASE as an adapter. Quantized weights of either model are dequantized."""
    options = {
        "rank": call.rank,
        "energy": call.energy,
        "params": parse_count(call.params),
        "size": parse_size(call.size),
    }
    rule = read_rule(options, call.rank_rule) or ("rank", float(RANK))
    if call.imatrix is not None and rule[0] == "noise":
        raise UsageError(NOISE_IS_PLAIN)
    with ExitStack() as opened:
        sides = [open_model(name, "extract compares two models", opened) for name in (call.base, call.tuned)]
        read = [shard for side in sides for shard in side.shards]
        file = open_imatrix(call.imatrix, opened)
        for side in sides:
            _refuse_codes(side)
            refuse_own_names(side)
        output_format = choose_format(sides[0], call.to)
        path, is_file = output_format.output(call.out, "adapter")
        whole_model = not is_image_adapter(sides[0], output_format)  # in the model's own names
        inputs = [*paths_of(read), *([file.path] if file else [])]
        exists = check_output_path(path, is_file, inputs, call.force, dry_run=call.dry_run)
        require_language_model(sides[0], output_format, call.architecture)
        if file and not whole_model:
            raise InputError(
                "is an image model, but llama-imatrix measures language models", culprit=os.fspath(call.base)
            )
        moments = None if file is None else InputMoments.of_model(file, sides[0].config, os.fspath(call.base))
        pairs = pair_tensors(*sides)
        requested = Selection.parse(call.target, call.exclude, call.layers)
        in_model = ClassNames(sides[0], call.architecture) if whole_model else None
        requested.require_used(_named(sides[0], pairs, in_model), os.fspath(call.base))
        excluded = (*call.exclude, *(() if whole_model else unsupported_patterns(sides[0])))
        selection = replace(requested, exclude=excluded)
        keeps_biases = call.bias and ReplaceTensor in output_format.can.kinds
        sorting = plan_sorting(sides[0], pairs, selection, call.embed, keeps_biases, in_model)
        used, form = choose_device(call.device), FORMS[FACTOR_DTYPES[dtype_word(call.dtype)]]
        opened.enter_context(naming_output(path))
        opened.enter_context(one_thread())  # sums of the report too are the same, however many there are
        head = _head(sides, call, file, used)
        with _opened(path, is_file, head, call.resume, call.dry_run) as (job, journal, place):
            work = Work(job, journal, used, call.progress)
            deltas = compare_models(sorting, work)
            deltas.alphas = output_format.can.alpha == "tensor"
            if in_model:
                _refuse_unsaid(sides[0], in_model, deltas)
            choices = SvdChoices(call.seed, call.certify)
            done = Extraction(deltas, sorting, work, rule, form.itemsize, call.max_rank, moments, choices)
            done.require_moments()
            done.factor_all()
            _refuse(done, deltas, parse_words(call.allow))
            ranks = done.ranks()
            _refuse_nothing(rule[0], ranks, done, deltas)
            plan = plan_adapter(deltas, done.factored, ranks, form, sides[0], os.fspath(call.base))
            if whole_model:
                plan = plan_language_adapter(plan, output_format, sides[0])
            else:
                budget = rule[0] not in RANK_RULES
                plan = plan_image_adapter(plan, output_format, done.factored, form, sides[0], budget)
            _check_budget(rule, plan)

            def report() -> ExtractReport:
                return _build_report(
                    done, deltas, pairs, plan, (os.fspath(call.base), os.fspath(call.tuned), str(path)), call.dry_run
                )

            if place:
                words = options_of(call)
                make = (lambda: _card(sides, words, output_format.key, report())) if call.card else None
                output_format.fill(place, replace(plan.content, card=make), read)
            result = report()
        absent = in_model.absent() if in_model and call.architecture else ()
        return replace(
            result, warnings=(*result.warnings, *absent, *(moments.warnings() if moments else ())), exists=exists
        )


def _head(
    sides: Sequence[Checkpoint], call: Extract, imatrix: ImatrixFile | None, device: Device
) -> dict[str, dict[str, Any]]:
    """Return the journal's description of the run: everything that the factors' bytes depend on, by name."""
    shards = [shard for side in sides for shard in side.shards]
    configs = [(side.config, side.declared) for side in sides]
    inputs = described_inputs(shards, configs, [imatrix.path] if imatrix else ())
    machine = {"numpy": np.__version__, "device": device.partition(":")[0]}
    if device.is_gpu:
        import torch

        machine["torch"] = torch.__version__
    described = described_call(call, [input_word(call.base), input_word(call.tuned)])
    return {"options": described, "inputs": inputs, "machine": machine}


@contextmanager
def _opened(
    path: Path, is_file: bool, head: Mapping[str, Mapping[str, Any]], resume: bool, dry_run: bool
) -> Iterator[tuple[Job, Journal, Path | BinaryIO | None]]:
    """Open the output and its journal as `journaled` does. A dry run gets only an unnamed journal.

    The output is None on ranks other than 0, which exit before the adapter is written.
    """
    if dry_run:
        if resume:
            require_same(path, head)
        with closing(Journal(path.absolute(), RESULTS)) as journal:
            journal.open_nameless()
            yield Job(), journal, None
        return

    def open_place(goes_on: Callable[[], bool]) -> AbstractContextManager[Path | BinaryIO]:
        return partial_place(path, is_file, lambda: [partial_path(path)] if goes_on() else [])

    job = current_job()
    with journaled(path, RESULTS, head, resume, job, open_place, nullcontext) as (journal, place):
        yield job, journal, place


def _refuse_unsaid(base: Checkpoint, in_model: ClassNames, deltas: SortedDeltas) -> None:
    factored = {name: delta.weight.in_model for name, delta in deltas.low_rank.items()}
    exact = {name: in_model(name) for name in deltas.exact}
    uses = {name: [in_model(use) for use, _ in delta.uses] for name, delta in deltas.low_rank.items()}
    refuse_unsaid(base, in_model, factored, exact, uses)


def _card(sides: Sequence[Checkpoint], options: Sequence[str], library: str, report: ExtractReport) -> bytes:
    """Return the output's model card. `options` are those of its command."""
    base, tuned = (input_word(name) for name in (report.base, report.tuned))
    facts = [
        f"{rank_range(m.rank for m in report.modules)} in {len(report.modules)} modules",
        f"{len(report.exact)} tensors are stored exactly",
        f"{kept_or_none(report.kept)} of the energy of the factored change is kept",
        *output_facts(report.imatrix, report.weighted_error),
    ]
    commands = (
        command_line("extract", base, tuned, *options, "-o", "adapter"),
        command_line("inspect", "adapter", "--base", base, "--strict"),
    )
    licences = [read_licence(None if side.given_as_file else side.folder) for side in sides]
    title = f"{code(shown_name(report.tuned))} as an adapter of {code(shown_name(report.base))}"
    return encode_card(title, library, [name_on_hub(report.base)], licences, facts, commands, [*report.left_out])


def _refuse_codes(side: Checkpoint) -> None:
    """Raise InputError for a GGUF model in codes: their rounding would count as a change."""
    coded = next((name for name in side.stored if side.shard_of[name].stored_type(name) in BLOCK_TYPES), None)
    if coded:
        raise InputError(
            f"is a quantized GGUF model ({coded}), so its rounding errors would be extracted too",
            culprit=str(side.path),
            remedy="pass a model in 16 or 32 bits",
        )


def _named(base: Checkpoint, pairs: ModelPairs, in_model: ClassNames | None) -> set[str]:
    """Return the paths that a pattern can name: those of the files, of tied tensors, and of the class."""
    tie = find_tie(base)
    stored = {*pairs.both, *(tie.lacking(base) if tie else ())}
    names = {*stored, *map(in_model, stored)} if in_model else stored
    rearranged = rearranged_weights(base, in_model).values() if in_model else ()
    return {*map(module_path, names)} | {weight.paths[-1] for each in rearranged for weight in each}


def _check_budget(rule: tuple[str, float], plan: AdapterPlan) -> None:
    """Raise UsageError if the exact tensors alone exceed the budget of the adapter."""
    name, value = rule
    spent = sum(spec.nbytes if name == "size" else spec.size for spec in plan.content.specs.values())
    if name not in RANK_RULES and spent > value:
        unit = "bytes" if name == "size" else "parameters"
        raise UsageError(
            f"--{name} {value:.0f} is too small: the tensors that are stored exactly take {spent} {unit}",
            remedy=f"raise --{name}, or exclude biases and norms with --no-bias, embeddings with --embed skip",
        )


def _refuse(work: Extraction, deltas: SortedDeltas, allow: tuple[str, ...]) -> None:
    """Raise if there is nothing to extract, or one model is no fine-tune of the other."""
    if not (work.factored or deltas.exact or deltas.left_out):
        raise InputError("the two models are equal: there is nothing to extract")
    if not (work.factored or deltas.exact):
        some = ", ".join(list(deltas.left_out)[:3])
        raise InputError(f"no changed tensor is selected and supported by adapters: {some}, ...")
    relative = _relative(work, deltas)
    if (relative is None or relative > UNRELATED) and "unrelated" not in allow:
        size = "not 0, but the base is" if relative is None else f"{relative:.2f} times the base"
        raise NeedsFlag(
            f"the delta is {size}: one is not a fine-tune of the other",
            flags="--allow unrelated",
            why="to extract it anyway",
        )


def _refuse_nothing(rule: str, ranks: Mapping[str, int], work: Extraction, deltas: SortedDeltas) -> None:
    """Raise if a rule gives no matrix a rank."""
    changed = any(factored.known for factored in work.factored.values())
    if rule in RANK_RULES and changed and not (deltas.exact or any(ranks.values())):
        above = "larger than rounding can explain" if rule == "noise" else f"kept by {rule}"
        raise InputError(
            f"no delta is {above}: the adapter would be empty",
            remedy="give --rank N instead, or another value",
        )


def _relative(work: Extraction, deltas: SortedDeltas) -> float | None:
    """Return ||TUNED - BASE|| / ||BASE|| over the matrices that changed. None if they are 0 in BASE.

    Biases are left out, as they often start at 0.
    """
    both = list(work.seen.values()) + [deltas.norms[name] for name in deltas.matrices]
    base, delta = math.fsum(w for w, _ in both), math.fsum(d for _, d in both)
    return math.sqrt(delta / base) if base else None if delta else 0.0


def _build_report(
    work: Extraction,
    deltas: SortedDeltas,
    pairs: ModelPairs,
    plan: AdapterPlan,
    names: tuple[str, str, str],
    dry_run: bool,
) -> ExtractReport:
    modules = tuple(_module_row(work, name, plan) for name in plan.ranks if plan.ranks[name])
    without = {n: math.sqrt(f.spectrum.total) for n, f in work.factored.items() if not plan.ranks[n] and f.known}
    total = math.fsum(work.factored[n].spectrum.total for n in plan.ranks)
    kept_energy = math.fsum(math.fsum(work.factored[n].spectrum.squares[:k]) for n, k in plan.ranks.items())
    factored_ranks = [(work.factored[n], k) for n, k in plan.ranks.items()]
    norm, residual = (
        math.fsum(f.norm_squared for f, _ in factored_ranks),
        math.fsum(f.residuals[k] for f, k in factored_ranks),
    )
    zero = sum(not f.known for f in work.factored.values())
    base, tuned, out = names
    return ExtractReport(
        base=base,
        tuned=tuned,
        out=out,
        dry_run=dry_run,
        modules=modules,
        kept=kept_energy / total if total else None,
        error=math.sqrt(residual / norm) if norm else None,
        weighted_error=_lost([each for each in factored_ranks if each[0].weighted]),
        relative=_relative(work, deltas),
        parameters=sum(spec.size for spec in plan.content.specs.values()),
        nbytes=sum(spec.nbytes for spec in plan.content.specs.values()),
        exact=tuple(deltas.exact),
        left_out={**deltas.left_out, **without},
        unchanged=deltas.unchanged + zero,
        only_base=pairs.only_base,
        only_tuned=tuple(name for name in pairs.only_tuned if name not in deltas.taken),
        warnings=(*_energy_warnings(modules, kept_energy / total if total else 1.0), *_tie_warnings(deltas, plan)),
        dtypes=dtypes_of(plan.content.specs.values()),
        imatrix=work.imatrix,
        unweighted=work.unweighted,
    )


def _lost(factored: Sequence[tuple[DeltaFactors, int]]) -> float | None:
    """Return the relative error of factors of these ranks, over all changes. None if there are none."""
    total = math.fsum(each.spectrum.total for each, _ in factored)
    kept_energy = math.fsum(math.fsum(each.spectrum.squares[:rank]) for each, rank in factored)
    return math.sqrt(max(0.0, 1.0 - kept_energy / total)) if total else None


def _module_row(work: Extraction, name: str, plan: AdapterPlan) -> ModuleExtract:
    factored, rank = work.factored[name], plan.ranks[name]
    spectrum, (base_squared, delta_squared) = factored.spectrum, work.seen[name]
    kept_energy, total = math.fsum(spectrum.squares[:rank]), spectrum.total
    noise, residual = spectrum.noise or 0.0, math.sqrt(factored.residuals[rank])
    return ModuleExtract(
        name=name,
        kind=factored.kind,
        shape=factored.shape,
        rank=rank,
        relative=math.sqrt(delta_squared / base_squared) if base_squared else None,
        kept=kept_energy / total,
        residual=residual,
        error=residual / math.sqrt(delta_squared),
        weighted_error=_lost([(factored, rank)]) if factored.weighted else None,
        gap=factored.gap,
        how=factored.how,
        effective_rank=plan.effective_rank(name),
        noise=noise / math.sqrt(factored.sizes[0]),
        above_noise=None if factored.weighted else sum(square > noise**2 for square in spectrum.squares),
        stored=plan.stored(name),
        rank_50=rank_for(spectrum, 0.5, factored.full) if kept_energy < LOW * total else None,
        rank_90=rank_for(spectrum, 0.9, factored.full) if kept_energy < 0.9 * total else None,
        spectrum=factored.curve(),
    )


def _energy_warnings(modules: Sequence[ModuleExtract], kept: float) -> tuple[str, ...]:
    if kept >= LOW or not modules:
        return ()
    ranks_50 = sorted(m.rank_50 for m in modules if m.rank_50)
    ranks_90 = sorted(m.rank_90 for m in modules if m.rank_90)
    half = f"about rank {ranks_50[len(ranks_50) // 2]} would keep half" if ranks_50 else ""
    nine_tenths = f"rank {ranks_90[len(ranks_90) // 2]} nine tenths" if ranks_90 else ""
    ranks_text = " and ".join(part for part in (half, nine_tenths) if part)
    return (f"{kept_share(kept)} of the delta's energy is kept: its rank is not low; in a median matrix {ranks_text}",)


def _tie_warnings(deltas: SortedDeltas, plan: AdapterPlan) -> tuple[str, ...]:
    shared = [(n, each.uses) for n, each in deltas.low_rank.items() if len(each.uses) > 1 and plan.ranks.get(n)]
    if not shared or not deltas.in_model:
        return ()
    name, uses = shared[0]
    others = f" (and so on, {len(shared)} in all)" if len(shared) > 1 else ""
    nothing = "; --embed full avoids this" if any(transposed for _, transposed in uses) else ""
    return (
        f"{', '.join(use for use, _ in uses)} share one matrix, {name} in the file{others}, and each has the factors: "
        f"PEFT's merge_and_unload adds them several times; a merge by loratool does not{nothing}",
    )
