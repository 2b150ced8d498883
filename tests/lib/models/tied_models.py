"""List small configs of masked language models and encoder-decoders, with the names of the matrices that they tie."""

from __future__ import annotations

from typing import Any

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MASKED = {**SIZES, "vocab_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}
SEQ2SEQ = {"d_model": 16, "vocab_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}
SEQ2SEQ |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 24))}
SEQ2SEQ |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
DISTIL = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 32, "max_position_embeddings": 40}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
# class -> (the fields of its config, the embedding, the head, another module)
CLASSES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    **{f"{n}ForMaskedLM": (MASKED, "word_embeddings", "decoder", "query") for n in (
        "Bert", "Roberta", "XLMRoberta", "Camembert", "Albert",
    )},
    "ElectraForMaskedLM": (MASKED, "word_embeddings", "generator_lm_head", "query"),
    "MPNetForMaskedLM": (MASKED, "word_embeddings", "decoder", "q"),
    "BertForPreTraining": (MASKED, "word_embeddings", "decoder", "query"),
    "DebertaV2ForMaskedLM": (MASKED, "word_embeddings", "decoder", "query_proj"),
    "DistilBertForMaskedLM": (DISTIL, "word_embeddings", "vocab_projector", "q_lin"),
    "ModernBertForMaskedLM": ({**MASKED, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
                              "tok_embeddings", "decoder", "Wqkv"),
    **{f"{n}ForConditionalGeneration": (SEQ2SEQ, "embed_tokens", "lm_head", "fc1") for n in (
        "Bart", "MBart", "Pegasus",
    )},
    "MarianMTModel": ({**SEQ2SEQ, "decoder_vocab_size": 32}, "embed_tokens", "lm_head", "fc1"),
    "WhisperForConditionalGeneration": (WHISPER, "embed_tokens", "proj_out", "fc1"),
    **{f"{n}ForConditionalGeneration": (T5, "embed_tokens", "lm_head", "q") for n in ("T5", "MT5")},
}  # fmt: skip
