"""Read kohya's format, the most common one for image models: one safetensors file with flattened names.

Tensors are `<prefix>_<module path with _ for .>.lora_down.weight` (r, in), `.lora_up.weight` (out, r), `.alpha` ().
The scale is alpha / r; a missing or zero alpha means r. Defined by kohya-ss/sd-scripts: `networks/lora.py`.
ComfyUI reads PEFT's `.lora_A.weight` and `.lora_B.weight` with these modules too (`comfy/lora.py`).
OneTrainer and LyCORIS add `.dora_scale`, DoRA's magnitude: (out, 1[, 1, 1]), or (1, in) along V's columns.
No rule splits a flattened name, so it is matched with the flattened names of the base.
Names that converters broke in one way, with the prefix twice or without the dot before `lora_down`, are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, final

from ...architectures.families import FAMILIES
from ...architectures.families.table import Naming
from ...architectures.prefixes import KOHYA_PREFIXES
from ...errors import InputError, UsageError, shell_word
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..config import AdapterConfig
from ..updates.dora import DoRA
from ..updates.low_rank import LowRank
from .content import NewModule
from .format import Capabilities, Format, ReadOptions
from .kohya_oft import named_parts
from .module_updates import module_updates
from .other_methods import refused_tensor
from .suffixes import ALPHA_ENDS, VALUE_ENDS, split_suffix, suffix_of

_PREFIX = f"({'|'.join(map(re.escape, KOHYA_PREFIXES))})"
_TWICE = re.compile(rf"\A(?:{_PREFIX}(?=\1))+")
_OF_TWO = re.compile(rf"{_PREFIX}{_PREFIX}")
_UNDOTTED = re.compile(r"_(lora_(?:down|up|mid))\.(weight|alpha)\Z")

WITHOUT_FACTORS = "lycoris.kohya"  # sd-scripts' module of a network whose changes have no factors


@final
class Kohya(Format):
    """Files of flattened names; alphas are tensors."""

    key = "kohya"
    title = "kohya: flattened names with lora_down, lora_up and alpha"
    can = Capabilities(
        kinds=frozenset({LowRank, DoRA}),
        writes=True,
        components="many",
        alpha="tensor",
        usual_for="single file",
        input_norms=True,
        zero_alpha_is_rank=True,
    )
    ends = ALPHA_ENDS
    loaded_by = ("forge", "invokeai", "sd-scripts", "musubi")
    also_loaded_by = ("comfyui",)
    value_ends = VALUE_ENDS
    flattened = True

    def claims(self, names: Iterable[str]) -> bool:
        return any(name.startswith(KOHYA_PREFIXES) for name in names)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: a tensor is not of LoRA or DoRA.
            UsageError: the alpha of `options` contradicts the file.
        """
        modules: dict[str, dict[str, str]] = {}
        for tensor in file.specs:
            module, role = split_suffix(_mended(tensor))
            if role is None or "." in module:
                raise refused_tensor(tensor, name)
            if (other := modules.setdefault(module, {}).setdefault(role, tensor)) != tensor:
                raise InputError(f"is the same as {other}", culprit=tensor)
        updates = {}
        for module, roles in named_parts(modules).items():
            stored = roles.pop("alpha", None)
            if not roles:
                raise InputError(f"has no lora_down and lora_up beside it in {name}", culprit=stored)
            value = file.scalar(stored) if stored else None
            if value is not None and not math.isfinite(value):
                raise InputError(f"is {value}", culprit=stored)
            if options.alpha is not None and value is not None and options.alpha != value:
                raise UsageError(f"--alpha {options.alpha:g} contradicts the file's {stored} = {value:g}", culprit=name)
            value = options.alpha if value is None else value
            alpha = value if "oft_blocks" in roles else value or None  # there a bound, and no scale
            stored_config = AdapterConfig(alpha=alpha, rank_is_alpha=True)
            for spec in module_updates(module, roles, file, stored_config, f"{module}_bias", options.lenient):
                if spec.module in updates:
                    raise InputError(f"{name} has two updates for it", culprit=spec.module)
                updates[spec.module] = spec
        alphas = {spec.scale * spec.cls.divisor(spec) for spec in updates.values() if spec.cls.divisor(spec)}
        config = replace(AdapterConfig(), alpha=alphas.pop() if len(alphas) == 1 else None)
        return Adapter(name, self.key, file, config, updates, flattened=True, notes=_notes(name, file, modules))

    def module_name(self, component: str, path: str, family: str) -> str:
        prefix = self.require_prefix(FAMILIES[family].component(component, path).kohya, component, path, family)
        return prefix + text_model_path(component, path).replace(".", "_")

    def naming(self, family: str) -> Naming:
        return FAMILIES[family].kohya

    def magnitude_shape(self, rows: int, ones: tuple[int, ...]) -> tuple[int, ...]:
        return (rows, 1, *ones)

    def describe(
        self, family: str, former: Mapping[str, str], modules: Mapping[str, NewModule]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        return {}, network_metadata(family, former, modules)

    def notes(self, family: str, modules: Mapping[str, NewModule]) -> tuple[str, ...]:
        return output_norm_notes(modules)

    def edited_alpha(self, module: str) -> str | None:
        return self.tensor_name(module, "alpha")  # not all readers take the rank for a missing alpha

    def spelling(self, tensor: str) -> str:
        return suffix_of(_mended(tensor))


def _mended(tensor: str) -> str:
    """Return a name with its prefix once, and with the dot that is missing before `lora_down` or `lora_up`."""
    once = _TWICE.sub("", tensor)
    return _UNDOTTED.sub(lambda match: ".alpha" if match[2] == "alpha" else f".{match[1]}.weight", once)


def _notes(name: str, file: WeightsFile, modules: Iterable[str]) -> tuple[str, ...]:
    """Return notes on broken names, those that are read and those that are of two components."""
    notes, broken = [], [tensor for tensor in file.specs if _mended(tensor) != tensor]
    if broken:
        notes.append(
            f"{len(broken)} names of {name} are broken, like {broken[0]}, and are read as {_mended(broken[0])}; other "
            "programs ignore them: `loratool convert` writes names that they read"
        )
    for first, second in dict.fromkeys(match.groups() for module in modules if (match := _OF_TWO.match(module))):
        notes.append(
            f"names of {name} begin with {first}{second}, the prefixes of two components; if they are of the second: "
            f"loratool convert {shell_word(name)} --to kohya --rename '{first}{second}*={second}*'"
        )
    return tuple(notes)


def text_model_path(component: str, path: str) -> str:
    """Return a module's path with `text_model` (transformers before 5), which readers of text encoders expect."""
    return f"text_model.{path}" if component != "unet" and path.startswith("encoder.layers.") else path


def output_norm_notes(modules: Mapping[str, NewModule]) -> tuple[str, ...]:
    """Return the note on DoRA along the outputs: ComfyUI divides by the norm of W, not of W + D.

    As of August 2026 (`comfy/weight_adapter/base.py:weight_decompose`; pull request 15458 would change that).
    """
    count = sum(module.dora and not module.along_inputs for module in modules.values())
    if not count:
        return ()
    what = f"ComfyUI and Forge divide DoRA along outputs ({count} modules) by the norm of the base's weight alone"
    return (f"{what}; `loratool convert --for comfyui --base BASE` writes magnitudes that undo that",)


def network_metadata(family: str, former: Mapping[str, str], modules: Mapping[str, NewModule]) -> dict[str, str]:
    """Return the metadata of sd-scripts, from which web interfaces read a file's rank, alpha and base."""
    version = former.get("ss_base_model_version", FAMILIES[family].kohya_version or None)
    sides = rank_and_alpha((each.rank for each in modules.values()), (each.alpha for each in modules.values()))
    return {
        **former,
        "ss_network_module": FAMILIES[family].kohya_network if modules else WITHOUT_FACTORS,
        **(sides if modules else {}),
        **({"ss_base_model_version": version} if version else {}),
    }


def rank_and_alpha(ranks: Iterable[int], alphas: Iterable[float]) -> dict[str, str]:
    """Return sd-scripts' metadata for the ranks and alphas of a file."""
    sides = {"ss_network_dim": {*map(str, ranks)}, "ss_network_alpha": {*map(str, alphas)}}
    return {key: values.pop() if len(values) == 1 else "Dynamic" for key, values in sides.items()}
