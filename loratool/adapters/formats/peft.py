"""Read and write PEFT's format: `adapter_model.safetensors` (or `.bin`) beside `adapter_config.json`.

Keys are `base_model.model.<module>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), and those of the table _ENDS.
A key without a mark of PEFT's is a tensor that replaces the base's. The config has rank, alpha and every other setting
of the arithmetic. Defined by huggingface/peft: `peft/utils/save_and_load.py`, `peft/tuners/lora/layer.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, final

from ...architectures.prefixes import PEFT_PREFIX, WRAPPERS, module_path
from ...durable.fileio import require_free_space, write_file
from ...errors import InputError, NeedsFlag
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..config import AdapterConfig
from ..image_metadata import about_training
from ..updates import peft_methods
from ..updates.add import AddDelta
from ..updates.dora import DoRA
from ..updates.experts import Experts
from ..updates.headers import spec_from_roles, unpaired
from ..updates.low_rank import LowRank
from ..updates.oft import OFT
from ..updates.replace import ReplaceTensor
from ..updates.rows import Indices, ReplaceRows
from ..updates.tinylora import GROUPED, vectors_of
from ..updates.update import Unpaired, Update, UpdateSpec
from .content import ONLY_FOR, AdapterContent
from .format import Capabilities, Format, ReadOptions
from .image_paths import are_of_image_model
from .made_tensors import MadeTensor, virtual_file
from .other_methods import find_marks, other_method
from .peft_config import CONFIG_NAME, WEIGHTS_NAMES, announced_but_absent, find_config, parse_config, target_parameter
from .peft_forms import FORMS, hide_training
from .run_states import hide_base
from .single_file import file_size, fill_file, write_card, write_single_file
from .suffixes import PLAIN_ENDS

# PEFT's prefix (twice for a model wrapped twice), and the prefixes of training loops around it
WRAPPED = re.compile(rf"^(?:(?:{'|'.join(sorted(WRAPPERS))})\.|{re.escape(PEFT_PREFIX)})*{re.escape(PEFT_PREFIX)}")

# An adapter's name, which PEFT removes on saving and other tools keep.
_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"

# (the end of a key, after the module's path; the role of its tensor)
_ENDS = tuple(
    (re.compile(rf"\.{end}\Z"), role)
    for end, role in (
        (rf"lora_A{_NAME}\.weight", "A"),
        (rf"lora_B{_NAME}\.weight", "B"),
        (rf"lora_B{_NAME}\.bias", "bias"),
        (rf"lora_embedding_A{_NAME}", "embedding_A"),
        (rf"lora_embedding_B{_NAME}", "embedding_B"),
        (rf"lora_magnitude_vector{_NAME}(?:\.weight)?", "magnitude"),
        (rf"token_adapter\.trainable_tokens_delta{_NAME}", "tokens"),
        (r"(?:token_adapter\.)?base_layer\.weight", "base"),
        *((rf"{re.escape(end)}{_NAME}", role) for each in peft_methods().values() for end, role in each.ends.items()),
        (r"base_layer\.bias", "replaced_bias"),
    )
)

# (the end of a key with an adapter's name; the end without it)
_NAMED_ENDS = (
    (re.compile(rf"(\.lora_[AB]){_NAME}(\.(?:weight|bias))$"), r"\1\2"),
    (re.compile(rf"(\.lora_magnitude_vector){_NAME}(?:\.weight)?$"), r"\1"),
    (re.compile(rf"(\.lora_embedding_[AB]|\.trainable_tokens_delta){_NAME}$"), r"\1"),
)

_ADAPTER = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$")

_ORIGINAL = re.compile(r"\.original_module(?=\.)")

# Names that only PEFT's methods other than LoRA have
MARKS = tuple(f".{end}" for each in peft_methods().values() for end in each.ends if end not in ("lora_A", "lora_B"))
OTHER_ROLES = {role for each in peft_methods().values() for role in each.ends.values()} - {"A", "B"}
# names, at the end of a key, of tensors shared by all modules
SHARED = {name for each in peft_methods().values() for name in each.shared}
_SHARED = re.compile(rf"(?:^|\.)({'|'.join(sorted(SHARED))}){_NAME}$")

# The order in which classes declare their expert parameters; PEFT nests two of them in this order.
DECLARED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")

_OWN = (".lora_A.", ".lora_B.", ".lora_embedding_", ".trainable_tokens_delta", ".ln_tuning_layers.")


@final
class Peft(Format):
    """Folders or files of one model with PEFT's config."""

    key = "peft"
    title = "PEFT: a folder or a file of one component, in diffusers' names"
    can = Capabilities(
        kinds=frozenset({LowRank, Experts, DoRA, AddDelta, ReplaceTensor, ReplaceRows, OFT}),
        writes=True,
        components="one",
        alpha="config",
        usual_for="model",
        folder=True,
        starts=True,
    )
    ends: ClassVar = {**PLAIN_ENDS, "embedding_A": "lora_embedding_A", "embedding_B": "lora_embedding_B"}

    def claims(self, names: Iterable[str]) -> bool:
        """Return whether there are keys of LoRA or of another method of PEFT's.

        PEFT's prefix alone does not count: a base saved with it has only plain weights and biases.
        """
        names = list(names)
        text = "\n".join(names)  # one search instead of one per name is faster
        return (
            bool(find_marks(names))
            or any(mark in text for mark in (*_OWN, *MARKS))
            or any(name.startswith(PEFT_PREFIX) and not name.endswith((".weight", ".bias")) for name in names)
        )

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: the config or a tensor is of a method or variant that no row of UPDATES describes.
            NeedsFlag: the file does not say its alpha.
            UsageError: the alpha of `options` contradicts the config.
        """
        fields, component = find_config(file)
        fields, of_training = hide_training(name, file, fields)
        beside = (*hide_base(name, file, fields, MARKS), *of_training)
        marked = find_marks(file.specs)
        other = other_method(marked.values(), fields)  # these few names have all marks of the file
        if marked and other:
            _, method = other
            reason = f"of {name} is a tensor of {method.title}, which {method.reason}"
            raise InputError(reason, culprit=next(iter(marked.values())), remedy=method.remedy)
        if len(fields) == 1 and _is_dump(file.specs):
            raise InputError(
                "is a dump of a whole PeftModel, and no loader knows the names of its weights",
                culprit=name,
                remedy="save its adapter with save_pretrained, or the model with merge_and_unload().save_pretrained",
            )
        ends = (_end_of(WRAPPED.sub("", key)) for key in file.specs if ".lora_" in key) if len(fields) == 1 else ()
        of_image = are_of_image_model(match.string[: match.start()] for match, _ in ends if match)
        must_say = len(fields) == 1 and options.alpha is None and not options.lenient and not of_image
        text = "\n".join(file.specs)
        has_marks = any(mark in text for mark in MARKS)  # their kinds report what is missing
        if must_say and not has_marks and ".lora_" in text:
            raise NeedsFlag(
                f"has no {CONFIG_NAME} beside it, so the alpha that it was trained with is unknown",
                culprit=name,
                remedy=f"put the {CONFIG_NAME} there, or pass --alpha",
                flags="--alpha A",
            )
        config = parse_config(name, fields, options.alpha)
        with_alpha = fields if config.alpha is None else {**fields, "lora_alpha": config.alpha}
        today = next(filter(None, (form(file, with_alpha, options.model) for form in FORMS)), None)
        if today:
            tensors, fields = today
            file, config = virtual_file(file, tensors, {}), parse_config(name, fields, None)
        config = dataclasses.replace(config, rank_is_alpha=of_image)
        layers: dict[tuple[str, int], dict[str, str]] = {}
        replaced: dict[str, str] = {}
        named = adapter_names(file.specs)
        found = [(match[1], key) for key in file.specs if (match := _SHARED.search(key))]
        vectors = [key for name, key in found if name == GROUPED]
        of_all = {key: name for name, key in found}
        for key in (key for key in file.specs if key not in of_all):
            _sort_in(key, component, layers, replaced, file, named)
        shared = _shared_by_all(of_all, component, layers)
        updates: dict[str, UpdateSpec] = {}
        if shared and not any(OTHER_ROLES & roles.keys() for roles in layers.values()):
            name, key = next(iter(shared.items()))
            remedy = next(method.alone for method in peft_methods().values() if name in method.shared)
            alone = InputError("is for modules that the file does not have", culprit=key, remedy=remedy)
            if not options.lenient:
                raise alone
            updates[key] = unpaired(key, {name: key}, file, alone)
        vector_of: dict[str, str] = {}
        try:
            if vectors:
                matrices = {path: roles.get("tinylora_P") for (path, _), roles in layers.items()}
                vector_of = vectors_of(matrices, vectors, file, fields.get("projection_seed", 42))
        except InputError as error:
            if not options.lenient:
                raise
            layers = {}
            updates[vectors[0]] = unpaired(vectors[0], {GROUPED: vectors[0]}, file, error)
        depths_of: dict[str, list[int]] = {}
        for path, depth in sorted((key for key, roles in layers.items() if "A" in roles), reverse=True):
            depths_of.setdefault(path, []).append(depth)
        for (path, depth), roles in layers.items():
            depths = depths_of.get(path, [])
            place = depths.index(depth) if depth in depths else 0
            of_module = {**shared, GROUPED: vector_of[path]} if vectors else shared
            for update in _updates(
                path,
                {**of_module, **roles} if OTHER_ROLES & roles.keys() else roles,
                file,
                config,
                place,
                len(depths),
                options.lenient,
            ):
                if update.module in updates:
                    raise InputError(f"{name} has two updates for it", culprit=update.module)
                updates[update.module] = update
        for module, key in replaced.items():
            if module in updates:  # a trained bias and lora_B's: the second is added to the first
                if updates[module].base or not updates[module].additive:
                    raise InputError(f"{name} has two updates for {module}", culprit=key)
                updates[module] = dataclasses.replace(updates[module], base=key)
            else:
                updates[module] = _single(ReplaceTensor, module, key, file)
        _check_method(updates.values(), config)
        notes, missing = (*_notes(updates, layers), *beside), announced_but_absent(config, updates)
        return Adapter(name, self.key, file, config, updates, notes=notes, missing=missing)

    def names(self, source: Adapter, updates: Mapping[str, UpdateSpec]) -> dict[str, tuple[str, str]]:
        named, names = adapter_names(source.file.specs), {}
        wrappers = wrappers_of([module for module, update in updates.items() if update.cls.stack])
        for module, update in updates.items():
            owner, _, parameter = module.rpartition(".")
            for role, key in update.tensors.items():
                if source.format == self.key:
                    name = saved_name(key, named)
                elif module in wrappers:
                    name = self.tensor_name(wrappers[module], role)
                elif role in self.ends:
                    # other formats have transposed factors only for embeddings
                    name = self.tensor_name(
                        module, f"embedding_{role}" if update.transposed and role in ("A", "B") else role
                    )
                elif owner in updates and updates[owner].rank:
                    name = f"{owner}.base_layer.{parameter}"
                else:
                    name = saved_name(key, named)
                names[name] = module, role
            if update.base:
                names[saved_name(update.base, named)] = module, "base"
        return names

    def edited_name(self, name: str, named: Collection[str]) -> str:
        return saved_name(name, named)

    def as_file(self, content: AdapterContent) -> AdapterContent:
        prefix = "" if content.bare else PEFT_PREFIX
        config = json.dumps({"adapter_config": content.config}, sort_keys=True)
        return AdapterContent(
            {prefix + name: spec for name, spec in content.specs.items()},
            lambda name: content.load(name.removeprefix(prefix)),
            metadata={**content.metadata, "format": "pt", "loratool": config},
        )

    def fill(self, place: Path | BinaryIO, content: AdapterContent, inputs: Collection[WeightsFile]) -> None:
        """Write into a folder, or one file with its config in the metadata."""
        former = about_training(content.metadata)
        former |= {key: value for key, value in content.metadata.items() if key == ONLY_FOR}
        stored = self.as_file(dataclasses.replace(content, metadata=former))
        if not isinstance(place, Path):
            fill_file(place, stored.specs, stored.load, stored.metadata, inputs)
            return
        metadata = {**former, "format": "pt"}
        require_free_space(place.absolute().parent, file_size(stored.specs, metadata))
        write_single_file(place / WEIGHTS_NAMES[0], stored.specs, stored.load, metadata, inputs)
        write_file(place / CONFIG_NAME, (json.dumps(content.config, indent=2, sort_keys=True) + "\n").encode())
        write_card(place, content)


def read_as_peft(
    key: str,
    name: str,
    file: WeightsFile,
    tensors: Mapping[str, MadeTensor],
    fields: Mapping[str, Any],
    options: ReadOptions,
    notes: tuple[str, ...] = (),
) -> Adapter:
    """Read another tool's adapter, of format `key`, as PEFT's adapter with the same factors.

    Args:
        tensors: by PEFT's names, without PEFT's prefix.
        fields: of PEFT's config; without `lora_alpha` the alpha is that of `options`.

    Raises:
        InputError, NeedsFlag, UsageError: as `Peft.read`.
    """
    config = json.dumps({"adapter_config": {"peft_type": "LORA", **fields}})
    prefixed = {PEFT_PREFIX + each: tensor for each, tensor in tensors.items()}
    adapter = Peft().read(name, virtual_file(file, prefixed, {"loratool": config}), options)
    return dataclasses.replace(adapter, format=key, notes=(*notes, *adapter.notes))


def adapter_names(keys: Iterable[str]) -> set[str]:
    """Return the adapter names that these keys can contain."""
    return {match[1] for key in keys if (match := _ADAPTER.search(key))} | {"default"}


def saved_name(key: str, named: Collection[str]) -> str:
    """Return the key under which PEFT saves a tensor: without PEFT_PREFIX, wrapper and adapter name."""
    path = _without_wrapper(WRAPPED.sub("", key), named)
    for pattern, end in _NAMED_ENDS:
        path = pattern.sub(end, path)
    return path


def _is_dump(names: Collection[str]) -> bool:
    """Return whether every pair of factors has the base's weight beside it; an adapter saves only embeddings'."""
    modules = {name[: match.start()] for name in names if (match := _ADAPTER.search(name))}
    return bool(modules) and all(f"{m}.base_layer.weight" in names or f"{m}.weight" in names for m in modules)


def _sort_in(
    key: str,
    component: str,
    layers: dict[tuple[str, int], dict[str, str]],
    replaced: dict[str, str],
    file: WeightsFile,
    named: Collection[str],
) -> None:
    """Add a key to `layers`, by module and depth of PEFT's wrappers, or to `replaced`, by the tensor it replaces."""
    path = WRAPPED.sub("", key).removeprefix(f"{component}." if component else "")
    if _ORIGINAL.search(path):  # a module's untrained copy, which peft sometimes saves beside the trained one
        trained = _ORIGINAL.sub("", key)
        if trained not in file.specs and _ORIGINAL.sub(".modules_to_save", key) not in file.specs:
            raise InputError("is the untrained copy of a module whose trained one is missing", culprit=key)
        return
    match, role = _end_of(path)
    if match is None:
        if ".lora_" in path or ".token_adapter." in path:
            raise InputError("is not a tensor of a known kind of LoRA", culprit=key)
        module = _without_wrapper(path, named).replace(".base_layer.", ".")
        _put(replaced, module_path(module), key, file)
        return
    module = _without_wrapper(f"{path[: match.start()]}.", named).removesuffix(".")  # PEFT up to 0.5 wraps it twice
    depth = 0
    if ".base_layer" in module:
        depth = len(module) - len(re.sub(r"(\.base_layer)+$", "", module))
        module = module.replace(".base_layer", "")
    if role == "replaced_bias":
        _put(replaced, f"{module}.bias", key, file)
    else:
        _put(layers.setdefault((module, depth), {}), role, key, file)


