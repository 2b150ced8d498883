"""List the classes that vLLM serves with adapters, and what each applies of the class that PEFT wraps, with its names.

Asked of vLLM 0.33.0 itself, with transformers 5.20 inside: `tests/served/vllm_server.py` builds the served model and
its LoRA manager on a CPU from a small model of each type and looks every module's name up. A wrapper and its text
class share a type, so that a row is of a type and of the class in config.json. Types without a row were not tried.
"""

from __future__ import annotations

from .runtime import Renames, Served

_MIXTRAL: Renames = (
    (r"\.mlp\.experts\b", ".block_sparse_moe.experts"),
    (r"\.mlp\.(?:gate|router)$", ".block_sparse_moe.gate"),
)
_GRANITE: Renames = ((r"\.block_sparse_moe\.router$", ".block_sparse_moe.gate"),)
_SIGLIP: Renames = ((r"^model\.vision_tower\.encoder\b", "vision_tower.vision_model.encoder"),)
_GEMMA4_UNIFIED: Renames = ((r"^model\.embed_vision\.multimodal_embedder\b", "embed_vision"),)
_SHARED = ".mlp.experts._shared_experts._layer.shared_experts."
_BACKEND: Renames = (  # transformers' class inside vLLM
    (r"\.mlp\.gate$", ".mlp.experts.gate"),
    (r"\.mlp\.(?:shared_experts|shared_mlp)\.", _SHARED),
)
_EXAONE: Renames = (
    (r"^model\.embed_tokens$", "transformer.wte"),
    (r"^model\.layers\.", "transformer.h."),
    (r"\.self_attn\.o_proj$", ".attn.attention.out_proj"),
    (r"\.self_attn\.", ".attn.attention."),
    (r"\.mlp\.gate_proj$", ".mlp.c_fc_0"),
    (r"\.mlp\.up_proj$", ".mlp.c_fc_1"),
    (r"\.mlp\.down_proj$", ".mlp.c_proj"),
)
_W = ("w1", "w3", "w2")


