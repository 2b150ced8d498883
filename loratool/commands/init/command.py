"""Run `init`: initialize an adapter from a base's files, by all published methods that need no data.

The adapter is planned from headers, and factors are computed one weight at a time. Methods that take their factors out
of the base also write the residual. It is the merge of the initial adapter with weight -1, so it streams, is rounded
once, and can be undone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from ...adapters.formats import open_adapter
from ...adapters.formats.content import AdapterContent
from ...adapters.formats.format import Format
from ...adapters.formats.peft import Peft
from ...adapters.formats.peft_config import CONFIG_NAME, WEIGHTS_NAMES
from ...adapters.updates.dora import DoRA
from ...architectures.prefixes import PEFT_PREFIX
from ...binding.merge.coded_bases import with_siblings
from ...binding.merge.merge_plan import plan_merge
from ...binding.modules.selection import Selection
from ...binding.names.class_names import ClassNames
from ...binding.names.peft_names import exclude_all, refuse_unsaid, target_modules
from ...binding.ties.ties import find_tie
from ...binding.weights.candidates import find_candidates
from ...binding.weights.model_weights import ModelWeight
from ...durable.fileio import require_free_space, sha256_file
from ...durable.partial import scratch_folder, scratch_path
from ...errors import InputError, NeedsFlag, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint, plain_dtype
from ...files.containers.safetensors_file import TensorFile
from ...files.dtypes import MERGE_DTYPES, TORCH_FLOATS, TensorSpec, with_dtype
from ...files.folder.side_files import INITIAL, provenance
from ...files.output.model_card import code, name_on_hub, read_licence, shown_name
from ...files.output.output import naming_output
from ...files.output.paths import check_output_name, check_output_path, check_scratch
from ...files.relaid import RelaidFile
from ...files.weights_file import paths_of
from ...numerics.arrays import Numbers
from ...numerics.merge import ARITHMETIC_VERSION
from ...streaming.parallel import choose_device, map_in_order, worker_count
from ...streaming.threads import one_thread
from ...transform.image_base import choose_format, is_image_adapter, require_language_model, weights_for_format
from ...views.init import InitReport, ModuleInit, ResidualReport
from ...views.parts.numbers import share
from ...views.parts.writing import command_line
from ..arguments import dtype_word, parse_count
from ..cards import encode_card, input_word, options_of, rank_range
from ..inputs import open_model, without_base_option
from ..merge.call import Merge
from ..merge.command import Beside, write_merged
from .call import Init
from .methods import INITS
from .starter import (
    AdaptedWeight,
    AdapterInitializer,
    adapter_config,
    assign_ranks,
    make_adapted_weights,
    plan_start,
    residual_errors,
)

RANK = 8

MOST_ALPHA = 1e30  # above it, or below its inverse, the factors leave float32's range

COARSE = 1e-5  # relative distance of residual + adapter from the base, above which the report says how to avoid it


def run_init(call: Init) -> InitReport:
    """Initialize an adapter for selected weights of a base, from its files alone."""
    budget = parse_count(call.params)
    _check_numbers(call.rank, budget, call.alpha)
    with ExitStack() as opened:
        opened.enter_context(one_thread())
        checkpoint, output_format = _open_trainable(call.base, call.to, opened)
        _check_method(call.method, call.residual, dtype_word(call.dtype), output_format, checkpoint)
        if call.dora and DoRA not in output_format.can.kinds:
            raise UsageError(f"{output_format.key} files cannot hold DoRA")
        path, is_file = output_format.output(call.out, "adapter")
        has_config = output_format.can.alpha == "config" and not is_image_adapter(checkpoint, output_format)
        inputs = paths_of(checkpoint.shards)
        exists = check_output_path(path, is_file, inputs, call.force, dry_run=call.dry_run)
        selection = Selection.parse(call.target or Init.target, call.exclude, call.layers)
        require_language_model(checkpoint, output_format, call.architecture)
        among = weights_for_format(checkpoint, output_format)
        in_model = ClassNames(checkpoint, call.architecture) if among is None else None
        candidates, left_out = find_candidates(checkpoint, selection, among, in_model)
        if has_config and in_model:
            refuse_unsaid(checkpoint, in_model, {each.name: each.in_model for each in candidates}, {})
        _check_kinds(candidates, call.method, call.dora)
        ranks = assign_ranks(candidates, call.rank or RANK, call.rank_pattern or {}, budget, call.method, call.dora)
        adapted_weights, layout = make_adapted_weights(candidates, ranks, call.alpha, call.rslora)
        starter = opened.enter_context(
            closing(
                AdapterInitializer(
                    checkpoint,
                    adapted_weights,
                    call.method,
                    call.seed,
                    call.dora,
                    choose_device(call.device),
                )
            )
        )
        belongs_on = os.fspath(call.base) if call.residual is None else os.path.abspath(call.residual)
        kind = in_model.chosen if in_model else None
        config = adapter_config(
            kind, belongs_on, layout, call.method, call.alpha, use_dora=call.dora, use_rslora=call.rslora
        )
        if in_model:
            config["target_modules"] = target_modules(checkpoint, in_model, layout.modules)
        work = _Initialization(call, checkpoint, adapted_weights, starter, config)
        output, notes = plan_start(checkpoint, output_format, adapted_weights, starter, config)
        words = options_of(call)

        def make() -> bytes:
            return _card((os.fspath(call.base), checkpoint), words, output_format.key, call.method, work.modules())

        specs = output.specs.values()
        parameters = sum(spec.size for spec in specs)
        if budget is not None and not has_config and parameters > budget:
            raise UsageError(
                f"--params {budget} is too small: with alphas and split modules, {output_format.key} needs {parameters}"
            )
        residual_report = None
        if call.residual is not None:
            residual_path = _check_residual(
                checkpoint,
                call.residual,
                path,
                MERGE_DTYPES[dtype_word(call.dtype)],
                call.undo,
                call.force or call.dry_run,
            )
            residual_report = work.write_residual(residual_path, (path, is_file), make if call.card else None)
        elif not call.dry_run:
            opened.enter_context(naming_output(path))
            output_format.write(path, is_file, replace(output, card=make if call.card else None), checkpoint.shards)
        absent = in_model.absent() if in_model and call.architecture else ()
        warnings = (*work.warnings(), *notes, *absent)
        return InitReport(
            base=os.fspath(call.base),
            out=str(path),
            method=call.method,
            dora=call.dora,
            rslora=call.rslora,
            dry_run=call.dry_run,
            modules=work.modules(),
            parameters=parameters,
            nbytes=sum(spec.nbytes for spec in specs),
            residual=residual_report,
            left_out=left_out,
            warnings=warnings,
            exists=exists,
        )


def _open_trainable(base: str | os.PathLike[str], to: str | None, opened: ExitStack) -> tuple[Checkpoint, Format]:
    """Open a model and choose its adapter's format. Raise an error for names that no trainer uses."""
    checkpoint = open_model(base, "init needs a model", opened)
    if checkpoint.is_gguf:
        message, remedy = "is a GGUF model, and no trainer uses its names", "convert it first"
        raise InputError(message, culprit=str(checkpoint.path), remedy=remedy)
    output_format = choose_format(checkpoint, to)
    if output_format.can.named_by_model:
        raise UsageError(f"no trainer reads {output_format.key} adapters: use --to peft")
    return checkpoint, output_format