def _shared_by_all(
    names: Mapping[str, str], component: str, layers: Mapping[tuple[str, int], dict[str, str]]
) -> dict[str, str]:
    """Return the shared tensors, by name; a module's own copy is added to its roles in `layers`.

    Args:
        names: key -> name of a shared tensor. RandLoRA is saved with a copy below each module.
    """
    shared: dict[str, str] = {}
    for key, name in names.items():
        path = WRAPPED.sub("", key).removeprefix(f"{component}." if component else "")
        own = layers.get((path.partition(f".{name}")[0], 0))
        (shared if own is None else own)[name] = key
    return shared


def _end_of(path: str) -> tuple[re.Match[str] | None, str]:
    """Return the match of the first of _ENDS at the end of a key, and the tensor's role."""
    for pattern, role in _ENDS:
        if match := pattern.search(path, 1):
            return match, role
    return None, ""


def _without_wrapper(path: str, named: Collection[str]) -> str:
    """Return a path without `modules_to_save` and a following adapter name."""
    before, mark, after = path.partition(".modules_to_save.")
    first, dot, rest = after.partition(".")
    return f"{before}.{rest if dot and first in named else after}" if mark else path


def _put(place: dict[str, str], role: str, key: str, file: WeightsFile) -> None:
    """Record a key for a role; two keys need equal tensors, because PEFT saves an MHA's out_proj twice."""
    former = place.setdefault(role, key)
    if former != key and (file.specs[former] != file.specs[key] or file.read(former) != file.read(key)):
        raise InputError(f"is the same as {former}, but its values differ", culprit=key)


