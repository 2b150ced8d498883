"""Read LoRA of Megatron-Core's models: the states of Megatron-Bridge and NeMo (`torch_dist`), and of ms-swift.

A tensor is `decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight` (r, in) or `.linear_out.weight`
(out, r), for DoRA `.adapter.weight_magnitude` (out); in ms-swift `.lora_A.default.weight` and `.lora_B.`. Without a
number in the name, the layers are the first dimension. Experts are a dimension before the last two. CanonicalLoRA has
`.adapter.adapter_q.` for rows of a fused matrix. The scale is alpha / r.

A state joins the ranks of tensor parallelism. It does so in the wrong order where a saved tensor has gate and up and
does not know it, or does not have them and is taken for it: their order depends on the number of ranks, which is in the
run's settings beside it. Defined by NVIDIA-NeMo/Megatron-Bridge of August 2026, `peft/utils.py`, `peft/dora_layers.py`,
`peft/canonical_lora.py`; NVIDIA-NeMo/NeMo, `collections/llm/peft`; modelscope/ms-swift and mcore-bridge,
`tuners/lora.py`. Megatron-Bridge was run. Of NeMo and ms-swift, and of grouped experts and linear attention on several
ranks, the sources were only read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, final

from ...architectures.heads import Heads, first_count, heads_of, text_fields
from ...architectures.megatron import (
    CUT_INPUTS,
    DEFAULT,
    IN_PROJ,
    LAYER_NAMES,
    NEMO_1,
    QKV,
    LayerNames,
    LinearHeads,
    Runs,
    gate_up_paths,
    gate_up_rows,
    group_rows,
    joined_halves,
    linear_attention_rows,
    plain_path,
    row_count,
)
from ...errors import InputError, NeedsFlag
from ...files.folder.model_folder import read_json_file
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..updates.dora import DoRA
from ..updates.low_rank import LowRank
from .format import Capabilities, Format, ReadOptions
from .made_tensors import MadeTensor, block_at, rows_at
from .peft import read_as_peft
from .plain_yaml import read_plain_yaml

_TENSOR = re.compile(
    r"(.+)\.(?:adapter\.(?:adapter_(q|k|v|gate|up)\.)?(linear_in\.weight|linear_out\.weight(?:_[wv])?|weight_magnitude)"
    r"|lora_([AB])\.(?:\w+\.)?weight)"
)
_OF_NEMO_1 = re.compile(r"(.+\.adapter_layer\.lora_\w+_adapter)\.(linear_(?:in|out)\.weight)")
_MODULE = re.compile(r"(?:module\.|model\.|language_model\.)*(?:decoder\.layers\.(?:(\d{1,4})\.)?(.+)|(output_layer))")
_EXPERTS = re.compile(r"mlp\.experts\.(?:experts\.|local_experts\.)*(?:(\d{1,4})\.)?(linear_fc[12])")
_MARK = re.compile(
    r"\.adapter\.(?:adapter_\w+\.)?linear_(?:in|out)\.|\.adapter_layer\.lora_\w+_adapter\.linear_|"
    r"decoder\.layers\.(?:\d+\.)?(?:self_attention|mlp)\.(?:\w+\.)*linear_\w+\.lora_[AB]\."
)

# Between a module's name and its own weight, which only the state of a whole model has
_WRAPPED = ("", ".to_wrap", ".base_layer")

_ENDS = {
    "linear_in.weight": "A",
    "linear_out.weight": "B",
    "linear_out.weight_w": "B of gate",
    "linear_out.weight_v": "B of up",
    "weight_magnitude": "m",
    "A": "A",
    "B": "B",
}

_PEFT_ENDS = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}

EXPORT = "export it for PEFT with its trainer, as AutoBridge.save_hf_adapter of Megatron-Bridge does"

# Files of settings, of Megatron-Bridge, NeMo 2, ms-swift and NeMo 1
RUN, NEMO_2, SWIFT, NEMO_1_CONFIG = "run_config.yaml", "model.yaml", "args.json", "model_config.yaml"


@dataclass(frozen=True)
class _Settings:
    """What a run's settings say; 0, None or empty if there are none."""

    name: str = ""  # the file that they are from
    alpha: float | None = None
    rslora: bool = False
    ranks: int = 0  # of tensor parallelism
    expert_ranks: int = 0
    heads: Heads = field(default_factory=Heads)
    gated: bool = False  # q_proj has the gates of queries


