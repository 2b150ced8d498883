"""Families with linear layers of transformers' `Conv1D`, which stores a weight as (in, out).

Other layers of these models, such as the head, are `nn.Linear`, so the table has the last parts of module names.
Source: the uses of `pytorch_utils.Conv1D` in transformers 5.24. mlx-lm transposes GPT-2's on loading and saves them as
(out, in), under a prefix that no other file of the family has.
"""

from __future__ import annotations

from collections.abc import Collection

CONV1D_MODULES = {
    "clvp": {"c_fc", "c_proj"},
    "clvp_decoder": {"c_fc", "c_proj"},
    "decision_transformer": {"c_attn", "q_attn", "c_fc", "c_proj"},
    "gpt2": {"c_attn", "q_attn", "c_fc", "c_proj"},
    "imagegpt": {"c_attn", "q_attn", "c_fc", "c_proj"},
    "openai-gpt": {"c_attn", "c_fc", "c_proj"},
}

MLX_PREFIXES = {"gpt2": "model.h."}

# Types without `Conv1D`, including towers: their square matrices, whose shape does not show the layout, are (out, in).
LINEAR_MODEL_TYPES = frozenset(
    """afmoe albert apertus apertus1p5 apertus1p5_text apertus1p5_vision_tokenizer arcee aria aria_text axk1 axk2
    aya_vision bailing_hybrid bamba bart beam bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot
    blenderbot-small blip blip-2 blip_2_qformer blip_2_vision_model blip_text_model blip_vision_model bloom blt
    blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher camembert chameleon chameleon_vqgan
    clip_vision_model codegen cohere cohere2 cohere2_moe cohere2_vision cohere_compass cohere_compass_text
    cohere_compass_vision cosmos3_edge cosmos3_edge_text cosmos3_edge_vision cosmos3_omni cpmant ctrl cwm
    data2vec-text dbrx deepseek_ocr2 deepseek_ocr2_encoder deepseek_ocr2_sam_vision_model deepseek_ocr2_text
    deepseek_ocr2_vision deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 deepseek_vl deepseek_vl_hybrid diffllama
    diffusion_gemma diffusion_gemma_text distilbert doge dory dots1 dots3_note dots3_note_audio_encoder
    dots3_note_text dots3_note_vision_encoder electra emu3 emu3_text_model emu3_vqgan encodec ernie ernie4_5
    ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text ernie4_5_vl_moe_vision evolla exaone exaone4 exaone4_5
    exaone4_5_vision exaone_moe falcon falcon_h1 falcon_mamba fast_vlm flex_olmo flint florence2 florence_vision
    fuyu gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_audio gemma3n_text gemma3n_vision gemma4 gemma4_assistant
    gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text gemma4_vision git git_vision_model glm
    glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text glm4v_moe_vision glm4v_text glm4v_vision
    glm5_next glm5_next_text glm5_next_vision glm_moe_dsa glm_ocr glm_ocr_text glm_ocr_vision glmga got_ocr2
    got_ocr2_vision gpt-sw3 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite4_vision
    granite4_vision_text granite_docling granite_docling_text granite_docling_vision granite_swa granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl
    hunyuan_vl_text hunyuan_vl_vision hy_v3 hy_v4 hy_v4_vl hy_v4_vl_text hy_v4_vl_vision hyperclovax
    hyperclovax_vision_v2 idefics idefics2 idefics2_perceiver idefics2_vision idefics3 idefics3_vision
    idefics_perciever idefics_vision inkling2 inkling2_loop inkling2_loop_text inkling2_text inkling2_vision
    inkling_audio inkling_mm_model inkling_text inkling_vision instructblip instructblip_qformer
    instructblip_vision_model instructblipvideo instructblipvideo_qformer instructblipvideo_vision_model internlm2
    internlm3 internvl internvl_vision iquestcoder jais2 jamba janus janus_vision_model janus_vqgan jetmoe kimi_k25
    kimi_k25_vision kimi_linear kolibri1 kosmos-2 kosmos-2.5 kosmos_2_5_text_model kosmos_2_5_vision_model
    kosmos_2_text_model kosmos_2_vision_model laguna lara_mini lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lfm3_vl_vision
    lighton_ocr llama llama4 llama4_text llama4_vision_model llava llava_next llava_next_video llava_onevision
    longcat_flash mamba mamba2 marian mbart megatron-bert mellum mimi mimo_v2_flash minicpm3 minicpm_ocr
    minicpm_ocr_vision minicpmv4_6 minicpmv4_6_vision minicpmv4_7 minicpmv4_7_vision minimax minimax_m2
    minimax_m3_vl minimax_m3_vl_text minimax_m3_vl_vision ministral ministral3 mistral mistral3 mistral4
    mistral_large4 mistral_large4_text mixtral mllama mllama_text_model mllama_vision_model modernbert
    modernbert-decoder molmo2 molmo2_adapter molmo2_text molmo2_vision moshi moshi_depth moss_transcribe_diarize
    moss_transcribe_diarize_audio mpt muse_glimmer muse_glimmer_text muse_glimmer_vision muse_spark muse_spark_audio
    muse_spark_text muse_spark_vision musicgen musicgen_decoder musicgen_melody musicgen_melody_decoder mvp nanochat
    nemotron nemotron_h nemotron_h_omni olmo olmo2 olmo3 olmo_hybrid olmoe opt ovis2 ovis2_vision paddleocr_vl
    paddleocr_vl_text paddleocr_vl_vision paligemma pegasus perception_lm persimmon phi phi3 phi4_multimodal
    phi4_multimodal_audio phi4_multimodal_vision phimoe pi0 pix2struct pix2struct_text_model pix2struct_vision_model
    pixtral plbart pp_chart2table pp_chart2table_vision pp_formulanet pp_formulanet_text pp_formulanet_vision
    prophetnet qianfan_ocr qianfan_ocr_vision qwen2 qwen2_5_omni_audio_encoder qwen2_5_omni_text
    qwen2_5_omni_thinker qwen2_5_omni_vision_encoder qwen2_5_vl qwen2_5_vl_text qwen2_5_vl_vision qwen2_moe qwen2_vl
    qwen2_vl_text qwen2_vl_vision qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_moe_vision qwen3_5_text
    qwen3_5_vision qwen3_moe qwen3_next qwen3_omni_moe_audio_encoder qwen3_omni_moe_text qwen3_omni_moe_thinker
    qwen3_omni_moe_vision_encoder qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_moe_vision qwen3_vl_text
    qwen3_vl_vision qwen4_exp qwen4_exp_text qwen4_exp_vision radio recurrent_gemma reformer rembert roberta
    roberta-prelayernorm roc_bert roformer rwkv sam_vision_model sarvam_mla sarvam_moe seed_oss shieldgemma2
    siglip2_vision_model siglip_vision_model smollm3 smolvlm smolvlm_vision solar_open stablelm starcoder2 step3p5
    step3p5_vision step3p7 t5 t5gemma2 t5gemma2_decoder t5gemma2_encoder t5gemma2_text timm_wrapper trocr udop
    unlimited_ocr unlimited_ocr_sam_vision_model unlimited_ocr_text unlimited_ocr_vision
    unlimited_ocr_vision_encoder vaultgemma video_llama_3 video_llama_3_vision video_llava vipllava
    vision-encoder-decoder vit wavtokenizer_encoder whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod
    youtu zamba zamba2 zaya""".split()
)


def stores_transposed(model_types: Collection[str], module: str) -> bool | None:
    """Return whether `module` stores its weight as (in, out); None if a component of the model is of an unknown family.

    model_types: those of config.json and its nested configs.
    """
    for model_type in model_types:
        if model_type in CONV1D_MODULES:
            is_mlx_layout = module.startswith(MLX_PREFIXES.get(model_type, "."))
            return module.rpartition(".")[2] in CONV1D_MODULES[model_type] and not is_mlx_layout
    return False if model_types and LINEAR_MODEL_TYPES.issuperset(model_types) else None
