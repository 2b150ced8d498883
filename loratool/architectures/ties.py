"""The matrices that each model family ties, and their names.

Sources: `_tied_weights_keys`, `tie_word_embeddings` and the heads' modules of transformers 5.24. A side that is stored
separately also loads separately, there and in 4.57, except where a table notes otherwise.
"""

from __future__ import annotations

INPUT_EMBEDDINGS = (
    "shared",
    "embed_tokens",
    "wte",
    "word_embeddings",
    "word_embedding",
    "embed_in",
    "tok_embeddings",
    "tokens_embed",
    "embeddings",
)

# A GGUF file's embedding and head. llama.cpp uses the embedding for a missing head in these architectures and in
# GGUF_OWN_HEADS, which also read a separate head (src/models/*.cpp of the tree inside llama-cpp-python 0.3.36).
GGUF_EMBEDDING, GGUF_HEAD = "token_embd.weight", "output.weight"

GGUF_HEADLESS = frozenset(  # encoders, for which it computes no head
    """bert eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llama-embed modern-bert neo-bert nomic-bert
    nomic-bert-moe t5encoder""".split()
)

GGUF_OWN_HEADS = frozenset(
    """afmoe arcee arctic bloom chameleon chatglm cogvlm cohere2moe deci deepseek deepseek2 deepseek32 dream exaone
    exaone4 falcon falcon-h1 gemma3 gemma3n gemma4 glm-dsa glm4 gpt2 granite grok grovemoe hunyuan-moe jais2 jamba lfm2
    lfm2moe llada llama llama4 maincoder mamba mamba2 minicpm minicpm3 mistral3 mpt nanbeige olmo phi3 plamo2 plamo3
    qwen2 qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3vl qwen3vlmoe refact rnd1 smallthinker smollm3
    starcoder starcoder2 t5""".split()
)

OUTPUT_HEADS = ("lm_head", "embed_out")

# Decoder families whose head has another name than OUTPUT_HEADS (biogpt, gpt_neox_japanese and trocr: checked only in
# 5.24).
DECODER_HEADS = {
    **dict.fromkeys(("biogpt", "trocr"), "output_projection"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), "embed_out"),
    "modernbert-decoder": "decoder",
    **dict.fromkeys(("t5gemma", "t5gemma2"), "lm_head.out_proj"),
    "whisper": "proj_out",
}

# The head of a masked language model -> the families that have it. A bias one level up (`lm_head.bias`) is also the
# bias of the head's linear layer; if the head is not tied, loaders need both. (Checked only in 5.24: flaubert, fnet,
# layoutlm, luke, mra, nomic_bert, squeezebert, tapas and yoso.)
MASKED_HEADS = {
    "cls.predictions.decoder": """bert big_bird deberta deberta-v2 ernie fnet layoutlm megatron-bert mobilebert mra
    nomic_bert nystromformer rembert roc_bert roformer squeezebert tapas yoso""",
    "lm_head.decoder": """bert-generation camembert data2vec-text gte ibert jina_embeddings_v3 longformer luke mpnet
    roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod""",
    "predictions.decoder": "albert",
    "generator_lm_head": "convbert electra",
    "vocab_projector": "distilbert",
    "decoder": "modernbert",
    "pred_layer.proj": "flaubert xlm",
    "text_decoder.cls.predictions.decoder": "blip",
    "lm_loss": "xlnet",
}

MASKED_HEAD_OF = {family: head for head, families in MASKED_HEADS.items() for family in families.split()}

# Types that use the head's matrix without calling its module, so that PEFT's wrapper has no effect.
PAST_ITS_MODULE = frozenset({"mobilebert"})

# Encoder-decoders with one embedding, `shared`, for encoder, decoder and head.
SHARED_BY_BOTH = frozenset(
    """bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus
    pegasus_x plbart switch_transformers t5 umt5""".split()
)

# Type with one embedding for encoder and decoder -> (the embedding's name, whether it is called, other called modules
# with its matrix). The modules depend on the class.
SHARED_INPUTS: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    **dict.fromkeys((*SHARED_BY_BOTH, "udop"), ("shared", False, ("encoder.embed_tokens", "decoder.embed_tokens"))),
    **dict.fromkeys(
        ("seamless_m4t", "seamless_m4t_v2"),
        ("shared", False, ("text_encoder.embed_tokens", "text_decoder.embed_tokens")),
    ),
    "florence2": ("shared", True, ("decoder.embed_tokens",)),
    "prophetnet": ("word_embeddings", False, ("encoder.word_embeddings", "decoder.word_embeddings")),
    "diffusion_gemma": ("decoder.embed_tokens", True, ("encoder.language_model.embed_tokens",)),
    "t5gemma2": ("encoder.embed_tokens", True, ("decoder.embed_tokens",)),
}