def _updates(
    path: str,
    roles: Mapping[str, str],
    file: WeightsFile,
    config: AdapterConfig,
    place: int,
    places: int,
    lenient: bool,
) -> Iterable[UpdateSpec]:
    """Yield the updates of one of PEFT's wrappers of a module; `place` counts wrappers from the innermost."""
    fields = config.peft
    with_factors = [role for role in ("tokens", "embedding_A", "embedding_B", "A", "B") if role in roles]
    sorts = {role.rpartition("_")[0] or role.replace("B", "A") for role in with_factors}
    others = sorted(OTHER_ROLES & roles.keys())
    if (
        len(sorts) > 1
        or (others and ("magnitude" in roles or sorts - {"A"}))
        or {"tokens", "magnitude"} <= roles.keys()
    ):
        raise InputError(f"{path} has updates of two kinds", culprit=roles[(with_factors or others)[0]])
    factors = {role: roles[role] for role in ("A", "B", "magnitude", "base") if role in roles}
    if "bias" in roles:
        if not fields.get("lora_bias") and not config.rank_is_alpha:
            raise InputError("is there, but the config does not set lora_bias", culprit=roles["bias"])
        rank = file.specs[roles["A"]].shape[:1] if "A" in roles else ()
        if not lenient and not (rank and rank[0]):
            raise InputError(f"has no partner: the A factor of {path} is missing or empty", culprit=roles["bias"])
        scale = 1.0 if lenient else config.scale_of(path, rank[0])
        yield _single(AddDelta, f"{path}.bias", roles["bias"], file, scale)
    if "embedding_A" in roles or "embedding_B" in roles:
        pair = {role.removeprefix("embedding_"): key for role, key in roles.items() if role.startswith("embedding_")}
        update = spec_from_roles(path, {**factors, **pair}, file, config, transposed=True, lenient=lenient)
        yield _checked_dora(update, fields)
    elif "tokens" in roles:
        yield _tokens(path, roles, file, fields)
    elif others:
        update = spec_from_roles(path, roles, file, config, lenient=lenient)
        yield update
        of_bias = update.cls.of_bias(update, f"{path}.bias")
        yield from [of_bias] if of_bias else []
    elif "A" in roles or "B" in roles or "magnitude" in roles:
        parameter = target_parameter(config, path, place, places, DECLARED)
        if parameter is None:
            yield _checked_dora(spec_from_roles(path, factors, file, config, lenient=lenient), fields)
        else:
            of_parameter = config.for_module(f"{path}.{parameter}")
            target = path if parameter == "weight" else f"{path}.{parameter}"
            rows = file.specs[roles["A"]].shape[:1] if "A" in roles else ()
            # jetmoe's experts are the weights of modules: only the rank distinguishes them from a linear layer
            stacked = parameter != "weight" or (bool(rows) and of_parameter.rank not in (None, *rows))
            update = spec_from_roles(target, factors, file, of_parameter, stacked=stacked, lenient=lenient)
            yield dataclasses.replace(update, parameter=parameter == "weight")
    elif "base" in roles:
        yield _single(ReplaceTensor, path, roles["base"], file)


