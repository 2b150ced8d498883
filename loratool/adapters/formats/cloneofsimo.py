"""Read cloneofsimo's format for SD 1 and SD 2, which numbers modules: `text_encoder:3:down`.

up is (out, r), down is (r, in), the delta is up @ down; there is no alpha. The number counts the linear layers of the
classes listed in the metadata, in the order in which the model registered them: down blocks, up blocks, middle block.
Defined by cloneofsimo/lora: `lora_diffusion/lora.py` (save_safeloras, _find_modules_v2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import final

from ...architectures.families import FAMILIES
from ...architectures.families.unet import ATTENTION, attention_stems
from ...errors import InputError, UsageError
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..config import AdapterConfig
from ..updates.headers import spec_from_roles
from ..updates.low_rank import LowRank
from ..updates.update import UpdateSpec
from .format import Capabilities, Format, ReadOptions

KEY = re.compile(r"(unet|text_encoder):(\d{1,4}):(up|down)")

ROLES = {"down": "A", "up": "B"}

# class -> its linear layers in a transformer block of diffusers at the time, which registered the feed-forward between
# the two attentions
PARTS = {"Attention": [layer for layer in ATTENTION if layer.startswith("attn1.")], "GEGLU": ["ff.net.0.proj"]}

# The format has only SD 1 and SD 2, which have the same blocks.
BLOCKS = attention_stems(FAMILIES["sd1"].up_attention)

CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")

CLASSES = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}


@final
class Cloneofsimo(Format):
    """Files of numbered modules; loratool does not write them."""

    key = "cloneofsimo"
    title = "cloneofsimo: numbered modules"
    can = Capabilities(kinds=frozenset({LowRank}), writes=False, components="many", alpha="none")

    def claims(self, names: Iterable[str]) -> bool:
        return any(KEY.fullmatch(name) for name in names)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: the order of the modules is unknown for these classes and counts.
            UsageError: an alpha was given.
        """
        if options.alpha is not None:
            raise UsageError("--alpha does not apply to this format: its change is up @ down, unscaled", culprit=name)
        by_component: dict[str, dict[int, dict[str, str]]] = {}
        for tensor in file.specs:
            match = KEY.fullmatch(tensor)
            if match is None:
                raise InputError(f"is not a factor; {name} holds more than LoRA", culprit=tensor)
            by_component.setdefault(match[1], {}).setdefault(int(match[2]), {})[ROLES[match[3]]] = tensor
        updates: dict[str, UpdateSpec] = {}
        for component, numbered in by_component.items():
            modules = _modules(name, component, file, len(numbered))
            if set(numbered) != set(range(len(modules))):
                raise InputError(
                    f"has {len(numbered)} modules in {component}, but the model has {len(modules)}: "
                    "they cannot be matched",
                    culprit=name,
                )
            for number, roles in sorted(numbered.items()):
                rank = (file.specs[roles["A"]].shape or (0,))[0] if "A" in roles else 0
                config, module = AdapterConfig(alpha=float(rank)), f"{component}.{modules[number]}"
                updates[module] = spec_from_roles(
                    module, roles, file, config, transposed=False, lenient=options.lenient
                )
        alphas = {spec.scale * spec.rank for spec in updates.values()}
        alone = alphas.pop() if len(alphas) == 1 else None
        return Adapter(name, self.key, file, AdapterConfig(alpha=alone), updates)


def _modules(name: str, component: str, file: WeightsFile, count: int) -> list[str]:
    """Return the paths of a component's modules in the order of their numbers.

    The number of layers of a text encoder follows from `count`, the number of its modules in the file.
    """
    try:
        classes = json.loads((file.metadata or {}).get(component, "null"))
    except (ValueError, RecursionError):
        classes = None
    known = isinstance(classes, list) and all(isinstance(each, str) for each in classes)
    if not known or not classes or not set(classes) <= CLASSES[component]:
        raise InputError(
            f"its metadata does not say {component} as a list of {', '.join(sorted(CLASSES[component]))}", culprit=name
        )
    if component == "text_encoder":
        layers = range(-(-count // len(CLIP)))
        return [f"text_model.encoder.layers.{i}.self_attn.{x}" for i in layers for x in CLIP]
    attends, gates = bool({"CrossAttention", "Attention"} & set(classes)), "GEGLU" in classes
    first, gate = PARTS["Attention"] if attends else [], PARTS["GEGLU"] if gates else []
    layers_of_block = [*first, *gate, *(layer.replace("attn1", "attn2") for layer in first)]
    return [f"{block}.transformer_blocks.0.{layer}" for block in BLOCKS for layer in layers_of_block]
