"""Run `resize`: change an adapter's rank by exact truncation of its factors, or by padding with zeros.

The best factors of a lower rank are the top of the delta's SVD, computed from an r x r core, without forming B @ A. A
rule sees the singular values of all modules first. Then each module's factors are computed as they are written.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...adapters.adapter import Adapter
from ...adapters.edited import (
    CARRIED,
    CarriedTensor,
    EditedAdapter,
    edited_output,
    require_same_init,
    require_writable,
    write_edited,
)
from ...adapters.stacked import load_stacked_factors, parameters_per_rank
from ...adapters.truncated import Figures, Weighted, in_all, truncated_factors
from ...adapters.updates.add import AddDelta
from ...adapters.updates.dora import BEFORE_NORM, DoRA
from ...adapters.updates.low_rank import LowRank
from ...binding.weights.input_moments import InputMoments, open_imatrix
from ...errors import InputError, NeedsFlag, UsageError
from ...files.dtypes import FACTOR_DTYPES, dtypes_of
from ...files.output.model_card import code, shown_name
from ...files.output.output import naming_output
from ...files.output.paths import check_output_path
from ...files.tensor_ref import TensorRef
from ...files.weights_file import paths_of
from ...numerics.arrays import Array, Device, Numbers, fetched, like_of, sent
from ...numerics.factored_svd import effective_rank, factored_svd, singular_values
from ...numerics.forms import FORMS, Form, Wide
from ...numerics.rounding_noise import product_noise_edge
from ...streaming.parallel import Ahead, Progress, choose_device, map_in_order, worker_count
from ...streaming.threads import one_thread
from ...transform.expand import expand, kinds_to_expand
from ...transform.in_memory import loss_warnings, open_converted, rank_notes
from ...transform.lazy import start
from ...transform.rank_rules import BUDGETS, NOISE_IS_PLAIN, SingularValues, choose_ranks, read_rule
from ...transform.request import ConvertRequest, request_for
from ...views.parts.writing import command_line
from ...views.resize import ModuleResize, ResizeReport
from ..adapter_requests import AdapterRequest
from ..arguments import dtype_word, parse_count, parse_size, parse_words
from ..cards import (
    adapter_card,
    error_share,
    input_word,
    kept_or_none,
    options_of,
    output_facts,
    rank_range,
    source_facts,
)
from ..inputs import open_adapters
from .call import Resize


def run_resize(call: Resize) -> ResizeReport:
    """Write the adapter with other ranks. Afterwards alpha is each module's rank."""
    budgets = {"params": parse_count(call.params), "size": parse_size(call.size)}
    rule = read_rule({"rank": call.rank, "energy": call.energy, **budgets}, call.rank_rule)
    if rule is None:
        raise NeedsFlag("resize needs --rank, --energy, --params or --size", flags="--rank N")
    if rule[0] == "noise" and call.imatrix is not None:
        raise UsageError(NOISE_IS_PLAIN)
    if rule[0] == "noise" and call.to is not None:
        raise UsageError(
            "the rule noise needs the factors as they are stored, but --to may split or fuse them",
            remedy=f"resize without --to, then run loratool convert --to {call.to}",
        )
    with ExitStack() as opened:
        opened.enter_context(one_thread())
        (source,) = open_adapters(
            [AdapterRequest(os.fspath(call.adapter), drop=parse_words(call.drop))], call.alpha, opened
        )
        former, left_out = source, source.excluded
        if call.to is None:
            require_writable(source)
        path, is_file = edited_output(source, call.to, call.out, "resized")
        file = open_imatrix(call.imatrix, opened)
        inputs = [*paths_of([source.file]), *([file.path] if file else [])]
        exists = check_output_path(path, is_file, inputs, call.force, dry_run=call.dry_run)
        if rule[0] == "noise":
            _refuse_products(kinds_to_expand(source))
        with request_for("resize"):
            state = expand(start(source))
        if call.to is not None:
            state = open_converted(state, ConvertRequest(call.to), "resize", path.absolute().parent, opened)
        source, warnings = state.adapter, (*source.notes, *loss_warnings([state]))
        moments = None if file is None else InputMoments.of_adapter(file, source)
        if moments:
            moments.require_known({module: update for module, update in source.updates.items() if update.rank})
        work = _Resizing(
            source, moments, choose_device(call.device), FORMS[FACTOR_DTYPES[dtype_word(call.dtype)]], call.progress
        )
        ranks = work.ranks(*rule, call.max_rank)
        require_same_init(source, ranks)

        def report() -> ResizeReport:
            return work.report(former.name, str(path), ranks, call.dry_run, warnings, left_out)

        if call.dry_run:
            work.measure(ranks)
        else:
            opened.enter_context(naming_output(path))
            words = (input_word(call.adapter), *options_of(call))
            work.write(
                ranks, path, is_file, (lambda: _card(former, words, source.format, report())) if call.card else None
            )
        return replace(report(), exists=exists, sha256={former.name: former.sha256})


