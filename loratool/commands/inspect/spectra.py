"""Run `inspect --spectra`: report the singular values of a model's matrices, or of an adapter's deltas.

Those of a delta come from its factors. Those of a weight come from the eigenvalues of the smaller of W^T W and W W^T
in float64, which resolve them down to 1e-8 of the largest. One matrix is in memory at a time. With a base it also
counts the leading singular vectors of merged weights that the adapter adds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace

import numpy as np

from ...adapters.adapter import Adapter
from ...adapters.formats import holds_adapter, open_adapter
from ...adapters.stacked import load_singular_values
from ...adapters.updates.update import UpdateSpec
from ...binding.modules.selection import Selection
from ...binding.ties.placed_modules import Placed
from ...binding.weights.candidates import find_candidates
from ...binding.weights.model_weights import ModelWeight
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, read_config
from ...files.tensor_ref import read_float32
from ...numerics.arrays import Device, fetched, like_of
from ...numerics.factored_svd import effective_rank, rank_of_energy, stable_rank
from ...numerics.forms import Wide
from ...numerics.spectrum import RANK_TOLERANCE, spectrum_points
from ...numerics.svd import UNRESOLVED, singular_values_of
from ...streaming.parallel import choose_device, map_in_order, worker_count
from ...streaming.threads import one_thread
from ...views.inspect_spectra import SpectraReport, Spectrum
from ...views.intruders import IntruderRule
from ..inputs import open_model, without_base_option
from .call import Spectra
from .intruders import count_intruders, matrices_of, place_matrices

LARGEST = 8  # singular values in the report

TARGET = ("all-linear",)


def run_spectra(call: Spectra) -> SpectraReport:
    """Return the singular values of every selected module."""
    where, is_adapter = choose_device(call.device), holds_adapter(call.path)
    if call.base is None and not (call.top is call.threshold is None):
        raise UsageError("--top and --threshold are for intruder dimensions: add --base")
    if call.base is not None and not is_adapter:
        raise UsageError(
            "is a model, but --base is for adapters; to compare two models use diff --spectra",
            culprit=os.fspath(call.path),
        )
    selection = Selection.parse(call.target or (() if is_adapter else TARGET), call.exclude, call.layers)
    rule = None if call.base is None else IntruderRule.parse(call.top, call.threshold)
    rest, left_out, hashes = tuple[str, ...](), dict[str, str](), dict[str, str]()
    with ExitStack() as opened:
        if is_adapter:
            adapter = _open_adapter(call.path, call.alpha, call.base, opened)
            hashes = {adapter.name: adapter.sha256}
            selection.require_used(adapter.updates, adapter.name)
            chosen = [update for module, update in adapter.updates.items() if selection.selects(module)]
            rest = tuple(update.module for update in chosen if not update.rank)
            placed: Mapping[str, Sequence[Placed]] = {}
            if call.base is not None:
                placed = place_matrices(
                    open_model(call.base, "--base must be the model under it", opened), adapter, selection
                )
            updates = [each for each in chosen if each.rank and (call.base is None or each.module in placed)]
            rows = _adapter_rows(adapter, updates, placed, rule, where)
        else:
            model = open_model(call.path, "a model is needed here", opened)
            weights, left_out = find_candidates(model, selection, among=model.specs)
            rows = _model_rows(model, weights, where)
        modules = []
        for row, done, total in rows:
            modules.append(row)
            if call.progress:
                call.progress(done, total)
    if not modules:
        why = f"{rest[0]} and the other selected modules have no factors" if rest else "no module is selected"
        raise InputError(f"has no singular values: {why}", culprit=os.fspath(call.path))
    return SpectraReport(
        os.fspath(call.path),
        "adapter" if is_adapter else "checkpoint",
        tuple(modules),
        without_factors=rest,
        left_out=left_out,
        base=None if call.base is None else os.fspath(call.base),
        top=rule.top if rule else None,
        threshold=rule.threshold if rule else None,
        sha256=hashes,
    )


SpectrumRows = Iterator[tuple[Spectrum, int, int]]


def _open_adapter(
    path: str | os.PathLike[str], alpha: float | None, base: str | os.PathLike[str] | None, opened: ExitStack
) -> Adapter:
    with without_base_option() if base is None else nullcontext():
        adapter = open_adapter(path, alpha, model=None if base is None else read_config(base))
    opened.callback(adapter.file.close)
    return adapter


def _adapter_rows(
    adapter: Adapter,
    updates: Sequence[UpdateSpec],
    placed: Mapping[str, Sequence[Placed]],
    rule: IntruderRule | None,
    device: Device,
) -> SpectrumRows:
    """Yield a row for each update. With a base (`placed`) it has the counts of intruder dimensions."""

    def measure(update: UpdateSpec) -> Spectrum:
        S = load_singular_values(adapter, update, device)
        out, columns = update.cls.flat(update)
        return _spectrum_row(update.module, update.kind, update.shape, S, min(out or 0, columns or 0), RANK_TOLERANCE)

    if rule is None:
        with closing(map_in_order(measure, updates, worker_count(device))) as rows:
            for done, row in enumerate(rows, 1):
                yield row, done, len(updates)
        return
    for done, update in enumerate(updates, 1):
        with one_thread():
            row = measure(update)
        pairs = matrices_of(placed[update.module], device)  # large, so that all threads are at one of them
        yield replace(row, intruders=count_intruders(update.module, pairs, rule)), done, len(updates)


def _model_rows(model: Checkpoint, weights: Sequence[ModelWeight], device: Device) -> SpectrumRows:
    like = like_of(device)
    for done, weight in enumerate(weights, 1):
        matrices = (read_float32(part, like) for (part,) in weight.matrices(model.ref))
        values = (fetched(singular_values_of(W.reshape(len(W), -1))) for W in matrices)
        S = np.stack([*values]) if weight.spec.size else np.zeros((1, 1))
        yield (
            _spectrum_row(weight.name, weight.kind, weight.spec.shape, S, weight.max_rank, UNRESOLVED),
            done,
            len(weights),
        )


@np.errstate(all="ignore")
def _spectrum_row(name: str, kind: str, shape: tuple[int, ...], S: Wide, full: int, noise: float) -> Spectrum:
    """Summarize the singular values S of a stack: (E, k), descending. `noise` is as in `spectrum_points`."""
    norm = float(np.linalg.norm(S))
    spectrum = spectrum_points(np.square(S).sum(0), len(S), noise=noise)
    S = np.sqrt(np.square(S).mean(0))
    return Spectrum(
        name=name,
        kind=kind,
        shape=shape,
        full=full,
        norm=norm,
        top=tuple(S[:LARGEST].tolist()),
        effective_rank=float(effective_rank(S)),
        stable_rank=float(stable_rank(S)),
        rank_50=rank_of_energy(S, 0.5),
        rank_90=rank_of_energy(S, 0.9),
        rank_99=rank_of_energy(S, 0.99),
        spectrum=spectrum,
    )
