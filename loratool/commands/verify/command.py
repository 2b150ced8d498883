"""Verify tensor by tensor that a model is this base merged with these adapters, and diagnose what is wrong.

All files are streamed. A tensor is exact if it has the bits of our replay of the merge. It is right with another
rounding if one way of `roundings.ROUNDINGS` explains all of its weights. Else it is wrong, and `diagnosis.diagnose`
describes the fault: of a few tensors from all weights, of the others from a sample of rows, since a no would take many
times as long as a yes. `codes` judges quantized weights. If another program chose the codes, it only measures the share
of the delta that they keep. Verdicts are independent, so torchrun's ranks share the tensors, and rank 0 sums up.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from ...adapters.adapter import Adapter
from ...architectures.config_tensors import declared_class
from ...architectures.ties import COPIES
from ...binding.merge.merge_plan import MergePlan, plan_merge
from ...binding.merge.repeated_layers import notes_on_layers
from ...binding.modules.module_weights import spell_weight
from ...binding.modules.selection import Selection
from ...binding.names.base_names import notes_on_base
from ...binding.ties.tied_weights import stored_copies
from ...binding.ties.ties import find_tie
from ...errors import InputError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.codecs.quantized import CACHE_SCALES, SCALED_FILE
from ...files.dtypes import FLOATS, TORCH_FLOATS, TensorSpec
from ...files.tensor_compare import same_values
from ...files.tensor_ref import TensorRef
from ...files.weights_file import WeightsFile, require_unchanged
from ...numerics.arrays import rounded_to
from ...numerics.forms import F32, FORMS, Form
from ...streaming.forked import chosen
from ...streaming.parallel import Progress, worker_count
from ...streaming.ranks import Job, current_job
from ...streaming.segment import UpdateLoader
from ...streaming.workers import run_threads
from ...views.parts.numbers import plural
from ...views.verify import Misfit, TensorVerdict, VerifyReport
from ..adapter_requests import parse_adapters
from ..arguments import parse_words
from ..cards import described_call, input_word, weighted_word
from ..inputs import open_inputs, refuse_adapter, require_residual_base, subtract_initial
from .call import Verify
from .codes import describe_share, judge_codes
from .diagnosis import Sketches, Sums, describe_ulps, diagnose
from .replay import KeptUpdates, PickedWeights, Replay, has_terms_alone
from .rounding_bounds import Predictions
from .roundings import cast_wide
from .trial import TrialOutcome, max_ulps_off, try_roundings, try_single_rounding

BUFFERS = re.compile(
    r"(^|[./])(position_ids|(original_)?inv_freq|masked_bias|causal_mask|relative_position_index|num_batches_tracked|"
    r"(encoder|decoder)\.version)$"
)

MASKS = re.compile(r"(^|[./])(attn|attention|crossattention)\.bias$")  # of shape (1, 1, n, n)

# Classes that have the heads of masked and causal language models.
_MASKED = "(ForPreTraining|ForMaskedLM|ForCausalLM|LMHeadModel)$"

_ROBERTAS = "(XLM)?Roberta|XLMRobertaXL|RobertaPreLayerNorm|Camembert|Data2VecText|Longformer|MPNet|Xmod"

_BERTS = "Albert|Bert|Ernie|MegatronBert|MobileBert|RemBert|RoCBert"

_OTHERS = "(ForMaskedLM|ForCausalLM|LMHeadModel|ForTokenClassification|ForQuestionAnswering)$"

# Names of a head's tensors -> the classes that have it; a pooler is in all classes but those seen without one.
HEADS = {
    r"cls\.seq_relationship\.": "(ForPreTraining|ForNextSentencePrediction)$",
    r"sop_classifier\.|discriminator_predictions\.": "ForPreTraining$",
    r"(cls\.|(lm|mask|generator)_)?predictions\.|generator_lm_head\.": _MASKED,
    r"vocab_(transform|layer_norm|projector)\.": _MASKED,
    r"lm_head\.(bias$|(dense|layer_norm|decoder)\.)": _MASKED,
    r"(\w+\.)?pooler\.": rf"^(?!({_BERTS}|{_ROBERTAS}){_OTHERS}|({_ROBERTAS})ForSequenceClassification$)",
}


def is_optional(name: str, shape: Sequence[int], architecture: str) -> bool:
    """Return whether a model of class `architecture` is complete without a tensor of this name and shape.

    Args:
        architecture: a class of transformers; empty if it is not known.
    """
    if BUFFERS.search(name) or (MASKS.search(name) and len(shape) == 4):
        return True
    classes = next((classes for names, classes in HEADS.items() if re.match(names, name)), None)
    return classes is not None and not re.search(classes, architecture)


EXAMINED = 1 << 17  # weights of wrong tensors that are examined in full at most, or this share of all:

EXAMINED_SHARE = 1 / 256

FEW = 1 / 256  # of a block's weights: if more differ from our replay, all roundings are tried on all weights

LITTLE = 0.5  # the share of a change that codes keep, below which a warning says so

NOTHING_REQUESTED = "the delta is zero everywhere: the base is equal to its merge with these adapters"


def run_verify(call: Verify) -> VerifyReport:
    """Prove that `merged` is `base` with `adapters` added, or report what is wrong."""
    with ExitStack() as opened:
        checkpoint, weighted = open_inputs(
            call.base, parse_adapters(call.adapters, parse_words(call.drop)), call.alpha, opened, deeper=True
        )
        if call.initial is None:
            require_residual_base(checkpoint, weighted)
        weighted = subtract_initial(weighted, call.initial, call.residual_base, opened)
        merged = open_checkpoint(call.merged)
        opened.callback(merged.close)
        refuse_adapter(merged, call.merged, "the last argument must be the merged model")
        _refuse_quantized(checkpoint, merged)
        selection = Selection.parse(call.target, call.exclude, call.layers)
        plan = plan_merge(checkpoint, weighted, selection, call.tied, widen=True)
        read = [*checkpoint.shards, *(adapter.file for adapter, _ in weighted), *merged.shards]
        sizes = {name: merged.specs[name].nbytes for name in plan.sources if name in merged.specs}
        inputs, job = [input_word(call.base), *map(weighted_word, weighted), input_word(call.merged)], current_job()
        job.agree("plan", _digest(described_call(call, inputs), read, sizes))
        findings_here = dict(
            _in_parallel(
                _TensorVerifier(plan, merged, call.exhaustive),
                sizes,
                job,
                call.workers or worker_count(),
                call.progress,
            )
        )
        require_unchanged(read)
        findings = _gathered(job, findings_here, sizes)
        return _report(plan, merged, findings, os.fspath(call.base), os.fspath(call.merged), parse_words(call.allow))


def _refuse_quantized(base: Checkpoint, merged: Checkpoint) -> None:
    """Raise InputError for a merged model that was quantized after the merge, to codes that cannot be read."""
    known = {tensor for weight in base.weights.values() for tensor in weight.tensors}
    for coded in merged.coded.values():
        if coded.fault and known & {*coded.tensors}:
            raise InputError(f"cannot be read in {merged.path}: {coded.fault}", culprit=coded.tensors[0])
    for name in sorted(merged.formats.keys() - base.formats.keys()):
        raise InputError(
            f"is quantized ({merged.formats[name]}), but not in {base.path}",
            culprit=name,
            remedy="verify the merged model before you quantize it",
        )


@dataclass
class _Finding:
    """The verdict on one tensor, with values for the totals of the report.

    Attributes:
        verdict: None for an untouched tensor that equals the base's.
        asked: whether its requested delta is not zero.
        moves: whether some replayed weight differs from the base's; if none does, a match proves nothing.
        recoded: <D, D> and <W' - W, D> of a weight with the base's scales.
    """

    verdict: TensorVerdict | None = None
    asked: bool = False
    moves: bool = False
    recoded: tuple[float, float] | None = None


def _digest(described: Mapping[str, str], read: Iterable[WeightsFile], sizes: Mapping[str, int]) -> str:
    """Return a digest of the inputs, which is the same on all ranks."""
    content = [described, [each.nbytes for file in read for each in file.members], list(sizes.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _in_parallel(
    verifier: _TensorVerifier, sizes: Mapping[str, int], job: Job, workers: int, progress: Progress | None
) -> Iterator[tuple[str, _Finding]]:
    """Yield this rank's tensors of `sizes` (in bytes), the largest first, with the findings."""
    names, total = sorted(sizes, key=sizes.__getitem__, reverse=True), sum(sizes.values())
    numbered = chosen(iter(names), job.numbers("tensors"))
    with closing(run_threads(numbered, lambda: verifier, workers, ahead=0)) as runs:
        for _, name, finding in runs:
            done = job.add("bytes", sizes[name])
            if progress:
                progress(done, total)
            yield name, finding


