"""Read image adapters with dotted names: diffusers' old and current ones, ComfyUI's, ai-toolkit's, XLabs'.

A name is `<component>.<module path>` and one of `suffixes.SUFFIXES`; formats that differ only in these share this
reader. The scale is alpha / r if there is an alpha: a tensor, in the metadata's `lora_adapter_metadata`, or in an
adapter_config.json beside the file (diffusion-pipe). Otherwise it is 1.
Defined by diffusers: `loaders/lora_base.py`, `loaders/lora_conversion_utils.py`; ComfyUI: `comfy/lora.py`.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from ...architectures.components import ADAPTER_PREFIXES, component_of
from ...architectures.prefixes import PEFT_PREFIX
from ...errors import InputError, UsageError
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..config import AdapterConfig
from ..updates.dora import DoRA
from .format import Format, ReadOptions
from .image_paths import are_of_image_model
from .module_updates import module_updates
from .other_methods import refused_tensor
from .peft_config import (
    announced_but_absent,
    base_mutating_init,
    base_mutating_init_of,
    config_beside,
    lora_config,
    parse_config,
    refuse_other_config,
)
from .suffixes import FACTORS, NOT_PEFTS, PEFTS, PROCESSOR_SUFFIXES, split_suffix, suffix_of

# Dotted prefixes of an image model's components; PEFT's files have another prefix.
COMPONENTS = tuple(prefix for prefix in ADAPTER_PREFIXES if prefix.endswith("."))

# Prefixes that also begin paths of other models: GPT-2, MPT, DBRX, XLNet, DistilBERT, OpenELM, ChatGLM, and any `net`
ANYONES = (
    "net.",
    *(f"transformer.{stem}." for stem in ("h", "blocks", "layer", "layers", "encoder.layers")),
)

# The fields of PEFT's config that diffusers stores in a file's metadata
FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")

# A path of the old attention processors -> the module's path; XLabs' paths are of Flux.
PROCESSORS = (
    (re.compile(r"(double_blocks\.\d+)\.processor\.qkv_lora1$"), r"\1.img_attn.qkv"),
    (re.compile(r"(double_blocks\.\d+)\.processor\.qkv_lora2$"), r"\1.txt_attn.qkv"),
    (re.compile(r"(double_blocks\.\d+)\.processor\.proj_lora1$"), r"\1.img_attn.proj"),
    (re.compile(r"(double_blocks\.\d+)\.processor\.proj_lora2$"), r"\1.txt_attn.proj"),
    (re.compile(r"(single_blocks\.\d+)\.processor\.qkv(?:_lora)?$"), r"\1.linear1_qkv"),
    (re.compile(r"(single_blocks\.\d+)\.processor\.proj(?:_lora)?$"), r"\1.linear2"),
    (re.compile(r"\.processor\.to_out$"), ".to_out.0"),
    (re.compile(r"\.processor\.(to_[qkv]|add_[qkv]_proj|to_add_out)$"), r".\1"),
    (re.compile(r"(text_encoder.*\.self_attn)\.to_([qkv])$"), r"\1.\2_proj"),
    (re.compile(r"(text_encoder.*\.self_attn)\.to_out$"), r"\1.out_proj"),
)


class DottedFormat(Format, ABC):
    """Base class of formats with dotted names: they are read alike and written differently."""

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: a tensor is not of LoRA or DoRA, or the metadata is damaged.
            UsageError: the alpha of `options` contradicts the file.
        """
        modules: dict[str, dict[str, str]] = {}
        for tensor in file.specs:
            module, role = split_suffix(tensor)
            module = _module_of(module)
            if role is None:
                raise refused_tensor(tensor, name)
            if modules.setdefault(module, {}).setdefault(role, tensor) != tensor:
                raise InputError(f"is the same as {modules[module][role]}", culprit=tensor)
        configs = _configs(name, file)
        updates = {}
        for module, roles in modules.items():
            config, path = _config_of(module, roles, file, configs, name, options.alpha)
            roles = {role: key for role, key in roles.items() if role != "alpha"}
            if not roles:
                raise InputError("has an alpha but no factors", culprit=module)
            for spec in module_updates(path, roles, file, config, f"{path}.bias", options.lenient):
                if config.peft.get("use_dora") and spec.rank and spec.cls is not DoRA and not options.lenient:
                    place = "config" if "" in configs else "metadata"
                    raise InputError(f"has no magnitude, but the {place} sets use_dora", culprit=module)
                full = module + spec.module.removeprefix(path)
                if full in updates:
                    raise InputError(f"{name} has two updates for it", culprit=full)
                updates[full] = replace(spec, module=full)
        alphas = {spec.scale * spec.cls.divisor(spec) for spec in updates.values() if spec.cls.divisor(spec)}
        common_alpha = alphas.pop() if len(alphas) == 1 else None
        # diffusers applies these to the base each time it loads the file
        inits = {component: init for component, config in configs.items() if (init := base_mutating_init(config))}
        if "" in inits:
            inits = dict.fromkeys((module.partition(".")[0] for module in modules), inits[""])
        missing = announced_but_absent(configs[""], updates) if "" in configs else ()
        config = AdapterConfig(alpha=common_alpha, base_mutating_inits=inits)
        return Adapter(name, self.key, file, config, updates, missing=missing)

    @final
    def spelling(self, tensor: str) -> str:
        return suffix_of(tensor)

    @final
    def edited_metadata(self, config: AdapterConfig, ranks: Mapping[str, int]) -> dict[str, str]:
        """Return metadata for a base-mutating init, which a loader must know; otherwise nothing."""
        if not base_mutating_init(config):
            return {}
        components: dict[str, dict[str, int]] = {}
        for module, rank in ranks.items():
            component, path = split_component(module)
            components.setdefault(component, {})[path] = rank
        return metadata_of(
            {
                component: lora_config(of, {}, init_lora_weights=base_mutating_init_of(config, component) or True)
                for component, of in components.items()
            }
        )


