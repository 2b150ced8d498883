"""Families with separate experts in files and stacked experts in classes, and the layout of the stacks.

Source: the converters with `MergeModulelist` and `Transpose` of `transformers.conversion_mapping` of 5.24, and the
classes' `is_transposed`, which PEFT reads.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from .renames import canonical

# The last part of one expert's path -> (parameter of all experts, number of its slice of the rows, number of slices)
ExpertRows = dict[str, tuple[str, int, int]]

_GATE_UP_DOWN: ExpertRows = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}

_W1_W3_W2: ExpertRows = {
    "w1": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
}

# The parameter of a stack -> the projections that make up its rows
PARTS_OF_STACKS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}

# Types whose files have one matrix for each expert (`...experts.3.w1.weight`) and whose models have one 3-D parameter.
EXPERTS: dict[str, ExpertRows] = {
    **dict.fromkeys(
        """afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 dots1
        dots3_note_text ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite
        glm4v_moe glm5_next glm5_next_text glm_moe_dsa hunyuan_v1_moe hy_v3 jamba kimi_k25 kolibri1 laguna
        longcat_flash mellum mimo_v2_flash olmoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next
        qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker qwen4_exp_text sarvam_mla sarvam_moe
        solar_open unlimited_ocr""".split(),
        _GATE_UP_DOWN,
    ),
    **dict.fromkeys(
        """deepseek_v4 kimi_linear lfm2_moe minimax minimax_m2 minimax_m3_vl mistral_large4_text mixtral
        phimoe""".split(),
        _W1_W3_W2,
    ),
    "dots3_note": {  # of the language model, and of the tower
        **_GATE_UP_DOWN,
        "fc1": ("gate_up_proj", 0, 2),
        "fc3": ("gate_up_proj", 1, 2),
        "fc2": ("down_proj", 0, 1),
    },
    "nemotron_h": {"up_proj": ("up_proj", 0, 1), "down_proj": ("down_proj", 0, 1)},
}

# Types whose files count all experts in one sequence and whose class has two stacks, each with half of them -> the
# replacements of `.experts.` in the stacks' paths.
HALVED_EXPERTS = {"ernie4_5_vl_moe": (".text_moe.experts.", ".vision_moe.experts.")}

# Types whose 3-D expert parameters are (expert, in, out); all others have (expert, out, in).
TRANSPOSED_EXPERTS = frozenset({"aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"})

# Types whose class has (expert, out, in) and whose files have either layout: a stack that does not fit is transposed.
TRANSPOSED_TO_FIT = frozenset({"qwen3_vl_moe_text"})

# Types whose `gate_up_proj` alternates rows of gate and up; in all others gate is before up.
INTERLEAVED_EXPERTS = frozenset({"gpt_oss"})

# Types of TRANSPOSED_EXPERTS without `is_transposed` in the class; PEFT takes them for (expert, out, in).
PEFT_TAKES_AS_PLAIN = frozenset({"llama4", "llama4_text"})


@dataclass(frozen=True)
class ExpertPart:
    """The rows of a fused parameter that are one matrix of an expert.

    They are rows [part * n, (part + 1) * n) of `fused[expert]`, which has parts * n rows.
    """

    fused: str  # name of the 3-D parameter
    expert: int
    part: int
    parts: int


def expert_part(name: str, model_types: Collection[str]) -> ExpertPart | None:
    """Locate one expert's matrix in the fused parameter; None for any other tensor, also for scales and biases."""
    path = canonical(name, model_types)
    match = re.fullmatch(r"(.*\bexperts)\.(\d{1,9})\.(\w+?)(?:\.weight)?", path) if "experts." in path else None
    if match is None:
        return None
    for model_type, rows in EXPERTS.items():
        if model_type in model_types and match[3] in rows:
            fused, part, parts = rows[match[3]]
            return ExpertPart(f"{match[1]}.{fused}", int(match[2]), part, parts)
    return None