def _check_method(updates: Iterable[UpdateSpec], config: AdapterConfig) -> None:
    """Raise InputError for an update of another method than the config's."""
    expected = config.peft.get("peft_type", "LORA")
    for update in updates if len(config.peft) > 1 else ():
        inner = update.cls.without_norm(update).cls
        method = inner.peft.type if inner.peft else "LORA" if inner in (LowRank, Experts) else expected
        if method != expected:
            raise InputError(
                f"is {inner.kind}, but the config says {expected}",
                culprit=update.module,
                remedy="the config is of another adapter",
            )


def _single(cls: type[Update], module: str, key: str, file: WeightsFile, scale: float = 1.0) -> UpdateSpec:
    return UpdateSpec(cls, module, {"value": key}, {"value": file.specs[key]}, scale)


def _checked_dora(update: UpdateSpec, fields: Mapping[str, Any]) -> UpdateSpec:
    """Return `update` if flag and magnitudes agree; with only one of them, loaders compute different results."""
    if update.cls is Unpaired:
        return update
    if fields.get("use_dora") and update.cls is not DoRA:
        raise InputError("has no lora_magnitude_vector, but the config sets use_dora", culprit=update.module)
    if update.cls is DoRA and fields and not fields.get("use_dora") and "r" in fields:
        raise InputError("has a lora_magnitude_vector, but the config does not set use_dora", culprit=update.module)
    return update