def _refuse_products(kinds: Mapping[str, str]) -> None:
    """Raise InputError for modules whose factors are products of rounded numbers."""
    for module, kind in kinds.items():
        raise InputError(
            f"is {kind}, but the rule noise needs factors of LoRA",
            culprit=module,
            remedy="use --rank, --energy or another rule",
        )


def _card(source: Adapter, words: Sequence[str], library: str, report: ResizeReport) -> bytes:
    """Return the output's model card. `words` are those of its command."""
    name = shown_name(source.name)
    facts = [
        *source_facts([(source, "the original adapter")]),
        f"{rank_range(m.new_rank for m in report.modules)} instead of {rank_range(m.rank for m in report.modules)}, in "
        f"{len(report.modules)} modules",
        f"{kept_or_none(report.kept)} of the energy is kept; the error is {error_share(report.error)} of the delta",
        *output_facts(report.imatrix, report.weighted_error),
    ]
    commands = (command_line("resize", *words, "-o", "resized"), command_line("diff", words[0], "resized"))
    return adapter_card(f"{code(name)} with another rank", library, [source], facts, commands, report.left_out)


class _Resizing:
    """The spectra of an adapter's modules, the adapter with new ranks, and the figures of each module."""

    def __init__(
        self,
        source: Adapter,
        moments: InputMoments | None,
        device: Device,
        form: Form,
        progress: Progress | None,
    ) -> None:
        self._source, self._moments, self._progress = source, moments, progress
        self._like, self._form = like_of(device), form
        self._updates = {module: update for module, update in source.updates.items() if update.rank}
        if not self._updates:
            raise InputError("has no low-rank factors", culprit=source.name)
        self._carried = {}
        for module, update in source.updates.items():
            if not update.rank and update.cls not in CARRIED:
                raise InputError(
                    f"is {update.kind}, which has no factors and cannot be copied",
                    culprit=module,
                    remedy="first exclude it with loratool convert --exclude",
                )
            carried = {role: key for role, key in update.tensors.items() if role not in LowRank.roles}
            carried |= {"base": update.base} if update.base else {}
            factor = update.scale if update.cls is AddDelta else 1.0  # its scale was the factors' alpha / r
            self._carried.update(
                {key: CarriedTensor(((TensorRef(source.file, key), factor),)) for key in carried.values()}
            )
        self._spectra: dict[str, Wide] = {}  # squares of singular values, over a stack; of weighted ones if any
        self._figures: dict[str, Figures] = {}
        self._done, self._steps = 0, len(self._updates)
        self._workers = worker_count(device, max(update.rank for update in self._updates.values()))
        self._reading = threading.Lock()  # adapters that are converted keep the last module that was asked for

    def _load(self, module: str) -> tuple[Array, Array, Array | None]:
        """Return B, A and the weights of a module's inputs, (E, 1, in), or None to take them as equal."""
        update, inputs = self._updates[module], None
        with self._reading:
            B, A = load_stacked_factors(self._source, update)
            if self._moments:
                inputs = self._moments.column_factors(module, update)
        return sent(B, self._like), sent(A, self._like), None if inputs is None else sent(inputs, self._like)

    def ranks(self, rule: str, value: float, max_rank: int | None) -> dict[str, int]:
        spectra = dict.fromkeys(self._updates, SingularValues((), 0.0, 0, True))
        if rule != "rank":
            squares = dict[str, Wide]()
            self._steps *= 2
            with closing(map_in_order(self._squares, self._updates, self._workers)) as results:
                for module, found in zip(self._updates, results, strict=True):
                    squares[module] = found
                    self._step()
            noise = self._noise if rule == "noise" else lambda module: None
            spectra = {module: self._spectrum(module, squares[module], noise(module)) for module in self._updates}
        if rule in BUDGETS:
            value = self._edited(dict.fromkeys(self._updates, 1)).budget(rule, value)
        return choose_ranks(rule, value, spectra, max_rank)

    def _squares(self, module: str) -> Wide:
        B, A, inputs = self._load(module)
        return _squares_of(singular_values(B, A if inputs is None else A * inputs))

    def _spectrum(self, module: str, squares: Wide, noise: float | None) -> SingularValues:
        return SingularValues(
            tuple(squares.tolist()), float(squares.sum()), parameters_per_rank(self._updates[module]), True, noise
        )

    def _step(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._steps)

    def _noise(self, module: str) -> float:
        """Return a bound of the rounding noise of the stored factors, over a stack."""
        update = self._updates[module]
        B_type, A_type = (self._source.file.stored_type(update.tensors[role]) for role in "BA")
        if not {A_type, B_type} <= FORMS.keys():
            raise InputError(
                f"is in {A_type} and {B_type}, but the rule noise needs floating-point factors",
                culprit=module,
                remedy="use --rank, --energy or another rule",
            )
        factors = load_stacked_factors(self._source, replace(update, scale=1.0))
        edges = (product_noise_edge(B, A, (FORMS[B_type], FORMS[A_type])) for B, A in zip(*factors, strict=True))
        return abs(update.scale) * math.hypot(*edges)

    def _edited(self, ranks: Mapping[str, int]) -> EditedAdapter:
        def factors(module: str) -> tuple[Numbers, Numbers]:
            B, A, inputs = self._load(module)
            D = factored_svd(B, A)
            weighted = None if inputs is None else Weighted(factored_svd(B, A * inputs), inputs)
            factors_made, self._figures[module] = truncated_factors(module, D, ranks[module], self._form, weighted)
            self._spectra[module] = _squares_of(weighted.svd.S if weighted else D.S)
            return factors_made

        return EditedAdapter(self._source, self._updates, ranks, factors, self._carried, self._form)

    @contextmanager
    def _computed(self, ranks: Mapping[str, int]) -> Iterator[EditedAdapter]:
        """Return the output, with factors that workers compute ahead."""
        edited = self._edited(ranks)
        with closing(Ahead(edited.factors, edited.order(), self._workers)) as ahead:

            def factors(module: str) -> tuple[Numbers, Numbers]:
                made = ahead(module)
                self._step()
                return made

            yield replace(edited, factors=factors)

    def measure(self, ranks: Mapping[str, int]) -> None:
        """Compute everything that `write` does, and write nothing."""
        with self._computed(ranks) as edited:
            for module in edited.order():
                edited.factors(module)

    def write(self, ranks: Mapping[str, int], path: Path, is_file: bool, card: Callable[[], bytes] | None) -> None:
        with self._computed(ranks) as edited:
            write_edited(edited, path, is_file, [self._source.file], card)

    def report(
        self,
        adapter: str,
        out: str,
        ranks: Mapping[str, int],
        dry_run: bool,
        warnings: tuple[str, ...],
        left_out: tuple[str, ...],
    ) -> ResizeReport:
        specs = self._edited(ranks).specs()
        rows = tuple(self._row(module, ranks[module]) for module in self._updates)
        total = in_all([self._figures[module] for module in self._updates])
        return ResizeReport(
            adapter=adapter,
            out=out,
            dry_run=dry_run,
            modules=rows,
            kept=total.kept,
            error=total.error,
            weighted_error=total.weighted_error,
            parameters=sum(spec.size for spec in specs.values()),
            nbytes=sum(spec.nbytes for spec in specs.values()),
            carried=tuple(sorted(self._carried)),
            warnings=(*warnings, *self._warnings(), *rank_notes(self._source, ranks)),
            left_out=left_out,
            dtypes=dtypes_of(specs.values()),
            adapter_nbytes=sum(spec.nbytes for spec in self._source.file.specs.values()),
            imatrix=str(self._moments.path) if self._moments else None,
            unweighted=tuple(self._moments.missing) if self._moments else (),
        )

    def _row(self, module: str, rank: int) -> ModuleResize:
        figures = self._figures[module]
        return ModuleResize(
            name=module,
            rank=self._updates[module].rank,
            new_rank=rank,
            norm=figures.norm,
            kept=figures.kept,
            error=figures.error,
            weighted_error=figures.weighted_error,
            effective_rank=float(effective_rank(np.sqrt(self._spectra[module]))),
            spectrum=figures.spectrum,
        )

    def _warnings(self) -> tuple[str, ...]:
        if any(update.cls is DoRA for update in self._updates.values()):
            return (BEFORE_NORM,)
        return ()


def _squares_of(S: Array) -> Wide:
    """Return the squares of the singular values of a stack (E, k), summed over it."""
    squares: Wide = fetched(S * S).sum(0)
    return squares