def has_dotted_factors(names: Iterable[str]) -> bool:
    """Return whether a factor's name contains a component's prefix or a processor, or all names are bare."""
    # `.down.weight` is XLabs' suffix only after a processor: Krea's MLPs have modules of that name.
    names, processors = list(names), (*FACTORS, *PROCESSOR_SUFFIXES)
    named = [
        name
        for name in names
        if (name.startswith(COMPONENTS) and name.endswith(FACTORS))
        or (".processor." in name and name.endswith(processors))
    ]
    if named and all(name.startswith(ANYONES) for name in named):
        named = named if are_of_image_model(split_suffix(name)[0] for name in named) else []
    return bool(named) or _are_bare(names)


def _are_bare(names: Sequence[str]) -> bool:
    """Return whether all names are paths with suffixes that PEFT does not write, a factor's among them.

    A name with PEFT's prefix needs a suffix that PEFT never writes, or an alpha beside the factors, as OneTrainer
    writes it.
    """
    present = set(names)
    alphas = any(f"{name.removesuffix('.alpha')}.lora_A.weight" in present for name in names if name.endswith(".alpha"))
    if any(name.endswith(PEFTS) for name in names) and not alphas:
        return False
    if any(name.startswith(PEFT_PREFIX) for name in names) and not any(name.endswith(NOT_PEFTS) for name in names):
        return False
    return any(name.endswith(FACTORS) for name in names) and all(split_suffix(name)[1] for name in names)


def split_component(module: str) -> tuple[str, str]:
    """Split a module into its component and its path for the metadata.

    `text_model` is removed from the path: a CLIPTextModel has it in transformers 4 but not in 5. PEFT finds the modules
    of both by the rest of the path.
    """
    component, _, path = module.partition(".")
    return component, path.removeprefix("text_model.")