def _gathered(job: Job, findings_here: Mapping[str, _Finding], names: Iterable[str]) -> dict[str, _Finding]:
    """Return the findings of all ranks, in the order of `names`.

    Raises:
        RankDone: on all ranks but 0.
    """
    fields_by_name = {
        name: (each.verdict and asdict(each.verdict), each.asked, each.moves, each.recoded)
        for name, each in findings_here.items()
    }
    findings = dict[str, _Finding]()
    for text in job.gather("findings", json.dumps(fields_by_name)):
        for name, (verdict, *rest) in json.loads(text).items():
            misfit = verdict and verdict.pop("misfit")
            findings[name] = _Finding(verdict and TensorVerdict(**verdict, misfit=misfit and Misfit(**misfit)), *rest)
    return {name: findings[name] for name in names}


def _report(
    plan: MergePlan,
    model: Checkpoint,
    findings: Mapping[str, _Finding],
    base: str,
    merged: str,
    allow: tuple[str, ...],
) -> VerifyReport:
    missing = tuple(n for n in plan.sources if n not in model.specs and not _is_tied_on_load(plan, model, n))
    extra = tuple(name for name in model.specs if name not in plan.sources and not _is_copy(plan, model, name))
    idle = {n for n in missing if n not in plan.changed and _may_be_missing(model, n, plan.sources[n].spec)}
    idle |= {n for n in extra if _may_be_missing(plan.base, n, model.specs[n]) or _goes_with_codes(plan, model, n)}
    not_compared = tuple(name for name in (*missing, *extra) if name in idle)
    missing, extra = (tuple(name for name in names if name not in idle) for names in (missing, extra))
    tensors = tuple(each.verdict for each in findings.values() if each.verdict)
    count = {kind: sum(t.verdict == kind for t in tensors) for kind in ("exact", "rounding", "wrong")}
    status, asked = "proven", any(each.asked for each in findings.values())
    if count["wrong"] or missing or extra:
        status = "wrong"
    elif any(t.verdict == "requantized" for t in tensors) or (
        asked and not any(each.moves for each in findings.values()) and "inconclusive" not in allow
    ):
        status = "inconclusive"
    return VerifyReport(
        base=base,
        merged=merged,
        status=status,
        tensors=tensors,
        exact=count["exact"],
        rounded=count["rounding"],
        wrong=count["wrong"],
        untouched=len(findings) - len(tensors),
        rounding=tuple(dict.fromkeys(t.detail for t in tensors if t.verdict == "rounding")),
        missing=missing,
        extra=extra,
        not_compared=not_compared,
        warnings=(*plan.warnings, *_notes(findings.values())),
        left_out=tuple(name for adapter, _ in plan.adapters for name in adapter.excluded),
        adapters=tuple(_spelled(adapter, weight) for adapter, weight in plan.adapters),
        notes=(*notes_on_base(plan.base, [adapter for adapter, _ in plan.adapters]), *notes_on_layers(plan.base)),
        sha256={adapter.name: adapter.sha256 for adapter, _ in plan.adapters},
    )


