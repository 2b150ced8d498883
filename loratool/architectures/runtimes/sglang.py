"""Tell the modules of which SGLang applies LoRA: it looks for their last names, in a layer, and no prefix counts.

Read in `sglang/srt/lora/utils.py` and `lora.py` of 0.5.23.
"""

from __future__ import annotations

from .runtime import BOTH, Served

# Last names in a layer; q, k, v and gate, up are one matrix there, and so are q_a and kv_a
_IN_LAYERS = """q_proj k_proj v_proj qkv_proj o_proj out_proj gate_proj up_proj gate_up_proj down_proj q_a_proj
    kv_a_proj_with_mqa q_b_proj kv_b_proj""".split()

# The whole path of a module
MODULES = rf"(?:.*\.)?layers\.\d+\.(?:.*\.)?(?:{'|'.join(_IN_LAYERS)})|(?:.*\.)?(?:embed_tokens|lm_head)"

# It renames w1, w2 and w3 in a layer, and has no sizes for targets of these names
RENAMES = (
    (r"(\.experts\.\d+)\.w1$", r"\1.gate_proj"),
    (r"(\.experts\.\d+)\.w3$", r"\1.up_proj"),
    (r"(\.experts\.\d+)\.w2$", r"\1.down_proj"),
)

# q, k and v are stacked by the name of q's, and gate and up by gate's; k may be missing, and up
NEEDS = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
    "kv_a_proj_with_mqa": ("q_a_proj",),
}

# Classes of its own, of each of which a small model was served: it serves all others by transformers' classes, where q,
# k, v, gate and up are not found under the names that it stacks them by, and dropped
CLASSES = dict.fromkeys(
    """ApertusForCausalLM Cohere2ForCausalLM CohereForCausalLM DeepseekV3ForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM Gemma3ForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM
    Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
    GlmOcrForConditionalGeneration GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
    GraniteSWAForCausalLM LagunaForCausalLM LlamaForCausalLM MellumForCausalLM MiniMaxM2ForCausalLM
    Ministral3ForCausalLM MistralForCausalLM MixtralForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM
    Phi3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen2_5_VLForConditionalGeneration
    Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Starcoder2ForCausalLM""".split(),
    Served(BOTH),
)