def metadata_of(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a file's metadata for PEFT configs by component, with paths as `split_component` gives them."""
    entries: dict[str, Any] = {}
    for component, config in configs.items():
        init = config.get("init_lora_weights")
        fields = [
            *FIELDS,
            *(["use_dora"] if config["use_dora"] else []),
            *(["init_lora_weights"] * (init is not True)),
        ]
        values = {key: config[key] for key in fields}
        if component.startswith("text_encoder"):  # with or without `text_model.` before a path: no anchor
            for key in ("rank_pattern", "alpha_pattern"):
                values[key] = {pattern.removeprefix("^"): value for pattern, value in values[key].items()}
        entries |= {f"{component}.{key}": value for key, value in values.items()}
    return {"lora_adapter_metadata": json.dumps(entries, sort_keys=True)}


def _module_of(module: str) -> str:
    """Return a module's path without PEFT's prefix; paths of old processors become today's."""
    module = module.removeprefix(PEFT_PREFIX)
    for pattern, meaning in PROCESSORS:
        module, count = pattern.subn(meaning, module)
        if count:
            break
    return module


def _configs(name: str, file: WeightsFile) -> dict[str, AdapterConfig]:
    """Return the configs by component, from the metadata or else the file beside it; "" is for every module.

    Raises:
        InputError: a config is damaged or of another method, or the two scale differently.
    """
    text = (file.metadata or {}).get("lora_adapter_metadata")
    if text is None:
        fields = config_beside(file)
        return {"": parse_config(name, fields, None)} if fields else {}
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its metadata lora_adapter_metadata is not JSON: {error}", culprit=name) from error
    if not isinstance(flat, dict):
        raise InputError("its metadata lora_adapter_metadata is not a JSON object", culprit=name)
    fields_of: dict[str, dict[str, object]] = {}
    for key, value in flat.items():
        component, dot, field = key.partition(".")
        fields_of.setdefault(component if dot else "", {})[field if dot else key] = value
    for fields in fields_of.values():
        refuse_other_config(file, fields)
    return {
        component: parse_config(name, {"peft_type": "LORA", **fields}, None) for component, fields in fields_of.items()
    }


def _config_of(
    module: str,
    roles: Mapping[str, str],
    file: WeightsFile,
    configs: Mapping[str, AdapterConfig],
    name: str,
    alpha: float | None,
) -> tuple[AdapterConfig, str]:
    """Return the config that decides a module's rank and scale, and the module's path in it.

    A stored alpha has precedence over the config's, which must agree; the config's has precedence over --alpha. Without
    any, alpha is the rank.
    """
    stored = file.scalar(roles["alpha"]) if "alpha" in roles else None
    if stored is not None and not math.isfinite(stored):
        raise InputError(f"is {stored}", culprit=roles["alpha"])
    component, _, path = module.partition(".")
    config = configs.get(component)
    if config is None and "" in configs:
        config, path = configs[""], component_of(module)[1]
    if stored is None and config is not None:
        if alpha is not None and config.alpha is not None and alpha != config.alpha:
            place = "config" if "" in configs else "metadata"
            raise UsageError(f"--alpha {alpha:g} contradicts the {place}'s {config.alpha:g}", culprit=name)
        return (config if config.alpha is not None else replace(config, alpha=alpha)), path
    if stored is not None and config is not None:
        _refuse_contradiction(roles["alpha"], stored, config, path)
    if stored is not None and alpha is not None and stored != alpha:
        raise UsageError(f"--alpha {alpha:g} contradicts the file's {roles['alpha']} = {stored:g}", culprit=name)
    return AdapterConfig(alpha=alpha if stored is None else stored, rank_is_alpha=True), module


def _refuse_contradiction(tensor: str, stored: float, config: AdapterConfig, path: str) -> None:
    """Raise InputError if a stored alpha differs from the config's by more than bf16 rounding."""
    alpha = config.for_module(path).alpha
    if alpha is not None and (config.use_rslora or not math.isclose(alpha, stored, rel_tol=2**-8)):
        scaled = ", divided by the root of the rank (use_rslora)" if config.use_rslora else ""
        raise InputError(
            f"is {stored:g}, but the config says {alpha:g}{scaled}",
            culprit=tensor,
            remedy="the file does not say which of them its trainer meant: remove the wrong one",
        )