def _card(
    base: tuple[str, Checkpoint], options: Sequence[str], library: str, method: str, rows: Sequence[ModuleInit]
) -> bytes:
    """Return the adapter's model card.

    Args:
        base: with the name that the user gave.
        options: words of the command.
    """
    given, model = base
    name, residual = input_word(given), "--residual" in options
    facts = [f"method {code(method)}, {rank_range(row.rank for row in rows)} in {len(rows)} modules, not trained yet"]
    facts += ["its base is the residual that the command writes, not the original model"] if residual else []
    commands = (
        command_line("init", name, *options, "-o", "adapter"),
        command_line("inspect", "adapter", "--base", "residual" if residual else name),
    )
    licence = read_licence(None if model.given_as_file else model.folder)
    bases = [] if residual else [name_on_hub(given)]
    return encode_card(f"A new adapter for {code(shown_name(given))}", library, bases, [licence], facts, commands)


def _check_method(
    method: str, residual: str | os.PathLike[str] | None, dtype: str, to: Format, base: Checkpoint
) -> None:
    if to.can.alpha != "config" and (INITS[method].mutates_base or INITS[method].field is not True):
        raise UsageError(f"{method} needs PEFT's format, since {to.key} files cannot store the method")
    if INITS[method].mutates_base and any(isinstance(shard, RelaidFile) for shard in base.shards):
        message = (
            f"is a GGUF model: {method} subtracts its factors from the base, and no residual can be written in GGUF"
        )
        raise InputError(message, culprit=str(base.path), remedy="convert it to a folder of transformers first")
    if INITS[method].mutates_base and residual is None:
        raise NeedsFlag(
            f"{method} subtracts its factors from the base", flags="--residual OUT", why="to write the residual"
        )
    if residual is None and dtype != "keep":
        raise UsageError(
            "--dtype is the dtype of the residual, but --residual is not given; factors are always float32"
        )
    if residual is not None and not INITS[method].mutates_base:
        raise UsageError(f"--residual is not needed: {method} does not change the base")


