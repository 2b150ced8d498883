"""Distinguish embeddings, heads, experts and linear layers by the names that model families give them."""

from __future__ import annotations

# Last names of nn.Embedding in transformers 5.24 and diffusers, except those that other layers share (embed, query, w).
EMBEDDINGS = frozenset(
    """embed_tokens wte wpe tok_embeddings word_embeddings position_embeddings token_type_embeddings
    embed_positions token_embedding position_embedding shared embed_in embeddings relative_attention_bias
    tokens_embed positions_embed audio_bos_eos_token bias_values column_embedder column_embeddings
    embed_tokens_per_layer embedding generation_embeddings input_embedding ngram_embeddings pos_embed
    position_embedding_table pronunciation_embed row_embedder row_embeddings segment_emb segment_embedding
    shape_embed tile_embedding visual_embeddings_table word_embedding x_position_embeddings
    y_position_embeddings addition_t_embedding cond_type_embed cond_type_embedding embed_image_indicator
    encoder_hash_tok_embedding prior_token_embedding query_768_resolution query_1024_resolution style_embedder
    additional_embedding box_position_embeddings char_position_embeddings cls_embed code_embedding codec_embed
    codec_embedding col_position_embeddings denoising_class_embed dist_bin_pairwise_embed distance_embedding
    down_embed embed_audio_tokens embed_char embed_global embed_speaker embed_text_tokens embed_timestep
    entity_embeddings freq_emb global_relative_attention_bias h_position_embeddings hq_token input_embeds_layer
    iou_token label_embed embedding_table label_embeddings lang_embeddings language_embedding level_embed mask_tokens
    ngram_embedding no_mask_embed not_a_point_embed num_speakers_embed obj_score_token point_embed pos_emb
    position_embeds_layer presence_token prompt_ctx prompt_embedding queries_embedder queries_features
    query_embed query_feat query_position_embeddings query_refpoint_embeddings recycle_disto
    reference_point_embed rel_attn_embed rel_embeddings rel_pos_emb row_position_embeddings speaker_embedding
    task_type_embeddings text_embed_tokens text_position_embedding text_token_embedding tgt_embed
    token_type_embeddings_0 token_type_embeddings_1 token_type_embeddings_2 token_type_embeddings_3
    token_type_embeddings_4 token_type_embeddings_5 token_type_embeddings_6 unit_embedding up_embed
    value_embeddings visual_position_embeddings visual_token_type_embeddings w_position_embeddings
    weight_embedding""".split()
)

# Last names of embeddings in GGUF files
GGUF_EMBEDDINGS = frozenset("token_embd position_embd token_types per_layer_token_embd".split())

_ALL_EMBEDDINGS = EMBEDDINGS | GGUF_EMBEDDINGS

HEADS = frozenset("lm_head embed_out output score classifier".split())

# Suffixes of the modules for a denoiser's latent image; a control model has a second input image
LATENT_INPUTS = tuple("img_in x_embedder img_in.proj x_embedder.proj patch_embedding patchify_proj conv_in".split())


def weight_role(module: str, dimensions: int, is_float: bool) -> str:
    """Return `linear` (peft's `all-linear` targets it), `embedding`, `head`, `experts` (3-D) or `conv`.

    The result is empty for a vector, a norm, a bias, and a weight of another than a float type.
    """
    path = module.rpartition("/")[2]  # without the folder of a pipeline
    last = path.rpartition(".")[2]
    if not is_float or dimensions < 2:
        return ""
    if (path.rpartition(".")[0].rpartition(".")[2] if last.isdigit() else last) in _ALL_EMBEDDINGS:
        return "embedding"  # or an item of a list of embeddings
    if last.endswith(("norm", "bias")):  # one per head (chameleon's q_norm) or per expert (gpt-oss)
        return ""
    if last in HEADS and "." not in path.removeprefix("model.").removeprefix("transformer."):
        return "head"
    return {2: "linear", 3: "experts" if "expert" in module or last.endswith("_exps") else "conv"}.get(
        dimensions, "conv"
    )
