"""Split a tensor's name into module and role, by one table of suffixes for all formats with such names.

All suffixes are known for all names, whatever the component's prefix and the path.
Defined by kohya-ss/sd-scripts: `networks/lora.py`; diffusers: `loaders/lora_conversion_utils.py`; ComfyUI:
`comfy/lora.py`; LyCORIS and OneTrainer (`dora_scale`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..updates import UPDATES, peft_methods
from .kohya_oft import PART

# suffix of a tensor's name -> its role
SUFFIXES: Mapping[str, str] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".lora_B.bias": "bias",
    ".set_weight": "set",
    ".reshape_weight": "reshape",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".magnitude": "magnitude",
    ".dora_scale": "magnitude",
    **{suffix: role for cls in UPDATES.values() for suffix, role in cls.suffixes.items()},
    ".q_layer.weight": "q_layer",
    ".p_layer.weight": "p_layer",
    ".lambda_layer": "lambda_layer",
}
# role -> suffix of a new tensor's name, in formats with an alpha beside the factors, and in those without
ALPHA_ENDS = {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude": "dora_scale", "alpha": "alpha"}
PLAIN_ENDS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# changes without factors -> suffix of a new tensor's name: differences of a weight, of its bias, of a norm's weight and
# its bias (LyCORIS, ComfyUI), a new weight, and the shape to which columns of zeros widen the base's (ComfyUI)
VALUE_ENDS = {
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    "set": "set_weight",
    "reshape": "reshape_weight",
}
# suffixes of XLabs' names, after the path of an attention processor
PROCESSOR_SUFFIXES: Mapping[str, str] = {".down.weight": "A", ".up.weight": "B"}
PROCESSOR = re.compile(r".*\.processor\.(?:qkv|proj)_lora[12]?")
# suffixes that only adapters have: a weight may be a model's
FACTORS = tuple(
    suffix for suffix, role in SUFFIXES.items() if role not in ("alpha", "magnitude", "weight", "bias", "reshape")
)
# suffixes that PEFT's names also have
PEFTS = tuple(suffix for suffix in SUFFIXES if ".lora_A" in suffix or ".lora_B" in suffix or "_magnitude_" in suffix)
# suffixes that PEFT's names never have; some kinds, as LoHa, have the same in both
_ALIKE = {".weight", *(f".{end}" for each in peft_methods().values() for end in each.ends)}
NOT_PEFTS = tuple(end for end in SUFFIXES if end not in PEFTS and end not in _ALIKE)
_LONGEST_FIRST = sorted(SUFFIXES, key=len, reverse=True)


def split_suffix(tensor: str) -> tuple[str, str | None]:
    """Return a tensor's module and its role; the full name and None if the suffix is unknown.

    The role of a part of kohya's OFT of Flux is its number.
    """
    for suffix, role in PROCESSOR_SUFFIXES.items():
        module = tensor.removesuffix(suffix)
        if module != tensor and PROCESSOR.fullmatch(module):
            return module, role
    if match := PART.fullmatch(tensor):
        return match[1], match[2]
    for suffix in _LONGEST_FIRST:
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix), SUFFIXES[suffix]
    return tensor, None


def suffix_of(tensor: str) -> str:
    """Return the suffix of a factor's name; the full name if the suffix is unknown."""
    return next((suffix for suffix in _LONGEST_FIRST if tensor.endswith(suffix)), tensor)
