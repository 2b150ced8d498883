"""`inspect --spectra` reports the singular values of a model's matrices, or of an adapter's deltas.

A delta's come from its factors; a weight's from the eigenvalues of the smaller of W^T W and W W^T in float64, which
resolve them down to 1e-8 of the largest. One matrix is in memory at a time. Beside a base it also counts which leading
singular vectors of the merged weights the adapter brings in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

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
from ...numerics.factored_svd import effective_rank, rank_of_energy, stable_rank
from ...numerics.spectrum import RANK_TOLERANCE, spectrum_points
from ...numerics.svd import UNRESOLVED, singular_values_of
from ...streaming.workers import Progress, choose_device, map_in_order, one_thread, worker_count
from ...views.inspect_spectra import SpectraReport, Spectrum
from ...views.intruders import IntruderRule
from ..arguments import Layers, Patterns, Positive, StrPath, checked
from ..inputs import open_model, without_base_option
from ..machine import require_ieee
from .intruders import count_intruders, matrices_of, place_matrices

LARGEST = 8  # singular values in the report


TARGET = ("all-linear",)


@checked
@require_ieee
def spectra(
    path: StrPath,
    *,
    target: Patterns = (),
    exclude: Patterns = (),
    layers: Layers | None = None,
    alpha: float | None = None,
    base: StrPath | None = None,
    top: Positive | None = None,
    threshold: float | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> SpectraReport:
    """Return the singular values of every selected module.

    Of a model these are all linear layers if no target is named, of an adapter all its deltas.

    Args:
        base: the model under an adapter, to count the intruder dimensions of each merged weight.
        top: of so many leading left singular vectors, 10 by default.
        threshold: the least |cosine| of a match in the base, 0.5 by default.
        target, exclude: patterns of module paths (`selection.Selection`), one or a list.
        layers: numbers of layers: "0-15,20", range(16) or a list.
        alpha: for an adapter file without an alpha.
        progress: called with the matrices done and the matrices in all.

    Raises:
        InputError: nothing is selected, a weight's codes cannot be read, or a tensor holds nan or inf.
        UsageError: an option of the base's is given without one, or `base` beside a model.
    """
    where, is_adapter = choose_device(device), holds_adapter(path)
    if base is None and not (top is threshold is None):
        raise UsageError("--top and --threshold are for intruder dimensions, which need --base")
    if base is not None and not is_adapter:
        raise UsageError("is a model; --base is for adapters, diff for two models", culprit=os.fspath(path))
    selection = Selection.parse(target or (() if is_adapter else TARGET), exclude, layers)
    rule = None if base is None else IntruderRule.parse(top, threshold)
    rest, left_out, hashes = tuple[str, ...](), dict[str, str](), dict[str, str]()
    with ExitStack() as opened:
        if is_adapter:
            adapter = _open_adapter(path, alpha, base, opened)
            hashes = {adapter.name: adapter.sha256}
            selection.require_used(adapter.updates, adapter.name)
            chosen = [update for module, update in adapter.updates.items() if selection.selects(module)]
            rest = tuple(update.module for update in chosen if not update.rank)
            placed: Mapping[str, Sequence[Placed]] = {}
            if base is not None:
                placed = place_matrices(open_model(base, "--base is the model under it", opened), adapter, selection)
            updates = [each for each in chosen if each.rank and (base is None or each.module in placed)]
            found = _adapter_rows(adapter, updates, placed, rule, where)
        else:
            model = open_model(path, "the spectra of an adapter are its changes'", opened)
            weights, left_out = find_candidates(model, selection, among=model.specs)
            found = _model_rows(model, weights, where)
        modules = []
        for row, done, total in found:
            modules.append(row)
            if progress:
                progress(done, total)
    if not modules:
        why = f"{rest[0]} and what else is selected has no factors" if rest else "no module is selected"
        raise InputError(f"has no singular values to tell: {why}", culprit=os.fspath(path))
    return SpectraReport(
        os.fspath(path),
        "adapter" if is_adapter else "checkpoint",
        tuple(modules),
        without_factors=rest,
        left_out=left_out,
        base=None if base is None else os.fspath(base),
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
    device: torch.device,
) -> SpectrumRows:
    """Yield a row for each update, beside a base (`placed`) with what is new in it."""

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
        yield replace(row, intruders=count_intruders(update.module, pairs, rule, device)), done, len(updates)


def _model_rows(model: Checkpoint, weights: Sequence[ModelWeight], device: torch.device) -> SpectrumRows:
    for done, each in enumerate(weights, 1):
        matrices = (read_float32(part, device).flatten(1) for (part,) in each.matrices(model.ref))
        empty = torch.zeros(1, 1, dtype=torch.float64)
        S = torch.stack([singular_values_of(W) for W in matrices]) if each.spec.size else empty
        yield _spectrum_row(each.name, each.kind, each.spec.shape, S, each.max_rank, UNRESOLVED), done, len(weights)


def _spectrum_row(name: str, kind: str, shape: tuple[int, ...], S: Tensor, full: int, noise: float) -> Spectrum:
    """Summarize the singular values S of a stack: (E, k), falling; `noise` as in `spectrum_points`."""
    norm = float(torch.linalg.vector_norm(S))
    spectrum = spectrum_points(S.square().sum(0), len(S), noise=noise)
    S = S.square().mean(0).sqrt().cpu()
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