def _check_numbers(rank: int | None, params: int | None, alpha: float | None) -> None:
    if alpha is not None and not 1 / MOST_ALPHA <= alpha <= MOST_ALPHA:
        raise UsageError(f"alpha must be between {1 / MOST_ALPHA:.0e} and {MOST_ALPHA:.0e}")
    if rank is not None and params is not None:
        raise UsageError("rank and params exclude each other")


def _check_kinds(weights: Sequence[ModelWeight], method: str, dora: bool) -> None:
    """Raise UsageError for what PEFT would not load (`peft/tuners/lora/layer.py`: each layer's `lora_variants`)."""
    if method == "mica" and dora:
        raise UsageError("PEFT does not support DoRA with mica")
    refused = [each for each in weights if (each.bare and (dora or method == "mica"))]
    refused += [each for each in weights if each.kind == "conv" and method == "mica"]
    if refused:
        first, supported = refused[0], [each.paths[0] for each in weights if each not in refused]
        kinds = {"experts": "experts", "conv": "convolutions"}
        what = kinds.get(first.role, "a bare parameter")
        raise UsageError(
            f"PEFT does not support {'DoRA' if dora else method} for {what}",
            culprit=first.name,
            remedy=f"add {exclude_all([each.paths[0] for each in refused], supported)}",
        )


def _check_residual(
    base: Checkpoint, residual: str | os.PathLike[str], adapter: Path, dtype: str | None, undo: bool, force: bool
) -> Path:
    """Return the residual's path, after all checks that need no factors."""
    path, is_file = check_output_name(residual)
    if is_file:
        raise UsageError("--residual must be a folder, which also gets the initial adapter", culprit=str(path))
    check_output_path(path, False, paths_of(base.shards), force)
    check_scratch(path, paths_of(base.shards))
    adapter_path, others = adapter.resolve(), (path.resolve(), scratch_path(path).resolve())
    if any(adapter_path == other or adapter_path in other.parents or other in adapter_path.parents for other in others):
        raise UsageError("--residual and -o must be separate folders", culprit=str(adapter))
    plain = {name: spec for name, spec in base.specs.items() if name not in base.weights}
    cast = [name for name, spec in plain.items() if spec.dtype in TORCH_FLOATS and spec.dtype != dtype]
    if dtype and undo and cast:
        raise NeedsFlag(
            f"is {base.specs[cast[0]].dtype} in the base, and a change of dtype cannot be undone",
            culprit=cast[0],
            flags="--no-undo",
        )
    return path