def _tokens(path: str, roles: Mapping[str, str], file: WeightsFile, fields: Mapping[str, Any]) -> UpdateSpec:
    """Return the update of trainable tokens.

    `trainable_tokens_delta` holds the rows' new values, despite its name (`peft/tuners/trainable_tokens`).
    """
    indices = fields.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((v for k, v in indices.items() if path == k or path.endswith(f".{k}")), None)
    if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
        raise InputError("has rows, but the config's trainable_token_indices do not say which", culprit=roles["tokens"])
    spec = file.specs[roles["tokens"]]
    if len(spec.shape) != 2 or spec.shape[0] != len(indices) or len(set(indices)) != len(indices):
        raise InputError(f"is {spec}, but the config lists {len(indices)} different rows", culprit=roles["tokens"])
    tensors, detail = {"value": roles["tokens"]}, Indices(tuple(indices))
    return UpdateSpec(ReplaceRows, path, tensors, {"value": spec}, detail=detail, base=roles.get("base"))


def _notes(updates: Mapping[str, UpdateSpec], layers: Mapping[tuple[str, int], Mapping[str, str]]) -> tuple[str, ...]:
    doubled = [
        path
        for (path, _), roles in layers.items()
        if path.endswith(".out_proj") and ".base_layer.out_proj." in roles.get("A", "") and path in updates
    ]
    if not doubled:
        return ()
    return (
        f"{doubled[0]}: peft up to 0.21 applies the change of an attention's out_proj twice (peft PR 3774); "
        "loratool adds it once, as defined",
    )


def wrappers_of(parameters: Iterable[str]) -> dict[str, str]:
    """Return bare parameter -> path of PEFT's wrapper."""
    owners: dict[str, list[str]] = {}
    for path in parameters:
        owners.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    return {
        f"{owner}.{parameter}": wrapper
        for owner, parameters_of_owner in owners.items()
        for parameter, wrapper in nested(
            owner, parameters_of_owner, (*DECLARED, *sorted({*parameters_of_owner} - {*DECLARED}))
        ).items()
    }


def nested(module: str, parameters: Sequence[str], declared: Sequence[str]) -> dict[str, str]:
    """Return bare parameter -> path of its wrapper, for one module.

    PEFT nests the wrappers in the order in which the module's class declares the parameters, the first innermost.
    """
    order = sorted(parameters, key=declared.index)
    return {parameter: module + ".base_layer" * (len(order) - 1 - place) for place, parameter in enumerate(order)}