def _spelled(adapter: Adapter, weight: float) -> str:
    """Return an adapter with its weights as a word of the command line."""
    weights = spell_weight(weight, adapter.module_weights)
    return adapter.name if weights == "1" else f"{adapter.name}:{weights}"


def _notes(findings: Collection[_Finding]) -> tuple[str, ...]:
    """Return notes on the whole delta."""
    if not any(each.asked for each in findings):
        return (NOTHING_REQUESTED,)
    recoded = [each.recoded for each in findings if each.recoded]
    asked, kept_sum = (math.fsum(sums) for sums in zip(*recoded, strict=True)) if recoded else (0.0, 0.0)
    if kept_sum < LITTLE * asked:
        return (
            f"the codes are right, but keep {describe_share(kept_sum / asked)} of the delta: merge with "
            "--quantized mixed, or into the original with --like",
        )
    return ()


def _may_be_missing(model: Checkpoint, name: str, spec: TensorSpec) -> bool:
    return is_optional(name, spec.shape, declared_class(model.config))


def _goes_with_codes(plan: MergePlan, merged: Checkpoint, name: str) -> bool:
    """Return whether a tensor is no weight, but a companion in quantized models: a marker, a cache's scale."""
    return bool(merged.weights) and not plan.base.weights and name.endswith((SCALED_FILE, *CACHE_SCALES))


def _is_tied_on_load(plan: MergePlan, merged: Checkpoint, name: str) -> bool:
    """Return whether a missing tensor equals one that loaders tie it to by config.json."""
    tie = find_tie(plan.base)
    if tie is None or find_tie(merged) is None:
        return False
    first = tie.stored_as(name)
    if first not in merged.specs or plan.placements.get(name) != plan.placements.get(first):
        return False
    first_ref, second_ref = plan.sources[first], plan.sources[name]
    return first_ref == second_ref or (name in stored_copies(plan.base, tie) and same_values(first_ref, second_ref))


