"""Convert files of trainers that name or pack tensors in other ways, mostly experts, to PEFT's current form.

unsloth trains GPT-OSS as linear layers, one for each expert: `mlp.experts.gate_up_projs.3.lora_A.weight`. tinker has
stacks w1, w2, w3 of (experts, rank, in) and (experts, out, rank); all experts may share one of the two. Its other names
differ too. Megatron-Bridge packs stacks in another order. Sources: unsloth_zoo 2026.10 (`saving_utils.py`,
`_fold_perexpert_lora_into_fused`), tinker_cookbook 0.6 (`weights/_merge_utils.py`, `weights/_merge_gpt_oss.py`,
`weights/_merge_nemotron.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...architectures.prefixes import PEFT_PREFIX
from ...errors import InputError
from ...files.weights_file import WeightsFile
from ..patterns import Patterns
from .joined_factors import Pair, Today, join, put_tensor, stack_pairs, with_stacks
from .made_tensors import MadeTensor, copied, made_of

_SINGLE = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)s\.(\d{1,4})\.(.+)")
_STACKED = re.compile(r"(.+\.experts)\.(w[123])\.lora_([AB])\.weight")
_OF_QKV = re.compile(r"(.+\.in_proj_)[qkv]\.lora_[AB]\.weight")
_OF_GPT_OSS = re.compile(r"(\.layers\.\d+)\.attn\.(?=[qkvo]_proj\.)")

# fields of the config that Megatron-Bridge writes beside stacks of experts, in this order
BRIDGES_FIELDS = tuple(
    """peft_type auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights lora_alpha
    lora_dropout modules_to_save r rank_pattern alpha_pattern target_modules task_type use_dora use_rslora
    target_parameters""".split()
)

MOST = 1024  # experts of a stack, all of which are allocated; GPT-OSS has up to 128

# tinker's stacks -> an expert's modules in transformers; Nemotron's experts have no gate, and w3 is empty
GATED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
UNGATED = {"w1": "up_proj", "w2": "down_proj"}


def unsloths(file: WeightsFile, fields: Mapping[str, Any], model: Mapping[str, Any]) -> Today | None:
    """Convert unsloth's single experts of GPT-OSS to PEFT's stacks, with zeros for experts without factors.

    Raises:
        InputError: experts differ in rank or shape, the model has fewer, or an expert has tensors of another method.
    """
    if not any("_projs." in name for name in file.specs):
        return None
    single: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    tensors: dict[str, MadeTensor] = {}
    for name in file.specs:
        match = _SINGLE.fullmatch(name)
        if match is None:
            tensors[name] = copied(file, name)
        elif match[4] not in ("lora_A.weight", "lora_B.weight"):
            raise InputError("is of a single expert of a stack, but is not a LoRA factor", culprit=name)
        else:
            single.setdefault((match[1], match[2]), {}).setdefault(int(match[3]), {})[match[4][5]] = name
    if not single:
        return None
    last = max(number for experts in single.values() for number in experts)
    count = model.get("num_local_experts", last + 1)
    if type(count) is not int or not last < count <= MOST:
        most = f"the model has {count}" if "num_local_experts" in model else f"at most {MOST} experts are read"
        raise InputError(f"has an expert {last}, but {most}", culprit=str(file.path))
    _refuse_alphas(file, fields)
    stacks: dict[str, dict[str, Pair]] = {}
    ranks = Patterns(fields.get("rank_pattern") or {})
    for (stem, parameter), experts in single.items():
        for roles in experts.values():
            if set(roles) != {"A", "B"}:
                raise InputError("has no partner", culprit=next(iter(roles.values())))
        pairs = {n: Pair(copied(file, roles["A"]), copied(file, roles["B"])) for n, roles in experts.items()}
        stated_ranks = {
            ranks.value(f"{stem.removeprefix(PEFT_PREFIX)}.{parameter}s.{n}", fields.get("r")) for n in experts
        }
        stacks.setdefault(stem, {})[parameter] = stack_pairs(f"{stem}.{parameter}", pairs, count, stated_ranks)
    return with_stacks(tensors, stacks, count, fields)


def tinkers(file: WeightsFile, fields: Mapping[str, Any], model: Mapping[str, Any]) -> Today | None:
    """Convert tinker's files to transformers' names, and its stacks to single experts (of GPT-OSS, to PEFT's stacks).

    Raises:
        InputError: a stack's factors do not belong together.
    """
    by_stem: dict[str, dict[str, dict[str, str]]] = {}
    for name, spec in file.specs.items():
        match = _STACKED.fullmatch(name) if ".experts.w" in name and len(spec.shape) == 3 else None
        if match:
            by_stem.setdefault(match[1], {}).setdefault(match[2], {})[match[3]] = name
    is_tinkers = bool(by_stem) or any(".unembed_tokens." in name or _OF_QKV.fullmatch(name) for name in file.specs)
    others = [name for name in file.specs if ".attn." in name and _OF_GPT_OSS.search(name)]
    of_gpt_oss = model["model_type"] == "gpt_oss" if "model_type" in model else is_tinkers and bool(others)
    if not is_tinkers and not (of_gpt_oss and others):
        return None
    _refuse_alphas(file, fields)
    taken = {key for stacks in by_stem.values() for roles in stacks.values() for key in roles.values()}
    tensors: dict[str, MadeTensor] = {}
    for name in file.specs:
        if name not in taken:
            plain = _OF_GPT_OSS.sub(r"\1.self_attn.", name) if of_gpt_oss else name
            put_tensor(tensors, re.sub(r"(?:model\.)?unembed_tokens\.", "lm_head.", plain), copied(file, name))
    stacks: dict[str, dict[str, Pair]] = {}
    of = {
        stem: {each: _unstacked(file, roles) for each, roles in pairs_by_key.items()}
        for stem, pairs_by_key in by_stem.items()
    }
    counts = {len(experts) for pairs in of.values() for experts in pairs.values()} - {0}
    if len(counts) > 1:
        raise InputError(f"has stacks of {sorted(counts)} experts", culprit=str(file.path))
    count = max(counts, default=0)
    for stem, pairs in of.items():
        names = UNGATED if pairs.get("w3") == {} else GATED
        if of_gpt_oss:
            gates, ups = pairs.get("w1", {}), pairs.get("w3", {})
            both = {n: _interleaved(stem, gates.get(n), ups.get(n)) for n in range(count) if n in gates or n in ups}
            for parameter, pairs_by_key in (("gate_up_proj", both), ("down_proj", pairs.get("w2", {}))):
                if pairs_by_key:
                    stacks.setdefault(stem, {})[parameter] = stack_pairs(
                        f"{stem}.{parameter}", pairs_by_key, count, {fields.get("r")}
                    )
            continue
        for spelling, experts in pairs.items():
            for number, pair in experts.items():
                path = f"{stem}.{number}.{names[spelling]}"
                put_tensor(tensors, f"{path}.lora_A.weight", pair.A)
                put_tensor(tensors, f"{path}.lora_B.weight", pair.B)
    if stacks:
        return with_stacks(tensors, stacks, count, fields)
    tensors, fused = _with_fused_qkv(tensors)
    if fused and fields.get("use_rslora"):
        raise InputError("has q, k and v fused, but its rsLoRA scale is that of one of them", culprit=fused[0])
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name}
    more = {
        field: {f"^{re.escape(path)}": 3 * fields[default] for path in fused} if fields.get(default) is not None else {}
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    }
    ranks = {**more["rank_pattern"], **(fields.get("rank_pattern") or {})}
    return tensors, {**fields, **more, "rank_pattern": ranks, "target_modules": sorted(modules)}


def _with_fused_qkv(tensors: Mapping[str, MadeTensor]) -> tuple[dict[str, MadeTensor], tuple[str, ...]]:
    """Fuse q, k and v of Qwen3.5's linear attention: transformers has one matrix with the rows of q, then k, then v.

    Returns:
        The tensors, and the paths of the fused modules.

    Raises:
        InputError: one of the three is missing, or they are not low-rank pairs of equal input size and type.
    """
    stems = {match[1]: None for name in tensors if (match := _OF_QKV.fullmatch(name))}
    fused = dict(tensors)
    for stem in stems:
        names = [[f"{stem}{each}.lora_{side}.weight" for side in "AB"] for each in "qkv"]
        if not fused.keys() >= {name for both in names for name in both}:
            raise InputError(
                "is one of q, k and v, which are one matrix in transformers, but not all are there", culprit=stem
            )
        pairs = [Pair(fused.pop(A), fused.pop(B)) for A, B in names]
        shapes = [(pair.A.spec.shape, pair.B.spec.shape) for pair in pairs]
        dtypes = {(pair.A.spec.dtype, pair.B.spec.dtype) for pair in pairs}
        if (
            len({A[1:] for A, _ in shapes}) > 1
            or len(dtypes) > 1
            or any(len(A) != 2 or len(B) != 2 or A[0] != B[1] for A, B in shapes)
        ):
            raise InputError("has q, k and v that do not belong together", culprit=stem)
        ends = [sum(pair.B.spec.shape[0] for pair in pairs[: n + 1]) for n in range(3)]
        joined = join([(p, slice(end - p.B.spec.shape[0], end)) for p, end in zip(pairs, ends, strict=True)], ends[-1])
        put_tensor(fused, f"{stem}qkv.lora_A.weight", joined.A)
        put_tensor(fused, f"{stem}qkv.lora_B.weight", joined.B)
    return fused, tuple(f"{stem}qkv".removeprefix(PEFT_PREFIX) for stem in stems)


def bridges(file: WeightsFile, fields: Mapping[str, Any], model: Mapping[str, Any]) -> Today | None:
    """Convert Megatron-Bridge's stacks of experts to PEFT's order.

    Megatron-Bridge swaps A and B, transposed. Both are in order of expert, then rank; PEFT's B is by rank, then expert
    (`_pack_target_parameter_adapter_weights` of NVIDIA-NeMo/Megatron-Bridge of August 2026,
    `models/conversion/peft_bridge.py`). Its config has these fields in this order, without `peft_version`.

    Raises:
        InputError: a stack does not divide into experts, or is of GPT-OSS, whose gates and ups have another order.
    """
    listed = fields.get("target_parameters")
    if tuple(fields) != BRIDGES_FIELDS or not isinstance(listed, list) or not all(isinstance(p, str) for p in listed):
        return None
    _refuse_alphas(file, fields)
    is_gpt_oss = "gpt_oss" in f"{model.get('model_type')} {fields['base_model_name_or_path']}".lower().replace("-", "_")
    ranks = Patterns(fields["rank_pattern"] or {})
    stacks: dict[str, dict[str, Pair]] = {}
    tensors, counts = {name: copied(file, name) for name in file.specs}, set()
    for path in listed:
        owner, _, parameter = path.rpartition(".")
        if is_gpt_oss and parameter == "gate_up_proj":
            raise InputError("has gates and ups of GPT-OSS in another order than its model's", culprit=path)
        stem = f"{PEFT_PREFIX}{owner}"
        wrapper = stem + ".base_layer" * sum(each.rpartition(".")[0] == owner and each < path for each in listed)
        names = [f"{wrapper}.lora_{side}.weight" for side in "AB"]
        if not tensors.keys() >= {*names}:
            raise InputError("is a target of the config, but the file has no factors of it", culprit=path)
        pairs = _packed(file, path, names[0], names[1], ranks.value(path, fields["r"]))
        stacks.setdefault(stem, {})[parameter] = stack_pairs(path, pairs, len(pairs), ())
        counts.add(len(pairs))
        tensors = {name: tensor for name, tensor in tensors.items() if name not in names}
    if len(counts) != 1:
        raise InputError(f"has stacks of {sorted(counts)} experts", culprit=str(file.path))
    return with_stacks(tensors, stacks, counts.pop(), fields)


def _packed(file: WeightsFile, path: str, A_name: str, B_name: str, rank: Any) -> dict[int, Pair]:
    """Return each expert's factors of a stack of Megatron-Bridge: A comes from its B, and B from its A."""
    A, B = file.specs[A_name].shape, file.specs[B_name].shape
    fits = len(A) == len(B) == 2 and A[0] == B[1] and 0 not in (*A, *B)
    if type(rank) is not int or rank < 1 or not fits or A[0] % rank:
        raise InputError(f"A is {A} and B is {B}: not experts of rank {rank}", culprit=path)

    def one(place: slice) -> Pair:
        ours = made_of(file, B_name, (rank, B[0]), lambda packed: packed[:, place].T)
        return Pair(ours, made_of(file, A_name, (A[1], rank), lambda packed: packed[place].T))

    return {number: one(slice(number * rank, (number + 1) * rank)) for number in range(A[0] // rank)}


def _refuse_alphas(file: WeightsFile, fields: Mapping[str, Any]) -> None:
    """Raise InputError for a config with alphas of single modules, because modules are renamed."""
    if fields.get("alpha_pattern"):
        raise InputError("has an alpha_pattern with names that only its trainer knows", culprit=str(file.path))


def _unstacked(file: WeightsFile, roles: Mapping[str, str]) -> dict[int, Pair]:
    """Return the factors of each expert; a stack of one is shared by all. The result is empty for empty stacks.

    Raises:
        InputError: a factor is missing, or A and B have different numbers of experts.
    """
    if set(roles) != {"A", "B"}:
        raise InputError("has no partner", culprit=next(iter(roles.values())))
    A, B = (file.specs[roles[side]].shape for side in "AB")
    if 0 in A and 0 in B:
        return {}
    count = max(A[0], B[0])
    if 0 in (*A, *B):  # the count of an empty tensor costs no byte, so it could be any number
        raise InputError(f"is {A}, and its B {B}: one of the two is empty", culprit=roles["A"])
    if count == 1 or {A[0], B[0]} - {1, count}:
        raise InputError(f"is of {A[0]} experts, and its B of {B[0]}", culprit=roles["A"])

    def one(side: str, shape: tuple[int, ...], number: int) -> MadeTensor:
        place = number if shape[0] > 1 else 0
        return made_of(file, roles[side], shape[1:], lambda stack: stack[place])

    return {number: Pair(one("A", A, number), one("B", B, number)) for number in range(count)}


def _interleaved(stem: str, gate: Pair | None, up: Pair | None) -> Pair:
    """Return the fused factors of gate and up with alternating rows; raise InputError for different shapes."""
    halves = {place: half for place, half in ((0, gate), (1, up)) if half}
    if len({(half.A.spec, half.B.spec) for half in halves.values()}) > 1:
        raise InputError("has gates and ups of different shapes", culprit=stem)
    rows = next(iter(halves.values())).B.spec.shape[0]
    return join([(half, slice(place, None, 2)) for place, half in halves.items()], 2 * rows)
