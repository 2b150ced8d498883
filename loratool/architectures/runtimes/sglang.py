"""The modules that SGLang applies LoRA to: it looks up their last names in a layer and ignores prefixes.

Read in `sglang/srt/lora/utils.py` and `lora.py` of 0.5.23.
"""

from __future__ import annotations

from .runtime import BOTH, Served

# Last names in a layer; q, k, v are one matrix there, and so are gate, up and q_a, kv_a
_IN_LAYERS = """q_proj k_proj v_proj qkv_proj o_proj out_proj gate_proj up_proj gate_up_proj down_proj q_a_proj
    kv_a_proj_with_mqa q_b_proj kv_b_proj""".split()

# The full path of a module
MODULES = rf"(?:.*\.)?layers\.\d+\.(?:.*\.)?(?:{'|'.join(_IN_LAYERS)})|(?:.*\.)?(?:embed_tokens|lm_head)"

# SGLang renames w1, w2 and w3 in a layer, and has no sizes for targets of these names
RENAMES = (
    (r"(\.experts\.\d+)\.w1$", r"\1.gate_proj"),
    (r"(\.experts\.\d+)\.w3$", r"\1.up_proj"),
    (r"(\.experts\.\d+)\.w2$", r"\1.down_proj"),
)

# q, k and v are stacked under q's name, and gate and up under gate's; k and up may be missing
NEEDS = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
    "kv_a_proj_with_mqa": ("q_a_proj",),
}

# SGLang's classes; a small model of each was served. It serves all others with transformers' classes, where it does not
# find q, k, v, gate and up under its stacked names and ignores them
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
