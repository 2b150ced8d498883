"""The classes that vLLM serves with adapters, and the modules of each that it applies them to.

Found by running vLLM 0.33.0 with transformers 5.20: `tests/served/vllm_server.py` builds the served model and its LoRA
manager on a CPU from a small model of each type and looks up every module's name. A wrapper and its text class share a
type, so a row is for a type and the class in config.json. Types without a row were not tried.
"""

from __future__ import annotations

from .runtime import BOTH, EMBEDDING, Renames, Served

_MIXTRAL: Renames = (
    (r"\.mlp\.experts\b", ".block_sparse_moe.experts"),
    (r"\.mlp\.(?:gate|router)$", ".block_sparse_moe.gate"),
)
_GRANITE: Renames = ((r"\.block_sparse_moe\.router$", ".block_sparse_moe.gate"),)
_SIGLIP: Renames = ((r"^model\.vision_tower\.encoder\b", "vision_tower.vision_model.encoder"),)
_GEMMA4_UNIFIED: Renames = ((r"^model\.embed_vision\.multimodal_embedder\b", "embed_vision"),)
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

# Types and classes -> what is served; `heads` is for both embedding and lm_head
_SERVED: tuple[tuple[str, Served], ...] = (
    (
        """axk1:AXK1ForCausalLM aya_vision:AyaVisionForConditionalGeneration bitnet:BitNetForCausalLM
        blip-2:Blip2ForConditionalGeneration deepseek_v2:DeepseekV2ForCausalLM deepseek_v3:DeepseekV3ForCausalLM
        deepseek_vl:DeepseekVLForConditionalGeneration
        deepseek_vl_hybrid:DeepseekVLHybridForConditionalGeneration emu3:Emu3ForConditionalGeneration
        ernie4_5_moe:Ernie4_5_MoeForCausalLM gemma2:Gemma2ForCausalLM gemma3_text:Gemma3ForCausalLM
        gemma4_text:Gemma4ForCausalLM gemma4_unified_text:Gemma4UnifiedForCausalLM gemma:GemmaForCausalLM
        glm4_moe:Glm4MoeForCausalLM glm4_moe_lite:Glm4MoeLiteForCausalLM
        got_ocr2:GotOcr2ForConditionalGeneration helium:HeliumForCausalLM
        hunyuan_vl:HunYuanVLForConditionalGeneration
        hyperclovax_vision_v2:HyperCLOVAXVisionV2ForConditionalGeneration
        idefics2:Idefics2ForConditionalGeneration internvl:InternVLForConditionalGeneration
        lighton_ocr:LightOnOcrForConditionalGeneration ministral3:Ministral3ForCausalLM
        ministral:MinistralForCausalLM mistral3:Mistral3ForConditionalGeneration mistral:MistralForCausalLM
        mllama:MllamaForConditionalGeneration nanochat:NanoChatForCausalLM olmoe:OlmoeForCausalLM
        opt:OPTForCausalLM ovis2:Ovis2ForConditionalGeneration persimmon:PersimmonForCausalLM
        qwen2:Qwen2ForCausalLM qwen2_moe:Qwen2MoeForCausalLM qwen3_next:Qwen3NextForCausalLM
        video_llama_3:VideoLlama3ForConditionalGeneration video_llava:VideoLlavaForConditionalGeneration
        vipllava:VipLlavaForConditionalGeneration youtu:YoutuForCausalLM""",
        Served(),
    ),
    (
        """arcee:ArceeForCausalLM cohere2:Cohere2ForCausalLM cohere:CohereForCausalLM cwm:CwmForCausalLM
        glm:GlmForCausalLM gpt_neox:GPTNeoXForCausalLM hunyuan_v1_dense:HunYuanDenseV1ForCausalLM
        jais2:Jais2ForCausalLM olmo2:Olmo2ForCausalLM olmo3:Olmo3ForCausalLM olmo:OlmoForCausalLM
        phi:PhiForCausalLM seed_oss:SeedOssForCausalLM smollm3:SmolLM3ForCausalLM
        starcoder2:Starcoder2ForCausalLM vaultgemma:VaultGemmaForCausalLM""",
        Served(EMBEDDING),
    ),
    ("glm4:Glm4ForCausalLM", Served(splits=("gate_up_proj",))),
    (
        "glm46v:Glm46VForConditionalGeneration glmga:Glm46VForConditionalGeneration",
        Served(never=r"\.mlp\.gate_up_proj$"),
    ),
    (
        """apertus:ApertusForCausalLM ernie4_5:Ernie4_5ForCausalLM exaone4:Exaone4ForCausalLM
        exaone_moe:ExaoneMoeForCausalLM falcon_h1:FalconH1ForCausalLM granite:GraniteForCausalLM
        granite_swa:GraniteSWAForCausalLM hyperclovax:HyperCLOVAXForCausalLM internlm3:LlamaForCausalLM
        iquestcoder:LlamaForCausalLM jamba:JambaForCausalLM lfm2:Lfm2ForCausalLM
        lfm2_vl:Lfm2VlForConditionalGeneration
        llama:LlamaForCausalLM llava:LlavaForConditionalGeneration llava_next:LlavaNextForConditionalGeneration
        llava_next_video:LlavaNextVideoForConditionalGeneration minicpm3:MiniCPM3ForCausalLM
        minicpmv4_6:MiniCPMV4_6ForConditionalGeneration minicpmv4_7:MiniCPMV4_7ForConditionalGeneration
        nemotron:NemotronForCausalLM phi3:Phi3ForCausalLM qwen3:Qwen3ForCausalLM qwen3_5:Qwen3_5ForCausalLM
        qwen3_5_moe:Qwen3_5MoeForCausalLM qwen3_5_moe_text:Qwen3_5MoeForCausalLM
        qwen3_5_text:Qwen3_5ForCausalLM qwen3_moe:Qwen3MoeForCausalLM""",
        Served(BOTH),
    ),
    ("exaone4_5:Exaone4_5_ForConditionalGeneration", Served(BOTH, towers=True)),
    ("llama4:Llama4ForConditionalGeneration", Served(BOTH, towers=True, turns_rotary=True)),
    ("llama4:Llama4ForCausalLM llama4_text:Llama4ForCausalLM", Served(BOTH, turns_rotary=True)),
    ("qwen3_5:Qwen3_5ForConditionalGeneration qwen3_vl:Qwen3VLForConditionalGeneration", Served(BOTH, towers=True)),
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
    ("qwen3_5_moe:Qwen3_5MoeForConditionalGeneration", Served(BOTH, stacks=True, towers=True)),
    (
        "qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration",
        Served(BOTH, stacks=True, towers=True, never=r"\bvisual\..*\.qkv$"),
    ),
    ("afmoe:AfmoeForCausalLM", Served(renames=((r"\.mlp\.router\.gate$", ".mlp.gate"),))),
    ("exaone:ExaoneForCausalLM", Served(BOTH, renames=_EXAONE)),
    ("granitemoe:GraniteMoeForCausalLM", Served(BOTH, renames=_GRANITE)),
    ("granitemoehybrid:GraniteMoeHybridForCausalLM", Served(BOTH, takes_experts=False, renames=_GRANITE)),
    (
        "granitemoe_swa:GraniteMoeSWAForCausalLM granitemoeshared:GraniteMoeSharedForCausalLM",
        Served(BOTH, renames=_GRANITE, never=r"\.shared_mlp\.input_linear$"),
    ),
    ("laguna:LagunaForCausalLM", Served(renames=((r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),))),
    ("lfm2_moe:Lfm2MoeForCausalLM", Served(BOTH, experts=_W)),
    ("minimax_m2:MiniMaxM2ForCausalLM", Served(experts=_W, renames=_MIXTRAL)),
    ("mixtral:MixtralForCausalLM phimoe:PhiMoEForCausalLM", Served(BOTH, experts=_W, renames=_MIXTRAL)),
    ("nemotron_h:NemotronHForCausalLM", Served(BOTH, never=r"\.mixer\.gate$|^mtp\.")),
    (  # transformers' class inside vLLM, which accepts neither experts nor modules beside them
        """axk2:AXK2ForCausalLM dots1:Dots1ForCausalLM flex_olmo:FlexOlmoForCausalLM
        hunyuan_v1_moe:HunYuanMoEV1ForCausalLM kolibri1:Kolibri1ForCausalLM mellum:MellumForCausalLM
        mistral4:Mistral4ForCausalLM phimoe:PhimoeForCausalLM solar_open:SolarOpenForCausalLM zaya:ZayaForCausalLM""",
        Served(EMBEDDING, takes_experts=False, never=r"\.mlp\.(?:gate|router|shared_experts|shared_mlp)\b"),
    ),
)

CLASSES = {key: served for keys, served in _SERVED for key in keys.split()}

# Classes that start only without adapters
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
