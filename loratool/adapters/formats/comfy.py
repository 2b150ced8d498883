"""Name and describe ComfyUI's adapters: dotted names in the model's own naming, with kohya's factors and alphas.

Defined by ComfyUI: `comfy/lora.py` (`model_lora_keys_unet`, `model_lora_keys_clip`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

from ...architectures.families import FAMILIES
from ...architectures.families.table import Naming
from ..updates.dora import DoRA
from ..updates.low_rank import LowRank
from .content import NewModule
from .dotted import DottedFormat, has_dotted_factors
from .format import Capabilities
from .kohya import network_metadata, output_norm_notes, text_model_path
from .suffixes import ALPHA_ENDS, VALUE_ENDS

PREFIXES = ("diffusion_model.", "text_encoders.")


@final
class Comfy(DottedFormat):
    """Files of dotted names in the makers' naming, whose alphas are tensors."""

    key = "comfy"
    title = "ComfyUI: the model's own names with lora_down, lora_up and alpha"
    can = Capabilities(
        kinds=frozenset({LowRank, DoRA}), writes=True, components="many", alpha="tensor", input_norms=True
    )
    ends = ALPHA_ENDS
    loaded_by = ("comfyui",)
    value_ends = VALUE_ENDS

    def claims(self, names: Iterable[str]) -> bool:
        names = list(names)
        return has_dotted_factors(names) and any(name.startswith(PREFIXES) for name in names)

    def module_name(self, component: str, path: str, family: str) -> str:
        prefix = self.require_prefix(FAMILIES[family].component(component, path).comfy, component, path, family)
        return prefix + text_model_path(component, path)

    def naming(self, family: str) -> Naming:
        return Naming.COMFY

    def magnitude_shape(self, rows: int, ones: tuple[int, ...]) -> tuple[int, ...]:
        return (rows, 1, *ones)

    def describe(
        self, family: str, former: Mapping[str, str], modules: Mapping[str, NewModule]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        return {}, network_metadata(family, former, modules)

    def notes(self, family: str, modules: Mapping[str, NewModule]) -> tuple[str, ...]:
        return output_norm_notes(modules)