@dataclass
class _Module:
    """The tensors of one module, over all layers if they are stacked."""

    stem: str  # its name in the file
    layer: int | None  # None if the layers are the first dimension
    module: str  # a module of Megatron-Core in a layer; "output_layer" outside of them
    expert: int | None  # None for all experts of a stack
    part: str  # "" or a row of a fused matrix: q, k, v, gate, up
    tensors: dict[str, str] = field(default_factory=dict)  # a value of _ENDS -> the tensor's name


@final
class Megatron(Format):
    """States with a model's factors under the names of Megatron-Core."""

    key = "megatron"
    title = "Megatron-Core, by Megatron-Bridge, NeMo or ms-swift: its torch_dist states, read only"
    can = Capabilities(
        kinds=frozenset({LowRank, DoRA}),
        writes=False,
        components="one",
        alpha="config",
        kernels=False,
        depends_on_base=True,
    )

    def claims(self, names: Iterable[str]) -> bool:
        return any(_MARK.search(name) for name in names)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: a tensor is of no known module, or its rows are in an order that cannot be told.
            NeedsFlag: alpha or the model's heads are unknown.
        """
        settings = _settings_of(file)
        model_type = text_fields(options.model).get("model_type")
        names = LAYER_NAMES.get(str(model_type)) if model_type else DEFAULT
        if names is None:
            raise InputError(
                f"is for {model_type}, whose modules in Megatron-Core are not known",
                culprit=name,
                remedy=EXPORT,
            )
        modules, notes = _modules_of(name, file)
        reader = _Reader(name, file, settings, names, options)
        tensors: dict[str, MadeTensor] = {}
        for module in modules:
            tensors |= reader.read(module)
        ranks = Counter(each.spec.shape[0] for path, each in tensors.items() if path.endswith(_PEFT_ENDS["A"]))
        usual = ranks.most_common(1)[0][0]
        fields: dict[str, Any] = {
            "r": usual,
            "rank_pattern": {
                f"^{re.escape(path.removesuffix('.' + _PEFT_ENDS['A']))}": each.spec.shape[0]
                for path, each in tensors.items()
                if path.endswith(_PEFT_ENDS["A"]) and each.spec.shape[0] != usual
            },
            "use_dora": any(path.endswith(_PEFT_ENDS["m"]) for path in tensors),
            "use_rslora": settings.rslora,
        }
        if settings.alpha is not None:
            fields["lora_alpha"] = settings.alpha
        return read_as_peft(self.key, name, file, tensors, fields, options, notes)


def _modules_of(name: str, file: WeightsFile) -> tuple[list[_Module], tuple[str, ...]]:
    """Return the modules of a file, and a sentence on its base's tensors, if it has them.

    Raises:
        InputError: a tensor is not of an adapter, and the file does not show that it was not trained.
    """
    modules: dict[tuple[str, str], _Module] = {}
    others = []
    for tensor in file.specs:
        if tensor.endswith("._extra_state"):  # of Transformer Engine, for its own codes
            continue
        old, match = _OF_NEMO_1.fullmatch(tensor), _TENSOR.fullmatch(tensor)
        if old:
            stem, part, end = old[1], "", old[2]
        elif match:
            stem, part, end = match[1], match[2] or "", match[3] or match[4]
        else:
            others.append(tensor)
            continue
        if (stem, part) not in modules:
            modules[stem, part] = _module(tensor, stem, part)
        modules[stem, part].tensors[_ENDS[end]] = tensor
    if not others:
        return list(modules.values()), ()
    trained = next((each for each in others if ".modules_to_save." in each), None)
    base = {*others}
    if trained or any(base.isdisjoint(f"{stem}{mark}.weight" for mark in _WRAPPED) for stem, _ in modules):
        culprit = trained or others[0]
        raise InputError("is not a factor, and may have been trained too", culprit=culprit, remedy=EXPORT)
    return list(modules.values()), (f"{len(others)} tensors of its base are in {name} too, and are not read",)


def _module(tensor: str, stem: str, part: str) -> _Module:
    match = _MODULE.fullmatch(stem)
    if not match:
        raise InputError("is not of a layer of a language model", culprit=tensor, remedy=EXPORT)
    layer, inner, head = match.groups()
    if head:
        return _Module(stem, -1, head, None, part)
    of_expert = _EXPERTS.fullmatch(inner)
    module = f"mlp.experts.{of_expert[2]}" if of_expert else NEMO_1.get(inner, inner)
    expert = int(of_expert[1]) if of_expert and of_expert[1] else None
    return _Module(stem, int(layer) if layer else None, module, expert, part)


@dataclass(frozen=True)
class _Target:
    """A module of transformers, and its rows in the tensors of a fused one; None for all."""

    path: str  # in a layer
    rows: Runs | None = None  # of B
    magnitudes: Runs | None = None
    B: str = "B"  # a value of _ENDS


class _Reader:
    """Make PEFT's tensors of a state's modules."""

    def __init__(
        self, name: str, file: WeightsFile, settings: _Settings, names: LayerNames, options: ReadOptions
    ) -> None:
        self._name, self._file, self._settings, self._names, self._options = name, file, settings, names, options

    def read(self, module: _Module) -> dict[str, MadeTensor]:
        """Return a module's tensors under PEFT's names, of each layer and expert.

        Raises:
            InputError, NeedsFlag: as `Megatron.read`.
        """
        tensors, specs = module.tensors, self._file.specs
        both = ["B"] if "B" in tensors else ["B of gate", "B of up"]
        if missing := [end for end in ("A", *both) if end not in tensors]:
            raise InputError(f"has no {missing[0]} beside it", culprit=next(iter(tensors.values())))
        stacked = module.layer is None
        of_experts = module.module.startswith("mlp.experts.") and module.expert is None
        counts: dict[str, list[int]] = {"layers": [], "experts": []}
        for end, tensor in tensors.items():
            shape = list(specs[tensor].shape)
            lead = len(shape) - (1 if end == "m" else 2)
            if stacked and lead > 0:
                counts["layers"].append(shape[0])
            if lead == stacked + 1 and of_experts:
                counts["experts"].append(shape[stacked])
            elif lead != stacked:
                raise InputError(f"is {specs[tensor]}, which is no factor of {module.module}", culprit=tensor)
        if any(len({*each}) > 1 for each in counts.values()):
            raise InputError(f"has factors of other {counts}", culprit=module.stem)
        layers = range(counts["layers"][0]) if stacked else [module.layer or 0]
        experts: Iterable[int | None] = [module.expert]
        if of_experts:
            experts = range(counts["experts"][0]) if counts["experts"] else self._experts(module)
        made: dict[str, MadeTensor] = {}
        for layer, expert in product(layers, experts):

            def block(end: str, layer: int = layer, expert: int | None = expert) -> MadeTensor:
                lead = len(specs[tensors[end]].shape) - (1 if end == "m" else 2)
                index = ([layer] if stacked else []) + ([expert] if expert is not None else [])
                return block_at(self._file, tensors[end], index[:lead])

            for target in self._targets(module, block(both[0]).spec.shape[0]):
                root = "" if module.module == "output_layer" else f"model.layers.{layer}."
                path = root + target.path.format(expert=expert)
                B = block(target.B)
                made[f"{path}.{_PEFT_ENDS['A']}"] = block("A")
                made[f"{path}.{_PEFT_ENDS['B']}"] = B if target.rows is None else rows_at(B, target.rows)
                if "m" in tensors:
                    m = block("m")
                    made[f"{path}.{_PEFT_ENDS['m']}"] = (
                        m if target.magnitudes is None else rows_at(m, target.magnitudes)
                    )
        return made

    def _experts(self, module: _Module) -> range:
        """Return the experts that share a pair of factors without their dimension, as older versions saved it."""
        fields = text_fields(self._options.model)
        count = first_count(fields, "num_experts", "num_local_experts", "n_routed_experts")
        if not count and not self._options.lenient:
            raise self._needs_base(f"{module.stem}: is shared by all experts; their number is in")
        return range(count or 1)

    def _targets(self, module: _Module, rows: int) -> list[_Target]:
        """Return the modules of transformers whose rows a module has; `rows` are those of its B.

        Raises:
            InputError: it is of no known module, or the number of its rows is wrong.
            NeedsFlag: the number of heads is unknown.
        """
        part, inner, names = module.part, module.module, self._names
        tensor = next(iter(module.tensors.values()))
        if "m" in module.tensors and inner.rpartition(".")[2] in CUT_INPUTS and self._ranks(module) > 1:
            why = f"has magnitudes by the norms of one of {self._ranks(module)} ranks' columns, as DoRA there has"
            raise InputError(why, culprit=module.tensors["m"], remedy="merge it with its trainer")
        if inner == "mlp.experts.linear_fc2" and self._ranks(module) > 1:
            why = f"is of experts over {self._ranks(module)} tensor-parallel ranks, where its effect is not that of B A"
            raise InputError(why, culprit=tensor, remedy="merge it with its trainer, and compare")
        if inner == "output_layer":
            return [_Target("lm_head")]
        try:
            if inner == QKV:
                return self._qkv(module, rows)
            if inner == IN_PROJ:
                return self._in_proj(module, rows)
            both = gate_up_paths(inner, names)
            if inner.startswith("mlp.experts.") and names.experts:
                owner = names.experts + ".{expert}."
                gate, up, down = (owner + each for each in names.expert_names)
                if inner == "mlp.experts.linear_fc2":
                    return [_Target(down)]
                both = (gate, up) if names.gate else None
                if not both:
                    return [_Target(up)]
            if both:
                return self._gate_up(module, rows, *both)
        except ValueError as error:
            raise InputError(f"does not fit the model: {error}", culprit=tensor) from error
        path = plain_path(inner, names)
        if path is None or part:
            raise InputError(
                f"is of {inner}, whose place in transformers' model is not known", culprit=tensor, remedy=EXPORT
            )
        return [_Target(path)]

    def _gate_up(self, module: _Module, rows: int, gate: str, up: str) -> list[_Target]:
        if "B" not in module.tensors:
            return [_Target(gate, B="B of gate"), _Target(up, B="B of up")]
        if module.part:
            # saved as if it were both: each rank's first half, then each rank's second
            ranks = self._ranks(module)
            order = joined_halves(rows, ranks) if ranks > 1 else None
            return [_Target({"gate": gate, "up": up}[module.part], order, order)]
        by_rank = module.tensors["B"].endswith("linear_out.weight")
        B = gate_up_rows(rows, 1 if by_rank else self._ranks(module))
        m = gate_up_rows(rows, self._ranks(module)) if "m" in module.tensors else (None, None)
        return [_Target(path, B[i], m[i]) for i, path in enumerate((gate, up))]

    def _qkv(self, module: _Module, rows: int) -> list[_Target]:
        heads, gated = self._heads(module)
        if module.part:
            if gated:
                raise ValueError("its queries have gates, which CanonicalLoRA does not have")
            return [_Target(f"self_attn.{module.part}_proj")]
        if not heads.queries:
            return [_Target("self_attn.qkv_proj")]  # ranks and norms do not depend on the order
        by_letter = group_rows(heads, gated)
        self._require_rows(rows, by_letter)
        return [_Target(f"self_attn.{letter}_proj", runs, runs) for letter, runs in by_letter.items()]

    def _in_proj(self, module: _Module, rows: int) -> list[_Target]:
        fields, kind = text_fields(self._options.model), self._names.linear_attention
        if not kind:
            if self._options.lenient and not fields:
                return [_Target("linear_attn.in_proj")]
            raise self._needs_base(f"{module.stem}: has fused rows of linear attention; splitting them needs")
        names = "linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim"
        heads = LinearHeads(*(first_count(fields, each) for each in names))
        by_part = linear_attention_rows(heads, self._ranks(module), kind)
        self._require_rows(rows, by_part)
        return [_Target(f"linear_attn.in_proj_{part}", runs, runs) for part, runs in by_part.items()]

    @staticmethod
    def _require_rows(rows: int, by_part: Mapping[str, Runs]) -> None:
        counts = {part: row_count(runs) for part, runs in by_part.items()}
        if sum(counts.values()) != rows:
            raise ValueError(f"it has {rows} rows, and the model {counts}")

    def _heads(self, module: _Module) -> tuple[Heads, bool]:
        """Return the model's heads, and whether queries have gates, by its config.json, else by the run's settings."""
        stated, model = self._settings.heads, self._options.model
        of_model = heads_of(model)
        if of_model.queries and stated.queries and of_model != stated:
            raise InputError(
                f"the base has {of_model}, and {self._settings.name} beside the state says {stated}", culprit=self._name
            )
        heads = of_model if of_model.queries else stated
        if not heads.queries and not self._options.lenient and not module.part:
            raise self._needs_base(f"{module.stem}: has rows of q, k and v by group; splitting them needs")
        return heads, self._names.gated_queries if model else self._settings.gated

    def _ranks(self, module: _Module) -> int:
        """Return the number of tensor-parallel ranks of the run.

        Raises:
            InputError: it is unknown.
        """
        of_experts = module.module.startswith("mlp.experts.")
        ranks = self._settings.expert_ranks if of_experts else self._settings.ranks
        if not ranks and not self._options.lenient:
            raise InputError(
                "has rows in an order that depends on the run's number of tensor-parallel ranks",
                culprit=module.stem,
                remedy=f"put {RUN} of Megatron-Bridge, context/{NEMO_2} of NeMo or {SWIFT} of ms-swift beside it",
            )
        return ranks or 1

    def _needs_base(self, message: str) -> NeedsFlag:
        return NeedsFlag(f"{message} the model's config.json", culprit=self._name, flags="--base BASE")


def _settings_of(file: WeightsFile) -> _Settings:
    """Return the settings of the run that its trainer wrote beside the state or its folder; empty without them."""
    for folder in file.folders:
        for path, peft, model in (
            (folder / RUN, "peft", "model"),
            (folder / "context" / NEMO_2, "model_transform", "config"),
            (folder / NEMO_1_CONFIG, "peft.lora_tuning", ""),
        ):
            if path.is_file():
                return _of_yaml(path, peft, model)
        if (folder / SWIFT).is_file():
            fields = read_json_file(folder / SWIFT)
            ranks = first_count(fields, "tensor_model_parallel_size")
            # ms-swift refuses tensor parallelism of experts
            return _Settings(SWIFT, _number(fields, "lora_alpha"), bool(fields.get("use_rslora")), ranks, 1)
    return _Settings()


def _of_yaml(path: Path, peft: str, model: str) -> _Settings:
    method, fields = read_plain_yaml(path, peft), read_plain_yaml(path, model)
    alpha = _number(method, "alpha")
    queries, ranks = first_count(fields, "num_attention_heads"), first_count(fields, "tensor_model_parallel_size")
    size = first_count(fields, "kv_channels") or (first_count(fields, "hidden_size") // queries if queries else 0)
    return _Settings(
        path.name,
        alpha,
        False,
        ranks,
        first_count(fields, "expert_tensor_parallel_size") or ranks,
        Heads(queries, first_count(fields, "num_query_groups") or queries, size),
        fields.get("attention_output_gate") is True,
    )


def _number(fields: Mapping[str, Any], name: str) -> float | None:
    """Return a number above 0; None for anything else."""
    try:
        value = float(fields.get(name, 0))
    except (TypeError, ValueError):
        return None
    if not 0 < value < float("inf"):
        return None
    return int(value) if value.is_integer() else value