class _Initialization:
    """The initial factors of each weight, their rows of the report, and the residual."""

    def __init__(
        self,
        call: Init,
        base: Checkpoint,
        adapted_weights: Sequence[AdaptedWeight],
        starter: AdapterInitializer,
        config: Mapping[str, object],
    ) -> None:
        self._call, self._base, self._adapted_weights, self._starter = call, base, adapted_weights, starter
        self._config, self._dtype = config, MERGE_DTYPES[dtype_word(call.dtype)]
        self._errors: dict[str, tuple[float, float]] = {}
        self._residual: ResidualReport | None = None
        self._bytes, self._total = 0, sum(adapted.weight.spec.nbytes for adapted in adapted_weights)
        starter.done = self._advance

    def _advance(self, nbytes: int) -> None:
        self._bytes += nbytes
        if self._call.progress:
            self._call.progress(self._bytes, self._total)

    def write_residual(
        self, place: Path, adapter: tuple[Path, bool], card: Callable[[], bytes] | None
    ) -> ResidualReport:
        """Write the residual base with the initial adapter in it, then the adapter, with DoRA's magnitudes."""
        size = self._residual_bytes()
        factors = sum(spec.nbytes for spec in self._starter.specs.values())
        require_free_space(place.absolute().parent, size + 2 * factors)
        require_free_space(adapter[0].absolute().parent, factors)
        if self._call.dry_run:
            return ResidualReport(str(place), size, None, self._dtypes(), None, None)
        with naming_output(place), scratch_folder(place) as scratch:
            initial = scratch / INITIAL
            config = {**self._config, "use_dora": False}
            content = AdapterContent(self._starter.specs, self._starter.load, config)
            Peft().write(initial, False, content, self._base.shards)
            self._residual = self._subtract(initial, place)
        with naming_output(adapter[0]), closing(TensorFile(place / INITIAL / WEIGHTS_NAMES[0])) as file:
            stored_key = {key.removeprefix(PEFT_PREFIX): key for key in file.specs}

            def load(key: str) -> Numbers:
                return file.numbers(stored_key[key]) if key in stored_key else self._starter.load(key)

            specs = {**self._starter.specs, **self._starter.magnitude_specs}
            Peft().write(*adapter, AdapterContent(specs, load, self._config, card=card), self._base.shards)
        return self._residual

    def _residual_bytes(self) -> int:
        """Return the size of the residual's tensors. Weights with factors, and those fused with them, are plain."""
        base = self._base
        coded = [n for each in self._adapted_weights for n in each.weight.names if n in base.weights]
        coded_names = base.weights.keys() - with_siblings(base, coded)
        plain = {n: TensorSpec(plain_dtype(base), s.shape) if n in base.weights else s for n, s in base.specs.items()}
        sizes = (
            base.nbytes_of(n) if n in coded_names else with_dtype(spec, self._dtype).nbytes for n, spec in plain.items()
        )
        return sum(sizes)

    def _subtract(self, initial: Path, place: Path) -> ResidualReport:
        with without_base_option():
            adapter = open_adapter(initial)
        with ExitStack() as opened:
            opened.callback(adapter.file.close)
            plan = plan_merge(self._base, ((adapter, -1.0),), Selection(), "untie")
            given = self._call
            call = Merge(given.base, (), dtype=given.dtype, device="cpu", undo=given.undo, force=given.force)
            report = write_merged(
                plan,
                call,
                (place, False),
                self._provenance(adapter.sha256, adapter.scales_sha256),
                {},
                beside=Beside(files={f"{INITIAL}/{name}": initial / name for name in (WEIGHTS_NAMES[0], CONFIG_NAME)}),
            )
            result = open_checkpoint(place)
            opened.callback(result.close)
            self._errors = residual_errors(plan, result)
        error, base = (math.fsum(side) for side in zip(*self._errors.values(), strict=True))
        return ResidualReport(
            str(place),
            report.nbytes,
            math.sqrt(error / base) if base else 0.0,
            self._dtypes(),
            report.undo,
            report.undo_bytes,
            report.left_behind,
        )

    def _dtypes(self) -> tuple[str, ...]:
        base, names = self._base, [name for adapted in self._adapted_weights for name in adapted.weight.names]
        types = {plain_dtype(base) if name in base.weights else base.specs[name].dtype for name in names}
        return (self._dtype,) if self._dtype else tuple(sorted(types))

    def _provenance(self, sha256: str, scales_sha256: str) -> str:
        """Return the provenance of the residual, with the hashes of the base's files."""
        paths = paths_of(self._base.shards)
        with closing(map_in_order(sha256_file, paths, worker_count())) as hashes:
            of = {path.name: digest for path, digest in zip(paths, hashes, strict=True)}
        facts = {
            "adapters": [{"scales_sha256": scales_sha256, "sha256": sha256, "weight": -1.0}],
            "arithmetic": ARITHMETIC_VERSION,
            "residual": {"method": self._call.method, "of": of},
        }
        return provenance("init", facts, self._base.metadata.get("loratool"))

    def modules(self) -> tuple[ModuleInit, ...]:
        rows = []
        for adapted in self._adapted_weights:
            name, shape = adapted.weight.name, adapted.weight.spec.shape
            both = [self._errors[n] for n in adapted.weight.names if n in self._errors]
            error, base = (math.fsum(side) for side in zip(*both, strict=True)) if both else (0.0, 0.0)
            rows.append(
                ModuleInit(
                    name,
                    adapted.weight.kind,
                    shape,
                    adapted.rank,
                    adapted.scale,
                    adapted.weight.parameters_per_rank * adapted.rank
                    + (adapted.magnitude.size if self._starter.magnitude_specs else 0),
                    self._starter.gaps.get(name) if self._call.method == "pissa" else None,
                    (math.sqrt(error / base) if base else 0.0) if both else None,
                )
            )
        return tuple(rows)

    def warnings(self) -> tuple[str, ...]:
        warnings = []
        tie = find_tie(self._base)
        if (
            tie
            and not tie.is_stored(self._base)
            and any(adapted.weight.name == tie.embedding for adapted in self._adapted_weights)
        ):
            others = ", ".join(name for name in tie.sides if name not in self._base.specs)
            warnings.append(f"{others} shares the matrix of {tie.embedding}; only the latter has an adapter")
        coded = [each for each in self._adapted_weights if not self._base.weights.keys().isdisjoint(each.weight.names)]
        if coded and INITS[self._call.method].mutates_base:
            warnings.append(
                f"{len(coded)} quantized weights with factors are dequantized in the residual, which needs more memory "
                "when you train on it"
            )
        residual = self._residual
        if residual and residual.error and residual.error > COARSE:
            warnings.append(
                f"residual + adapter differs from the base by {share(residual.error)}, from rounding to "
                f"{', '.join(residual.dtypes)}; --dtype fp32 --no-undo reduces this to 1e-7"
            )
        return tuple(warnings)