def _is_copy(plan: MergePlan, merged: Checkpoint, name: str) -> bool:
    """Return whether an extra tensor is a tied matrix, or its bias, saved under another name."""
    tie = find_tie(plan.base)
    module, _, role = name.rpartition(".")
    if tie is None or module.split(".")[-1] not in COPIES:
        return False
    first = tie.embedding if role == "weight" else f"{module.rpartition('.')[0]}.{role}"
    if first not in plan.sources or first not in merged.specs or merged.specs[first] != merged.specs[name]:
        return False
    return same_values(merged.ref(name), merged.ref(first))


class _TensorVerifier:
    """A function from a tensor's name to its finding."""

    def __init__(self, plan: MergePlan, merged: Checkpoint, exhaustive: bool) -> None:
        self._plan, self._found = plan, merged
        self._load = UpdateLoader()
        self._kinds = _stored_types(plan, merged)
        self._sketches: Sketches = {}
        self._examined = {*plan.placements} if exhaustive else _drawn(plan)
        self._moves = False  # some finding has it

    @np.errstate(all="ignore")  # inf and nan
    def __call__(self, name: str) -> _Finding:
        finding = _Finding()
        finding.verdict = self._judge(name, finding)
        self._moves |= finding.moves
        return finding

    def _judge(self, name: str, finding: _Finding) -> TensorVerdict | None:
        """Return the verdict on a tensor, None for an untouched one equal to the base's, and fill its finding."""
        source, merged = self._plan.sources[name], self._found.ref(name)
        changed = name in self._plan.changed
        if changed and name not in self._plan.placements:
            finding.asked = finding.moves = True  # a replaced value always tells
        if source.spec.shape != merged.spec.shape:
            return TensorVerdict(name, "wrong", f"its shape is {merged.spec.shape}, but should be {source.spec.shape}")
        floats = source.spec.dtype in FLOATS and merged.spec.dtype in FLOATS
        if merged.weight and floats and source.spec.size:
            return self._judge_codes(name, merged, finding)
        if not floats or not source.spec.shape or not source.spec.size:
            same = source.spec == merged.spec and source.file.read(source.name) == merged.file.read(name)
            if same:
                return TensorVerdict(name, "exact", "") if changed else None
            return TensorVerdict(name, "wrong", "its values differ from those of the base or the adapter")
        load = KeptUpdates(self._load)
        replay = Replay(source, self._plan.placements.get(name, ()), load)
        off = self._compare(replay, load, merged, finding)
        if not off.wrong and not changed:
            return self._as_stored(name, source, merged, off.unsupported)
        if not off.wrong:
            return TensorVerdict(name, "exact", "")
        if source.weight and not changed and _decoded_in_float32(replay, merged):
            return TensorVerdict(name, "rounding", "codes dequantized in float32, then rounded")
        if name not in self._plan.placements:
            what = "the adapter's value" if changed else "an untouched tensor"
            return TensorVerdict(
                name, "wrong", f"{plural(off.wrong, 'weight')} of {what} altered, {describe_ulps(off.ulps)}"
            )
        stored = self._stored(name, source, merged)
        few = try_single_rounding(off.picked, replay, off.predictions) if off.picked and not stored else None
        if few and few.title:
            return TensorVerdict(name, "rounding", few.title)
        spans = () if name in self._examined else replay.drawn(name)
        sample = [*replay.blocks(merged, spans)] if spans else []
        if any(map(off.predictions.rule_out, off.picked if spans and few else sample)):
            trial = TrialOutcome(None, few.outside if few else off.wrong, few.beyond if few else off.ulps)
        else:
            spans, sample, trial = (), [], try_roundings(replay, merged, load, stored)
        if trial.title is not None:
            return TensorVerdict(name, "rounding", trial.title)
        if trial.outside == off.wrong:
            trial = replace(trial, beyond=off.ulps)
        sums = Sums()
        for block in sample or replay.blocks(merged):
            sums.add(block)
        fault = diagnose(self._plan, name, merged, trial, sums, self._sketches, spans)
        return TensorVerdict(name, "wrong", fault, sums.misfit(off.wrong / merged.spec.size, off.ulps))

    def _judge_codes(self, name: str, merged: TensorRef, finding: _Finding) -> TensorVerdict | None:
        judged = judge_codes(self._plan, name, merged, self._load, self._moves)
        finding.asked |= judged.asked > 0 and any(each.weight for each in self._plan.placements.get(name, ()))
        finding.moves |= judged.moves and finding.asked
        if judged.kept is not None:
            finding.recoded = judged.asked, judged.kept
        return TensorVerdict(name, judged.verdict, judged.detail) if judged.verdict else None

    def _stored(self, name: str, source: TensorRef, merged: TensorRef) -> list[Form]:
        """Return the other float types of the weight, in the base and in adapters that replace it.

        For codes these are the types to which other programs dequantize.
        """
        base = self._plan.base.specs.get(name)
        kinds = [base.dtype] if base else []
        for placement in self._plan.requested.get(name, ()):
            if placement.update.base:
                kinds.append(placement.adapter.file.specs[placement.update.base].dtype)
        if source.weight:
            kinds += [merged.spec.dtype, "F32"]
        others = dict.fromkeys(kind for kind in kinds if kind != source.spec.dtype and kind in TORCH_FLOATS)
        return [FORMS[kind] for kind in others]

    def _as_stored(self, name: str, source: TensorRef, merged: TensorRef, unsupported: int) -> TensorVerdict | None:
        """Return the verdict on an untouched tensor with the base's values, by its type. None for the base's type.

        Args:
            unsupported: how many weights of the base the merged tensor's type cannot hold.
        """
        base_type, merged_type = source.spec.dtype, merged.spec.dtype
        if source.weight:
            return TensorVerdict(name, "exact", f"dequantized to {merged_type}, without a change")
        if base_type == merged_type:
            return None
        if self._kinds[base_type] == {merged_type}:
            return TensorVerdict(name, "rounding", f"stored as {merged_type}, but as {base_type} in the base")
        if unsupported:
            return TensorVerdict(
                name, "wrong", f"an untouched tensor was rounded to {merged_type}, but should be {base_type}"
            )
        return TensorVerdict(name, "rounding", f"{name} is stored as {merged_type}, but as {base_type} in the base")

    def _compare(self, replay: Replay, load: UpdateLoader, merged: TensorRef, finding: _Finding) -> _Differences:
        """Compare a tensor with its replay."""
        placements, found = replay.placements, _Differences(Predictions(replay, merged, load))
        asked = any(placement.weight for placement in placements)  # X has rounding noise
        is_simple = bool(placements) and all(map(has_terms_alone, placements))
        for block in replay.blocks(merged):
            out, stats = block.expected
            finding.asked |= asked and stats.change_squared > 0
            finding.moves |= stats.changed > 0
            if block.piece is None and out.form != block.base.form:
                found.unsupported += int(np.count_nonzero(out.wide() != block.base.wide()))
            off = out.bits != block.merged.bits
            if count := int(np.count_nonzero(off)):
                found.wrong += count
                found.ulps = max(found.ulps, max_ulps_off(out, block.merged, off))
                is_simple &= out.form.itemsize == 2 and block.piece is not None and count <= FEW * off.size
                found.picked.append(PickedWeights.of(block, off, found.predictions.deltas)) if is_simple else None
            is_simple &= not stats.not_finite and not stats.overflowed
        found.picked = found.picked if is_simple else []
        return found