# Type -> (an expression for the path of a stored module, [(replacement that gives the path of a module that uses its
# tensors, whether they are transposed there)]).
SHARED_MODULES: dict[str, tuple[tuple[str, tuple[tuple[str, bool], ...]], ...]] = {
    "diffusion_gemma": (
        (
            r"\bmodel\.decoder\.(?=layers\.(?!\d+\.layer_scalar$)|norm\.)",
            (("model.decoder.", False), ("model.encoder.language_model.", False)),
        ),
    ),
    "luke": (
        (
            r"^luke\.entity_embeddings\.entity_embeddings\.(?=weight)",
            ((r"\g<0>", False), ("entity_predictions.decoder.", True)),
        ),
    ),
    "neomme": (
        (
            r"^model\.embed_tokens\.embedding_projection\.",
            ((r"\g<0>", False), ("unembedding_projection.", False)),
        ),
    ),
    "udop": (
        (r"^patch_embed\.(?=proj\.)", (("encoder.embed_patches.", False),)),
        (
            r"^encoder\.block\.0\.layer\.0\.SelfAttention\.(?=relative_attention_bias\.)",
            (("encoder.relative_bias.biases.0.", False), ("decoder.relative_bias.biases.0.", False)),
        ),
    ),
}

# Type -> the name of shared blocks: files have a few, and the hybrid layers use them in turn.
SHARED_BLOCKS = {"zamba": "shared_transf", "zamba2": "shared_transformer"}

# Types whose encoder and decoder use the module `shared` before transformers 5 and ignore separately stored matrices.
ONE_MODULE_BEFORE_5 = frozenset("blenderbot blenderbot-small led marian mvp pegasus pegasus_x".split())

# Types whose `get_input_embeddings`, which PEFT calls, returns the encoder's embedding.
EMBEDS_BY_ENCODER = frozenset({"marian"})

# Types where tie_word_embeddings also scales the decoder's output by d_model ** -0.5, so that it cannot be changed:
# transformers 5 keeps stored matrices separate if they differ, 4 does not.
FLAG_SCALES = frozenset("longt5 mt5 switch_transformers t5 umt5".split())

# Encoder-decoders with two embeddings; the decoder's is the head's matrix.
TIED_BY_DECODER = frozenset({"marian", "t5gemma"})

# Encoder-decoders whose encoder has no token embedding: they tie as decoders do.
TIED_AS_DECODERS = frozenset("speech_to_text whisper".split())

# Last names of other copies of the embedding: sides of an encoder-decoder, the decoder of a masked language model.
COPIES = (
    *OUTPUT_HEADS,
    "embed_tokens",
    "shared",
    "proj_out",
    *dict.fromkeys(head.rpartition(".")[2] for head in MASKED_HEADS),
)

GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
MASKED = ("ForMaskedLM", "ForPreTraining")

HEADLESS = (
    "Classification",
    "QuestionAnswering",
    "MultipleChoice",
    "Regression",
    "RewardModel",
    "ElectraForPreTraining",
    "PerceiverForMaskedLM",
)

# Families that do not tie by default (`tie_word_embeddings` of the config classes of transformers 5.24).
UNTIED_BY_DEFAULT = frozenset(
    """apertus arcee bamba bitnet codegen dbrx deepseek_v2 deepseek_v3 diffllama dots1 exaone4 falcon_h1 flex_olmo fuyu
    glm glm4 glm4_moe gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe internlm3 jamba llama llama4 llama4_text longcat_flash mamba2 minimax minimax_m2
    ministral mistral mixtral nemotron nemotron_h olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe
    qwen3 qwen3_5 qwen3_5_text qwen3_moe qwen3_next reformer rwkv seed_oss stablelm xlstm""".split()
)

# Families whose config classes always tie, ignoring config.json; a stored head that differs stays separate.
TIED_ANYHOW = frozenset("longt5 mt5 pop2piano t5 udop umt5".split())
