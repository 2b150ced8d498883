"""Read and write llama.cpp's adapters: one GGUF file of `<tensor>.lora_a` and `.lora_b`, with one alpha for all.

A is (r, in) and B is (out, r); for a stack of experts (E, r, in) and (E, out, r). A of `token_embd` is transposed.
The scale is alpha / r with the rank of each pair, and 1 if alpha is 0 or absent. Tensors have the names and the rows of
the model's GGUF file: `read` keeps them, unless the base's config.json is given; then they become transformers'. A norm
beside the pairs replaces the base's (mergekit's extraction); llama.cpp ignores it.
Defined by llama.cpp: `convert_lora_to_gguf.py`, `src/llama-adapter.cpp`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, final

from ...architectures.gguf import ARCHITECTURES
from ...durable import disk
from ...durable.fileio import require_free_space, write_at
from ...errors import InputError, NeedsFlag, UsageError
from ...files.codecs import find_stored
from ...files.codecs.codec import Parts, StoredTensor, Unclaimed
from ...files.containers.gguf_file import DEFAULT_ALIGNMENT, VERSIONS, GgufFile
from ...files.containers.gguf_writer import FILE_TYPE, FILE_TYPES, build_gguf, value_field
from ...files.containers.safetensors_file import parse_json, tensor_bytes
from ...files.containers.virtual import VirtualFile
from ...files.dtypes import TORCH_FLOATS, TensorSpec
from ...files.tensor_ref import TensorRef
from ...files.weights_file import WeightsFile, require_unchanged
from ..adapter import Adapter
from ..config import AdapterConfig
from ..gguf_names import has_own_names, to_model_names
from ..gguf_parts import ARCHITECTURE, EMBEDDING, STACK, GgufModel
from ..placed_factors import lay_A, lay_B
from ..updates.experts import Experts
from ..updates.headers import spec_from_roles, unpaired
from ..updates.low_rank import LowRank
from ..updates.replace import ReplaceTensor
from ..updates.update import Stack, UpdateSpec
from .content import AdapterContent
from .format import Capabilities, Format, ReadOptions

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers

ENDS = {"A": "weight.lora_a", "B": "weight.lora_b"}
ROLES = {f".{end}": role for role, end in ENDS.items()}

TYPE, KIND = "general.type", "adapter.type"
ALPHA = "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"

NORM = "_norm.weight"
EIGHT_BITS = "Q8_0"  # the only supported block type: float32 holds its numbers exactly


@final
class LlamaCpp(Format):
    """Files for one language model; a field names its architecture."""

    key = "gguf"
    loaded_by = ("llama.cpp", "ollama")
    title = "GGUF: a file for llama.cpp, of plain LoRA with the base's names"
    can = Capabilities(
        kinds=frozenset({LowRank, Experts}),
        writes=True,
        components="one",
        alpha="metadata",
        kernels=False,
        depends_on_base=True,
        named_by_model=True,
    )
    ends = ENDS
    container = "gguf"

    def claims(self, names: Iterable[str]) -> bool:
        ends = tuple(ROLES)
        return any(name.endswith(ends) for name in names)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: a field or a tensor is not of llama.cpp's adapters, or the base has another architecture.
            UsageError: the alpha of `options` contradicts the file.
        """
        fields = _fields_of(file)
        config = _config_of(name, fields, options)
        modules: dict[str, dict[str, str]] = {}
        updates: dict[str, UpdateSpec] = {}
        for tensor, spec in file.specs.items():
            end = next((end for end in ROLES if tensor.endswith(end)), None)
            if end:
                modules.setdefault(tensor.removesuffix(end), {})[ROLES[end]] = tensor
            elif tensor.endswith(NORM):
                module = tensor.removesuffix(".weight")
                updates[module] = UpdateSpec(ReplaceTensor, module, {"value": tensor}, {"value": spec})
            else:
                raise InputError("is neither lora_a, lora_b nor a norm, and llama.cpp refuses it", culprit=tensor)
        matrices, experts = _as_matrices(file, options.lenient)
        for module, roles in modules.items():
            updates[module] = _update(module, roles, matrices, experts, config, options.lenient)
        key = str(fields[ARCHITECTURE])
        counted = {f"{key}.expert_count": experts} if experts else {}
        dotted = {field: value for field, value in fields.items() if "." in field}  # as PEFT's fields have none
        norms = [module for module, update in updates.items() if update.cls is ReplaceTensor]
        notes = (f"{', '.join(norms)}: a merge replaces these norms, and llama.cpp ignores them",) if norms else ()
        config = replace(config, other_fields={**dotted, **counted})
        native = Adapter(name, self.key, matrices, config, updates, notes=notes)
        if not options.model:
            return native
        try:
            model = GgufModel.of_config(options.model, "--base")
            if model.architecture.key != key:
                raise InputError(f"is for {key}, but the base is {model.architecture.key}", culprit=name)
            return to_model_names(native, model)
        except InputError:
            if options.lenient:
                return native
            raise

    def with_standard_names(self, adapter: Adapter) -> Adapter:
        """Return an adapter of the file's names under transformers' names, if the file's fields suffice.

        Raises:
            NeedsFlag: the fields do not suffice.
        """
        if not has_own_names(adapter):
            return adapter
        model = GgufModel.of_fields(adapter.config.other_fields, adapter.updates)
        if model is None:
            known = adapter.config.other_fields[ARCHITECTURE] in ARCHITECTURES
            message = f"has the names and rows of a GGUF file of {adapter.config.other_fields[ARCHITECTURE]}"
            if not known:
                raise InputError(f"{message}, whose names in transformers are unknown", culprit=adapter.name)
            why = "with the model (its config.json is enough)"
            raise NeedsFlag(message, culprit=adapter.name, flags="--base BASE", why=why)
        return to_model_names(adapter, model)

    def edited_metadata(self, config: AdapterConfig, ranks: Mapping[str, int]) -> dict[str, str]:
        values = {*ranks.values()}
        return {ALPHA: str(values.pop()) if len(values) == 1 else "0"}  # with 0 the scale is 1, whatever the rank

    def as_file(self, content: AdapterContent) -> AdapterContent:
        """Return the tensors as the file stores them, and the fields as JSON under one key."""
        fields = {key: value for key, value in content.config.items() if "." in key}
        if ALPHA in content.metadata:  # the alpha of new ranks; the other fields are the former file's
            fields[ALPHA] = float(content.metadata[ALPHA])
        fields |= {TYPE: "adapter", KIND: "lora"}
        count = fields.get(f"{fields[ARCHITECTURE]}.expert_count")
        experts = count if type(count) is int else 1

        def shape(name: str, spec: TensorSpec) -> tuple[int, ...]:
            if name.startswith(f"{EMBEDDING}.") and name.endswith(ENDS["A"]):
                return spec.shape[::-1]
            if not _is_stack(name):
                return spec.shape
            rows, columns = spec.shape
            a = name.endswith(ENDS["A"])
            return (experts, rows // experts, columns) if a else (experts, rows, columns // experts)

        def load(name: str) -> Numbers:
            numbers = content.load(name)
            if name.startswith(f"{EMBEDDING}.") and name.endswith(ENDS["A"]):
                return numbers.T
            if not _is_stack(name):
                return numbers
            if name.endswith(ENDS["A"]):
                return numbers.reshape(experts, -1, numbers.shape[1])
            return replace(numbers, bits=numbers.bits.reshape(len(numbers), -1, experts).transpose(2, 0, 1))

        specs = {name: TensorSpec(spec.dtype, shape(name, spec)) for name, spec in content.specs.items()}
        count = dict.fromkeys(FILE_TYPES, 0) | {spec.dtype: 0 for spec in specs.values()}
        for spec in specs.values():
            count[spec.dtype] += 1
        fields[FILE_TYPE] = FILE_TYPES.get(max(count, key=lambda dtype: count[dtype]), 0)
        return AdapterContent(specs, load, metadata={"gguf": json.dumps(fields, default=list)})

    def fill(self, place: Path | BinaryIO, content: AdapterContent, inputs: Collection[WeightsFile]) -> None:
        assert not isinstance(place, Path), "it is one file"
        stored = self.as_file(content)
        entries = [value_field(key, value) for key, value in json.loads(stored.metadata["gguf"]).items()]
        header, begin, nbytes = build_gguf(entries, stored.specs, DEFAULT_ALIGNMENT, VERSIONS[-1])
        require_free_space(Path(place.name).absolute().parent, nbytes)
        disk.truncate(place, nbytes)  # the last tensor is padded like the others
        write_at(place, memoryview(header), 0)
        for name, spec in stored.specs.items():
            write_at(place, tensor_bytes(stored.load(name), spec), begin[name])
        require_unchanged(inputs)


def _fields_of(file: WeightsFile) -> dict[str, Any]:
    """Return the fields of an adapter; raise InputError for another file's."""
    stored = (file.metadata or {}).get("gguf", "{}")
    fields = file.fields if isinstance(file, GgufFile) else parse_json(stored.encode(), file.path)
    for key, wanted in ((TYPE, "adapter"), (KIND, "lora")):
        if fields.get(key) != wanted:
            raise InputError(f"has the {key} {fields.get(key)!r}, and not {wanted!r}", culprit=str(file.path))
    if not isinstance(fields.get(ARCHITECTURE), str):
        raise InputError(f"does not say its {ARCHITECTURE}", culprit=str(file.path))
    return dict(fields)


def _config_of(name: str, fields: Mapping[str, Any], options: ReadOptions) -> AdapterConfig:
    """Return the config with the file's alpha; without an alpha the scale is 1."""
    if fields.get(INVOCATION) and not options.lenient:
        message = "is an activated LoRA (aLoRA), which acts on a part of the prompt only, so it can never be merged"
        raise InputError(message, culprit=name)
    stored = fields.get(ALPHA, 0.0)
    if not isinstance(stored, float) or not math.isfinite(stored):
        raise InputError(f"has the {ALPHA} {stored!r}, which is not a finite number", culprit=name)
    if options.alpha is not None and stored and options.alpha != stored:
        raise UsageError(f"--alpha {options.alpha:g} contradicts the file's {stored:g}", culprit=name)
    return AdapterConfig(alpha=stored or options.alpha, rank_is_alpha=True)


def _is_stack(tensor: str) -> bool:
    return tensor.removesuffix(f".{ENDS['A']}").removesuffix(f".{ENDS['B']}").endswith(STACK)


def _as_matrices(file: WeightsFile, lenient: bool) -> tuple[VirtualFile, int]:
    """Return the file with factors in PEFT's layout, and the number of experts."""
    specs, counts = {}, {}
    weights, _ = find_stored(Unclaimed(file.specs))
    coded = {name: weight for name, weight in weights.items() if file.specs[name].dtype == EIGHT_BITS}
    for name, spec in file.specs.items():
        stack, dimensions = _is_stack(name), 1 if name.endswith(NORM) else 3 if _is_stack(name) else 2
        if spec.dtype not in TORCH_FLOATS and name not in coded:
            raise InputError(f"is {spec.dtype}", culprit=name, remedy="convert the adapter with --outtype f16 or f32")
        if len(spec.shape) != dimensions or not spec.size:
            raise InputError(f"is {spec}, but should have {dimensions} dimensions above 0", culprit=name)
        shape = spec.shape
        if stack:
            experts, rows, columns = spec.shape
            counts[name] = experts
            shape = (experts * rows, columns) if name.endswith(ENDS["A"]) else (rows, columns * experts)
        elif name == f"{EMBEDDING}.{ENDS['A']}":
            shape = shape[::-1]
        specs[name] = TensorSpec("F32" if name in coded else spec.dtype, shape)
    if len({*counts.values()}) > 1:
        two = sorted(counts, key=lambda name: counts[name])
        raise InputError(f"has {counts[two[0]]} experts, and {two[-1]} {counts[two[-1]]}", culprit=two[0])

    def load(name: str) -> Numbers:
        if weight := coded.get(name):
            from ...numerics.arrays import recast
            from ...numerics.forms import F32

            spec = file.specs[name]
            ref, rows = TensorRef(file, name, Parts(weight, {"codes": StoredTensor(file, name)}, spec)), spec.shape[0]
            numbers = recast(ref.read_matrix(rows, 0, rows), F32).reshape(*spec.shape)
        else:
            numbers = file.numbers(name)
        if name == f"{EMBEDDING}.{ENDS['A']}":
            return replace(numbers, bits=numbers.bits.T.copy())
        if name not in counts:
            return numbers
        return replace(numbers, bits=(lay_A if name.endswith(ENDS["A"]) else lay_B)(numbers.bits))

    matrices = VirtualFile(file, specs, load, file.metadata or {}, dict.fromkeys(coded, EIGHT_BITS))
    return matrices, next(iter(counts.values()), 0)


def _update(
    module: str, roles: Mapping[str, str], file: VirtualFile, experts: int, config: AdapterConfig, lenient: bool
) -> UpdateSpec:
    """Return the update of a pair; GGUF stores no matrix transposed except the embedding's."""
    stacked = module.endswith(STACK)
    try:
        if stacked and "B" in roles:
            config = replace(config, rank=file.specs[roles["B"]].shape[1] // experts)
        spec = spec_from_roles(module, roles, file, config, module == EMBEDDING, stacked, lenient=lenient)
    except InputError as error:
        if not lenient:
            raise
        return unpaired(module, roles, file, error)
    return replace(spec, detail=replace(spec.detail, transposed=False)) if isinstance(spec.detail, Stack) else spec