# Types and classes -> what is served; `heads` is for the embedding and lm_head both
_SERVED: tuple[tuple[str, Served], ...] = (
    (
        """arcee:ArceeForCausalLM aya_vision:AyaVisionForConditionalGeneration axk1:AXK1ForCausalLM
        bitnet:BitNetForCausalLM blip-2:Blip2ForConditionalGeneration cohere2:Cohere2ForCausalLM
        cohere:CohereForCausalLM cwm:CwmForCausalLM deepseek_v2:DeepseekV2ForCausalLM
        deepseek_v3:DeepseekV3ForCausalLM deepseek_vl:DeepseekVLForConditionalGeneration
        deepseek_vl_hybrid:DeepseekVLHybridForConditionalGeneration emu3:Emu3ForConditionalGeneration
        ernie4_5_moe:Ernie4_5_MoeForCausalLM flex_olmo:FlexOlmoForCausalLM gemma2:Gemma2ForCausalLM
        gemma3_text:Gemma3ForCausalLM gemma4_text:Gemma4ForCausalLM gemma4_unified_text:Gemma4UnifiedForCausalLM
        gemma:GemmaForCausalLM glm46v:Glm46VForConditionalGeneration glm4:Glm4ForCausalLM
        glm4_moe:Glm4MoeForCausalLM glm4_moe_lite:Glm4MoeLiteForCausalLM glm:GlmForCausalLM
        glmga:Glm46VForConditionalGeneration got_ocr2:GotOcr2ForConditionalGeneration
        gpt_neox:GPTNeoXForCausalLM helium:HeliumForCausalLM hunyuan_v1_dense:HunYuanDenseV1ForCausalLM
        hunyuan_vl:HunYuanVLForConditionalGeneration
        hyperclovax_vision_v2:HyperCLOVAXVisionV2ForConditionalGeneration
        idefics2:Idefics2ForConditionalGeneration internvl:InternVLForConditionalGeneration
        jais2:Jais2ForCausalLM lighton_ocr:LightOnOcrForConditionalGeneration ministral3:Ministral3ForCausalLM
        ministral:MinistralForCausalLM mistral3:Mistral3ForConditionalGeneration mistral:MistralForCausalLM
        mllama:MllamaForConditionalGeneration nanochat:NanoChatForCausalLM olmo2:Olmo2ForCausalLM
        olmo3:Olmo3ForCausalLM olmo:OlmoForCausalLM olmoe:OlmoeForCausalLM opt:OPTForCausalLM
        ovis2:Ovis2ForConditionalGeneration persimmon:PersimmonForCausalLM phi:PhiForCausalLM
        phimoe:PhimoeForCausalLM qwen2:Qwen2ForCausalLM qwen2_moe:Qwen2MoeForCausalLM
        qwen3_next:Qwen3NextForCausalLM seed_oss:SeedOssForCausalLM smollm3:SmolLM3ForCausalLM
        starcoder2:Starcoder2ForCausalLM vaultgemma:VaultGemmaForCausalLM
        video_llama_3:VideoLlama3ForConditionalGeneration video_llava:VideoLlavaForConditionalGeneration
        vipllava:VipLlavaForConditionalGeneration youtu:YoutuForCausalLM zaya:ZayaForCausalLM""",
        Served(),
    ),
    (
        """apertus:ApertusForCausalLM ernie4_5:Ernie4_5ForCausalLM exaone4:Exaone4ForCausalLM
        exaone_moe:ExaoneMoeForCausalLM falcon_h1:FalconH1ForCausalLM granite:GraniteForCausalLM
        granite_swa:GraniteSWAForCausalLM hyperclovax:HyperCLOVAXForCausalLM internlm3:LlamaForCausalLM
        iquestcoder:LlamaForCausalLM jamba:JambaForCausalLM lfm2:Lfm2ForCausalLM
        lfm2_vl:Lfm2VlForConditionalGeneration llama4:Llama4ForCausalLM llama4_text:Llama4ForCausalLM
        llama:LlamaForCausalLM llava:LlavaForConditionalGeneration llava_next:LlavaNextForConditionalGeneration
        llava_next_video:LlavaNextVideoForConditionalGeneration minicpm3:MiniCPM3ForCausalLM
        minicpmv4_6:MiniCPMV4_6ForConditionalGeneration minicpmv4_7:MiniCPMV4_7ForConditionalGeneration
        nemotron:NemotronForCausalLM phi3:Phi3ForCausalLM qwen3:Qwen3ForCausalLM qwen3_5:Qwen3_5ForCausalLM
        qwen3_5_moe:Qwen3_5MoeForCausalLM qwen3_5_moe_text:Qwen3_5MoeForCausalLM
        qwen3_5_text:Qwen3_5ForCausalLM qwen3_moe:Qwen3MoeForCausalLM""",
        Served(heads=True),
    ),
    ("exaone4_5:Exaone4_5_ForConditionalGeneration llama4:Llama4ForConditionalGeneration", Served(True, towers=True)),
    ("qwen3_5:Qwen3_5ForConditionalGeneration qwen3_vl:Qwen3VLForConditionalGeneration", Served(True, towers=True)),
    ("qwen2_5_vl:Qwen2_5_VLForConditionalGeneration qwen2_vl:Qwen2VLForConditionalGeneration", Served(towers=True)),
    ("idefics3:Idefics3ForConditionalGeneration smolvlm:SmolVLMForConditionalGeneration", Served(towers=True)),
    ("gemma4:Gemma4ForConditionalGeneration", Served(towers=True)),
    (
        "gemma4_unified:Gemma4UnifiedForConditionalGeneration",
        Served(towers=True, renames=_GEMMA4_UNIFIED, never=r"\.patch_dense$"),
    ),
    (
        "gemma3:Gemma3ForConditionalGeneration",
        Served(towers=True, renames=_SIGLIP, never=r"\bvision_tower\.head\."),
    ),
    (
        "paligemma:PaliGemmaForConditionalGeneration",
        Served(towers=True, renames=_SIGLIP, never=r"\bmulti_modal_projector\b"),
    ),
    (
        "glm4v:Glm4vForConditionalGeneration glm_ocr:GlmOcrForConditionalGeneration",
        Served(towers=True, never=r"\bvisual\..*\.(?:qkv|gate_proj|up_proj)$"),
    ),
    ("glm4v_moe:Glm4vMoeForConditionalGeneration", Served(towers=True, never=r"\bvisual\..*\.qkv$")),
    ("gpt_oss:GptOssForCausalLM", Served(stacks=True)),
    ("qwen3_5_moe:Qwen3_5MoeForConditionalGeneration", Served(True, stacks=True, towers=True)),
    (
        "qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration",
        Served(True, stacks=True, towers=True, never=r"\bvisual\..*\.qkv$"),
    ),
    ("afmoe:AfmoeForCausalLM", Served(renames=((r"\.mlp\.router\.gate$", ".mlp.gate"),))),
    ("exaone:ExaoneForCausalLM", Served(True, renames=_EXAONE)),
    ("granitemoe:GraniteMoeForCausalLM granitemoehybrid:GraniteMoeHybridForCausalLM", Served(True, renames=_GRANITE)),
    (
        "granitemoe_swa:GraniteMoeSWAForCausalLM granitemoeshared:GraniteMoeSharedForCausalLM",
        Served(True, renames=_GRANITE, never=r"\.shared_mlp\.input_linear$"),
    ),
    ("laguna:LagunaForCausalLM", Served(renames=((r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),))),
    ("lfm2_moe:Lfm2MoeForCausalLM", Served(True, experts=_W)),
    ("minimax_m2:MiniMaxM2ForCausalLM", Served(experts=_W, renames=_MIXTRAL)),
    ("mixtral:MixtralForCausalLM phimoe:PhiMoEForCausalLM", Served(True, experts=_W, renames=_MIXTRAL)),
    ("nemotron_h:NemotronHForCausalLM", Served(True, never=r"\.mixer\.gate$|^mtp\.")),
    (
        """axk2:AXK2ForCausalLM dots1:Dots1ForCausalLM hunyuan_v1_moe:HunYuanMoEV1ForCausalLM
        mellum:MellumForCausalLM mistral4:Mistral4ForCausalLM solar_open:SolarOpenForCausalLM""",
        Served(renames=_BACKEND),
    ),
    ("kolibri1:Kolibri1ForCausalLM", Served(renames=_BACKEND[1:], never=r"\.mlp\.gate$")),
)


CLASSES = {key: served for keys, served in _SERVED for key in keys.split()}


# Classes that start without adapters only
WITHOUT = frozenset(
    """AriaForConditionalGeneration BeamForCausalLM BloomForCausalLM Cohere2MoeForCausalLM
    Cohere2VisionForConditionalGeneration Cosmos3EdgeForConditionalGeneration DbrxForCausalLM
    DeepseekV4ForCausalLM DiffusionGemmaForBlockDiffusion DoryForCausalLM FalconForCausalLM
    FalconMambaForCausalLM FlintForCausalLM GPT2LMHeadModel GPTJForCausalLM Gemma3nForCausalLM
    Gemma3nForConditionalGeneration HrmTextForCausalLM LlavaOnevisionForConditionalGeneration Mamba2ForCausalLM
    MambaForCausalLM MiMoV2FlashForCausalLM MiniMaxM3SparseForConditionalGeneration
    MossTranscribeDiarizeForConditionalGeneration PaddleOCRVLForConditionalGeneration StableLmForCausalLM
    Step3p7ForConditionalGeneration Zamba2ForCausalLM""".split()
)
