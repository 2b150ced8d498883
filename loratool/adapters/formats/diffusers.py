"""Name and describe the adapters that diffusers' pipelines load: dotted names, and PEFT's configs in the metadata.

Defined by diffusers: `loaders/lora_base.py` (`_lora_loadable_modules`, `LORA_ADAPTER_METADATA_KEY`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, final

from ...architectures.families import FAMILIES
from ...architectures.families.table import DENOISERS
from ..updates.dora import DoRA
from ..updates.low_rank import LowRank
from .content import NewModule
from .dotted import DottedFormat, has_dotted_factors, metadata_of, split_component
from .format import Capabilities
from .peft_config import config_of_component
from .suffixes import PLAIN_ENDS


@final
class Diffusers(DottedFormat):
    """Files of dotted names in diffusers' naming, whose alphas are in the metadata."""

    key = "diffusers"
    title = "diffusers: lora_A and lora_B by component, alphas in the metadata"
    can = Capabilities(
        kinds=frozenset({LowRank, DoRA}),
        writes=True,
        components="many",
        alpha="metadata",
        usual_for="pipeline",
        starts=True,
    )
    ends = PLAIN_ENDS
    loaded_by = ("diffusers",)
    value_ends: ClassVar[Mapping[str, str]] = {"bias": "lora_B.bias", "norm": "weight"}

    def claims(self, names: Iterable[str]) -> bool:
        return has_dotted_factors(names)

    def module_name(self, component: str, path: str, family: str) -> str:
        return FAMILIES[family].component(component, path).diffusers + path

    def describe(
        self, family: str, former: Mapping[str, str], modules: Mapping[str, NewModule]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        parts: dict[str, dict[str, NewModule]] = {}
        for name, module in modules.items():
            component, path = split_component(name)
            parts.setdefault(component, {})[path] = module
        by_component = metadata_of({part: config_of_component(of) for part, of in parts.items()})
        return {}, {**former, "format": "pt", **by_component}

    def notes(self, family: str, modules: Mapping[str, NewModule]) -> tuple[str, ...]:
        encoders = {each.name: each.encoder for each in FAMILIES[family].components[1:] if each.name not in DENOISERS}
        notes = self._alpha_notes(modules)
        unread = [name for name, module in modules.items() if encoders.get(module.component, "clip") != "clip"]
        if not unread:
            return notes
        t5 = all(encoders[modules[name].component] == "t5" for name in unread)
        what = "T5" if t5 else "text encoder other than CLIP"
        first = f"{len(unread)} modules will not be read, like {unread[0]}"
        return (*notes, f"diffusers loads no adapter of a {what}: {first}")

    def _alpha_notes(self, modules: Mapping[str, NewModule]) -> tuple[str, ...]:
        """Return the note on scales that are only in the metadata; `comfy/lora.py` ignores it and takes scale 1."""
        scaled = [module for module in modules.values() if module.alpha != module.rank]
        if not scaled:
            return ()
        remedy = "--for comfyui --base BASE" if any(module.dora for module in modules.values()) else "--plain"
        what = f"the alphas of {len(scaled)} modules are only in the metadata, which diffusers reads"
        others = "ComfyUI and sd-scripts do not, and take 1 as their scale"
        return (f"{what}; {others}: `loratool convert {remedy}` writes what they apply in full",)
