"""Prefixes that containers put before a module's path, in adapters and in bases alike."""

from __future__ import annotations

# Wrappers of training loops: they can stand anywhere in a path and never mean anything.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


PEFT_PREFIX = "base_model.model."


# A module's one matrix has no need of its name: `mlp.up_proj` means its weight, an attention its fused projection.
MAIN_PARAMETERS = (".weight", ".in_proj_weight")


# What one side may have before every path and the other not: the attribute under which a task model holds
# its backbone (transformers' `base_model_prefix`), or the pipeline component of a diffusers file.
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
)


# kohya's prefixes, longest first (formats.md 2.1), and the pipeline component that each means: what follows is a
# module path with its dots flattened to `_`.
KOHYA_COMPONENTS = {
    "lora_prior_unet_": "prior_unet_",
    "lora_prior_te_": "prior_text_encoder_",
    "lora_transformer_": "transformer_",
    "lora_unet_": "unet_",
    "lora_te1_": "text_encoder_",
    "lora_te2_": "text_encoder_2_",
    "lora_te3_": "text_encoder_3_",
    "lora_te_": "text_encoder_",
}


KOHYA_PREFIXES = tuple(KOHYA_COMPONENTS)


def module_path(tensor: str) -> str:
    """The path of a module from the name of its one matrix; another tensor's name as it is."""
    for end in MAIN_PARAMETERS:
        if tensor.endswith(end):
            return tensor.removesuffix(end)
    return tensor
