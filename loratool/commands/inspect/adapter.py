"""Inspect an adapter in depth: measure its deltas from the factors, and list its problems.

Factors are read one module at a time; with a base, so are the weights that they change. `problems` has a line for
everything that would make a merge fail, or give another result than the author meant.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial

import numpy as np

from ...adapters.adapter import Adapter
from ...adapters.config import layer_runs
from ...adapters.formats import FORMATS
from ...adapters.formats.peft_config import base_mutating_init
from ...adapters.image_metadata import read_training, trigger_words
from ...adapters.patterns import Patterns, endings
from ...adapters.updates.add import AddDelta
from ...adapters.updates.diff import Diff
from ...adapters.updates.dora import DoRA
from ...adapters.updates.replace import ReplaceTensor
from ...adapters.updates.rows import ReplaceRows, indices_of
from ...adapters.updates.update import Rotated, Update, UpdateSpec
from ...architectures.numbered_names import split_numbers, with_ranges
from ...binding.merge.repeated_layers import with_repeated_layers
from ...binding.modules.image_modules import detect_families, image_family, read_source_modules
from ...binding.modules.misfits import nearest_names
from ...binding.modules.resolve import Binding, absent_from_adapter, bind, resolve_modules
from ...binding.modules.selection import Selection
from ...binding.names.base_names import notes_on_base
from ...binding.ties.placed_modules import Placed, placed_modules
from ...binding.ties.shared_tensors import bindable
from ...binding.ties.ties import find_tie
from ...errors import InputError, LoratoolError
from ...files.checkpoint import Checkpoint, open_checkpoint, plain_dtype
from ...files.codecs.quantized import with_coded
from ...files.containers.safetensors_file import file_metadata
from ...files.dtypes import FLOATS
from ...files.gguf_model import with_names_of_one
from ...files.tensor_ref import BLOCK, TensorRef, require_finite, squared_norm
from ...files.weights_file import paths_of
from ...numerics.factored_svd import effective_rank, singular_values
from ...streaming.parallel import map_in_order, worker_count
from ...views.inspect_adapter import AdapterGroup, AdapterInspection, Coverage, ModuleReport
from ..inputs import refuse_adapter

NEAREST_SHOWN = 8  # missing modules for which similar names are searched: a search takes milliseconds

NAMES_SHOWN = 4

EXACT = 1e-12  # a rotation of derived numbers is no farther from orthogonal


def inspect_adapter(adapter: Adapter, base: str | os.PathLike[str] | None) -> AdapterInspection:
    """Describe an open adapter. The report has its problems.

    Raises:
        InputError: the base cannot be read.
    """
    opened = None if base is None else open_checkpoint(base)
    try:
        checkpoint = None
        if opened is not None:
            refuse_adapter(opened, base or "", "--base must be the model under it")
            (checkpoint,) = with_names_of_one([opened])
        problems: list[str] = []
        coverage = binding = None
        problems += _faults(adapter)
        if checkpoint is not None and opened is not None:
            try:
                checkpoint = with_repeated_layers(checkpoint, [adapter])
            except InputError as error:
                problems.append(error.message)
        if adapter.only_for:
            problems.append(f"it is only for {adapter.only_for}: no other command accepts it")
        if checkpoint is not None:
            coverage, binding = _hold_against(adapter, checkpoint, os.fspath(base or ""), problems)
        problems += adapter.missing
        weights = placed_modules(checkpoint, binding) if checkpoint and binding else {}
        details = dict[str, ModuleReport]()
        measure = partial(_measure, adapter, weights)
        with closing(map_in_order(measure, adapter.updates, worker_count())) as measured:
            for report, faults in measured:
                details[report.name] = report
                problems += faults
        coded = _coded_note(checkpoint, weights) if checkpoint is not None else ()
        named = tuple(notes_on_base(opened, [adapter])) if opened is not None else ()
    finally:
        if opened is not None:
            opened.close()
    problems += _zero_updates(details) + _config_problems(adapter)
    init = base_mutating_init(adapter.config)
    notes = [f"initialized with {init}: merge it with --initial or --residual-base"] if init else []
    if layers := adapter.config.layers:
        runs = layer_runs(layers)
        notes.append(f"for a model of {len(layers)} layers, its base's {runs} (layer_replication): a merge writes it")
    ranks = {update.rank for update in adapter.updates.values() if update.rank}
    training = file_metadata(paths_of([adapter.file]))
    return AdapterInspection(
        path=adapter.name,
        format=adapter.format,
        groups=tuple(_groups(adapter, details)),
        details=tuple(details.values()),
        modules=len(adapter.updates),
        parameters=sum(spec.size for update in adapter.updates.values() for spec in update.specs.values()),
        nbytes=sum(spec.nbytes for spec in adapter.file.specs.values()),
        rank=ranks.pop() if len(ranks) == 1 else None,
        alpha=adapter.config.alpha,
        use_rslora=adapter.config.use_rslora,
        base_model=adapter.config.base_model,
        coverage=coverage,
        problems=tuple(problems),
        notes=(*notes, *named, *adapter.notes, *coded, *_notes_on_rotations(adapter)),
        extras=adapter.extras,
        metadata=training,
        trigger_words=trigger_words(training),
        training=read_training(training, detect_families(read_source_modules(adapter)[0])),
        family=image_family(adapter),
        sha256={adapter.name: adapter.sha256},
    )


def _hold_against(
    adapter: Adapter, base: Checkpoint, name: str, problems: list[str]
) -> tuple[Coverage, Binding | None]:
    """Return the coverage by names, and the binding if the shapes fit too."""
    tie = find_tie(base)
    specs, coded = bindable(base, tie)
    matches, missing = resolve_modules(with_coded(specs, coded), adapter, base.configs)
    missing = [module for module in missing if not adapter.in_modules_to_save(module)]
    similar = {m: tuple(nearest_names(m, base.specs)) if i < NEAREST_SHOWN else () for i, m in enumerate(missing)}
    coverage = Coverage(name, len(adapter.updates) - len(missing), similar)
    if missing:
        problems.append(
            f"{len(missing):,} of {len(adapter.updates):,} modules are not in the base: {_shortened(missing)}"
        )
    try:
        faulty = [module for module, update in adapter.updates.items() if update.fault]
        left_out = {*missing, *faulty}
        rest = adapter.only(adapter.updates.keys() - left_out)
        binding = bind(specs, base.configs, [(rest, 1.0)], Selection(), coded)
    except LoratoolError as error:
        where = f"{error.culprit}: " if error.culprit else ""
        problems += [where + error.message] if matches and len(faulty) < len(matches) else []
        return coverage, None
    if binding.quantized:
        formats = ", ".join(dict.fromkeys(each for _, _, each in binding.quantized.values()))
        what = f"modules are quantized in the base ({formats}), and their codes cannot be read"
        problems.append(f"{len(binding.quantized):,} {what}: {_shortened([*binding.quantized])}")
    problems += [
        line for line in absent_from_adapter(base.specs, adapter, binding.placements) if line not in adapter.missing
    ]
    flag = adapter.config.fan_in_fan_out
    placed = (p for placements in binding.placements.values() for p in placements)
    linear = [p for p in placed if p.update.transposed is None and p.update.rank]
    if flag is not None and linear and all(p.transposed is not flag for p in linear):
        layout = "(in, out)" if not flag else "(out, in)"
        problems.append(f"fan_in_fan_out is {str(flag).lower()}, but the base stores its weights as {layout}")
    return coverage, binding


def _faults(adapter: Adapter) -> list[str]:
    """Return the faults that a merge refuses, with a line for all modules with the same fault."""
    modules: dict[str, list[str]] = {}
    for module, update in adapter.updates.items():
        if update.fault:
            modules.setdefault(update.fault.replace(module, "it"), []).append(module)
    total = len(adapter.updates)
    return [
        f"{_shortened(names)}: {fault}"
        if len(names) <= NAMES_SHOWN
        else f"{len(names):,} of {total:,} modules, like {names[0]}: {fault}"
        for fault, names in modules.items()
    ]


def _notes_on_rotations(adapter: Adapter) -> Iterator[str]:
    """Yield how far rotations are from orthogonal, as those by a series are, and where a bound makes them smaller."""
    found = dict[str, Rotated]()
    for module, update in adapter.updates.items():
        if update.cls.mixes and not update.fault:
            with suppress(InputError):  # which is a problem of its own
                rotated = adapter.load(update).rotated()
                found |= {module: rotated} if rotated else {}
    worst = max(found, key=lambda module: found[module].defect, default="")
    if worst and found[worst].defect > EXACT:
        yield f"its rotations R are not orthogonal: ||R.T R - 1|| is up to {found[worst].defect:.2g}, in {worst}"
    bound = [module for module, rotated in found.items() if rotated.is_bound]
    if bound:
        yield f"the bound on rotations makes them smaller in {len(bound):,} of {len(found):,} modules"


def _coded_note(base: Checkpoint, weights: Mapping[str, Sequence[Placed]]) -> tuple[str, ...]:
    """Return a note on the modules that change quantized weights, and on how a merge writes these."""
    codecs = {m: [ref.weight.kind for ref, *_ in placed if ref.weight] for m, placed in weights.items()}
    coded = [module for module, keys in codecs.items() if keys]
    if not coded:
        return ()
    formats = ", ".join(dict.fromkeys(key for module in coded for key in codecs[module]))
    plain = ", ".join(dict.fromkeys(map(plain_dtype, base.models)))
    what = f"{len(coded):,} of {len(weights):,} modules are quantized in the base ({formats})"
    return (f"{what}: a merge dequantizes them to {plain}, and keeps the codes of others",)


@np.errstate(all="ignore")  # an overflow is inf
def _measure(
    adapter: Adapter, placed_by_module: Mapping[str, Sequence[Placed]], module: str
) -> tuple[ModuleReport, list[str]]:
    """Return the figures of a module, and its faults."""
    placed, problems = placed_by_module.get(module, ()), list[str]()
    spec, weights = adapter.updates[module], [*{ref.name: ref for ref, *_ in placed}.values()]
    norm = rank = relative = None
    try:
        if spec.rank:
            norm, rank = _delta_norm(adapter.load(spec))
        for name in (*(spec.tensors.values() if norm is None else ()), *([spec.base] if spec.base else [])):
            require_finite(TensorRef(adapter.file, name))
        if spec.fault:  # its scale may be anything
            norm = None
        elif norm is None:
            norm = _norm_without_factors(adapter, spec, placed)
    except InputError as error:
        problems.append(f"{error.culprit}: {error.message}")
    if norm is not None and weights:
        squared = math.fsum(map(squared_norm, weights))
        if math.isfinite(squared):
            ratio = norm / math.sqrt(squared) if squared else math.inf
            relative = ratio if math.isfinite(ratio) else None
        else:
            problems.append(f"{weights[0].name}: the base's weight has no finite norm")
    report = ModuleReport(
        name=module,
        kind=spec.kind,
        rank=spec.rank,
        norm=norm,
        effective_rank=rank,
        relative=relative,
        alpha=_alpha(adapter, spec),
        scale=spec.scale,
        shape=spec.shape,
        dtype=next(iter(spec.specs.values())).dtype,
        parameters=sum(each.size for each in spec.specs.values()),
    )
    return report, problems


def _norm_without_factors(adapter: Adapter, spec: UpdateSpec, placed: Sequence[Placed]) -> float | None:
    """Return ||D|| of an update without factors. None if it depends on a base, and there is none."""
    if issubclass(spec.cls, (AddDelta, Diff)):
        (name,) = spec.tensors.values()
        return math.sqrt(squared_norm(TensorRef(adapter.file, name))) * abs(spec.scale)
    if spec.cls in (ReplaceTensor, ReplaceRows):
        return _replacement_norm(adapter, spec, [*{ref.name: ref for ref, *_ in placed}.values()])
    return _norm_of_change(placed) if placed else None


def _norm_of_change(placed: Sequence[Placed]) -> float | None:
    """Return ||W' - W||, with weights read by blocks of rows. None if the weights are not finite."""
    from ...streaming.segment import RowSegment, UpdateLoader

    load, parts = UpdateLoader(), []
    for weight, placement, _ in placed:
        columns = weight.spec.size // placement.rows
        segment = RowSegment(weight, columns, placement.start, placement.stop, [placement], load)
        step = max(1, BLOCK // columns)
        for start in range(placement.start, placement.stop, step):
            W = weight.read_matrix(placement.rows, start, min(start + step, placement.stop))
            parts.append(float(np.square(segment.reals(W, start)[0] - W.wide()).sum()))
    norm = math.sqrt(math.fsum(parts)) if all(map(math.isfinite, parts)) else math.inf
    return norm if math.isfinite(norm) else None


def _replacement_norm(adapter: Adapter, spec: UpdateSpec, weights: Sequence[TensorRef]) -> float | None:
    """Return ||D|| of new values, their distance from the base's. None if it is not known."""
    value = TensorRef(adapter.file, spec.tensors["value"])
    if len(weights) != 1 or not value.spec.shape or not {value.spec.dtype, weights[0].spec.dtype} <= set(FLOATS):
        return None
    (weight,) = weights
    rows = indices_of(spec) or (range(value.spec.shape[0]) if value.spec.shape == weight.spec.shape else ())
    if not rows or value.spec.shape[1:] != weight.spec.shape[1:] or max(rows) >= weight.spec.shape[0]:
        return None
    count, row_count = weight.spec.shape[0], max(1, BLOCK // max(1, value.spec.size // value.spec.shape[0]))
    parts = []
    for start in range(0, len(rows), row_count):
        base_rows = rows[start : start + row_count]
        new = value.read_matrix(value.spec.shape[0], start, start + len(base_rows)).wide()
        if indices_of(spec):
            old = np.concatenate([weight.read_matrix(count, row, row + 1).wide() for row in base_rows])
        else:
            old = weight.read_matrix(count, start, start + len(base_rows)).wide()
        parts.append(float(np.square(new - old).sum()))
    return math.sqrt(math.fsum(parts))


def _delta_norm(update: Update) -> tuple[float, float | None]:
    """Return ||D|| and the effective rank of D, for an update with factors. None if float64 overflows."""
    S = update.singular_values(singular_values)
    assert S is not None, "an update with a rank has factors"
    norm = float(np.linalg.norm(S))
    if not np.isfinite(S).all():
        return sys.float_info.max, None
    return norm if math.isfinite(norm) else sys.float_info.max, float(effective_rank(S).mean())


def _zero_updates(details: Mapping[str, ModuleReport]) -> list[str]:
    """Return problems with updates of 0: such an adapter was not trained, or was saved before training."""
    zero = [name for name, each in details.items() if each.norm == 0 and each.rank]
    if not zero:
        return []
    what = "B @ A" if {details[name].kind for name in zero} <= {"lora", "experts", "dora"} else "the change"
    if len(zero) == len(details):
        dora = any(each.kind == DoRA.kind for each in details.values())  # whose magnitudes may say something else
        return [f"it {'was never trained' if dora else 'changes nothing'}: {what} is 0 in every module"]
    return [f"{what} is 0 in {len(zero):,} of {len(details):,} modules: {_shortened(zero)}"]


def _config_problems(adapter: Adapter) -> list[str]:
    """Return problems with modules that the config names and the file does not have, and vice versa."""
    problems = _unused_patterns(adapter)
    targets = adapter.config.peft.get("target_modules")
    if not targets or targets == "all-linear":
        return problems
    modules = [m for m, u in adapter.updates.items() if u.rank and not u.cls.stack and m.count(".experts.") == 0]
    # an attention's out_proj comes along with the attention
    unmatched = [m for m in modules if not any(map(adapter.config.targets.has, (m, m.rpartition(".")[0])))]
    if adapter.config.peft.get("target_parameters"):
        unmatched = []  # a parameter's factors stand at its module, which need be no target
    if unmatched:
        problems.append(f"target_modules does not match {len(unmatched)} modules: {_shortened(unmatched)}")
    listed = [each for each in targets if isinstance(each, str)] if isinstance(targets, list) else []
    paths = (path for module, update in adapter.updates.items() for path in (module, update.target))
    path_ends = {end for path in paths for end in endings(path)}
    unused = [target for target in listed if target not in path_ends]
    if unused and not adapter.config.peft.get("target_parameters"):
        problems.append(f"target_modules has {_shortened(unused)}, which matches no module of the file")
    return problems


def _unused_patterns(adapter: Adapter) -> list[str]:
    """Return problems with entries of rank_pattern and alpha_pattern that match no module: the default applies then."""
    paths = [path for m, u in adapter.updates.items() if u.rank or u.fault for path in (m, f"{m}.weight")]
    problems = []
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(adapter.config, key)
        compiled = Patterns(patterns)
        used = {pattern for path in paths for pattern in compiled.matching(path)}
        problems += [f"{key} has {each}, which matches no module of the file" for each in patterns if each not in used]
    return problems


def _shortened(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _groups(adapter: Adapter, details: Mapping[str, ModuleReport]) -> list[AdapterGroup]:
    """Group updates whose names differ only in numbers, in the order of each group's first module."""
    members: dict[tuple[object, ...], list[tuple[UpdateSpec, tuple[int, ...]]]] = {}
    for module, update in adapter.updates.items():
        parts, numbers = split_numbers(module, underscores=adapter.flattened)
        specs = tuple(update.specs.values())
        key = (parts, update.kind, update.rank, update.scale, update.shape, specs)
        members.setdefault(key, []).append((update, numbers))
    groups = []
    for group in members.values():
        update, _ = group[0]
        parts, _ = split_numbers(update.module, underscores=adapter.flattened)
        measured = [details[each.module] for each, _ in group]
        norms = [each.norm for each in measured if each.norm is not None]
        groups.append(
            AdapterGroup(
                name=with_ranges(parts, [numbers for _, numbers in group]),
                kind=update.kind,
                modules=len(group),
                rank=update.rank,
                alpha=_alpha(adapter, update),
                scale=update.scale,
                shape=update.shape,
                dtype=next(iter(update.specs.values())).dtype,
                parameters=len(group) * sum(spec.size for spec in update.specs.values()),
                norm=min(math.hypot(*norms), sys.float_info.max) if norms else None,
                effective_rank=_mean([each.effective_rank for each in measured]),
                relative=_mean([each.relative for each in measured]),
            )
        )
    return groups


def _alpha(adapter: Adapter, update: UpdateSpec) -> float | None:
    """Return the alpha of an update. None if the file could have one and does not, so that alpha is the rank."""
    divisor = update.cls.divisor(update)
    if not divisor or update.fault or (update.scale == 1 and _has_no_alphas(adapter)):
        return None
    return update.scale * (math.sqrt(divisor) if adapter.config.use_rslora else divisor)


def _has_no_alphas(adapter: Adapter) -> bool:
    in_tensors = FORMATS[adapter.format].can.alpha == "tensor"
    return in_tensors and not any(name.endswith(".alpha") for name in adapter.file.specs)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
