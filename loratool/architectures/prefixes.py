"""The prefixes that containers put before a module's path, in adapters and in bases."""

from __future__ import annotations

# Wrappers of training loops (`_forward_module` is Lightning's): they can be anywhere in a path; loaders remove them.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})

PEFT_PREFIX = "base_model.model."

# The suffixes of a module's main matrix, which a module's path means: its weight, or the fused projection of an
# nn.MultiheadAttention.
MAIN_PARAMETERS = (".weight", ".in_proj_weight")

# Prefixes that either adapter or base may have before every path: a task model's attribute for its backbone
# (transformers' `base_model_prefix`), or the pipeline component of a diffusers file.
CONTAINER_PREFIXES = (
    "model",
    "transformer",
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "deberta",
    "albert",
    "gpt_neox",
    "vit",
    "backbone",
    "unet",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "model.diffusion_model",
    "0.auto_model",  # of sentence-transformers, where the first module is the transformer
    "0.model",  # since its version 6
)

# kohya's prefixes, longest first -> the flattened pipeline component; LyCORIS's has none. The rest of a name is a
# module path with its dots flattened to `_` (kohya-ss/sd-scripts: networks/lora.py).
KOHYA_COMPONENTS = {
    "lora_prior_unet_": "prior_unet_",
    "lora_prior_te_": "prior_text_encoder_",
    "lora_transformer_": "transformer_",
    "lora_unet_": "unet_",
    "lora_te1_": "text_encoder_",
    "lora_te2_": "text_encoder_2_",
    "lora_te3_": "text_encoder_3_",
    "lora_te_": "text_encoder_",
    "oft_unet_": "unet_",  # of kohya's OFT
    "lycoris_": "",
}

KOHYA_PREFIXES = tuple(KOHYA_COMPONENTS)


def module_path(tensor: str) -> str:
    """Return the path of the module that has `tensor` as main matrix; any other tensor's name unchanged."""
    for end in MAIN_PARAMETERS:
        if tensor.endswith(end):
            return tensor.removesuffix(end)
    return tensor