@dataclass
class _Differences:
    """The weights of a tensor that differ from our replay.

    Attributes:
        wrong: how many.
        ulps: by how many at most.
        unsupported: how many weights of the base the merged tensor's type cannot hold.
        picked: all of them, if they are few and `try_single_rounding` can judge them.
    """

    predictions: Predictions
    wrong: int = 0
    ulps: float = 0.0
    unsupported: int = 0
    picked: list[PickedWeights] = field(default_factory=list)


def _drawn(plan: MergePlan) -> set[str]:
    """Return the tensors that are examined in full if they are wrong, drawn by their names."""
    sizes = {name: plan.sources[name].spec.size for name in plan.placements}
    left, drawn = max(EXAMINED, int(EXAMINED_SHARE * sum(sizes.values()))), set[str]()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] <= left:
            drawn.add(name)
            left -= sizes[name]
    return drawn


def _decoded_in_float32(replay: Replay, merged: TensorRef) -> bool:
    """Return whether all weights are those of a coded base, rounded to float32 first, as other programs dequantize."""
    return all(
        np.array_equal(rounded_to(cast_wide(block.base.wide(), F32), block.merged.form).bits, block.merged.bits)
        for block in replay.blocks(merged)
    )


def _stored_types(plan: MergePlan, merged: Checkpoint) -> dict[str, set[str]]:
    """Return each type in the base -> the types of those tensors in the merged model."""
    kinds: dict[str, set[str]] = {}
    for name in plan.sources:
        if name in merged.specs and not plan.sources[name].weight and name not in merged.weights:
            like = plan.base.specs.get(name) or plan.sources[name].spec
            kinds.setdefault(like.dtype, set()).add(merged.specs[name].dtype)
    return kinds
