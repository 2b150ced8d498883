"""The values of options whose implementations need numpy, with their meanings.

The tables are here so that help, completions and schemas start without numpy. The module that implements an option has
a table with the same keys.
"""

from __future__ import annotations

# --drop of an adapter, implemented by `inputs.leave_out`; the components are those of WEIGHED
DROP_CHOICES = {
    "extras": "token embeddings, which cannot be merged into a weight",
    "unet": "the denoiser of an image model",
    "unet2": "the second denoiser",
    "te": "all text encoders",
    "te1": "the first one",
    "te2": "the second one",
    "te3": "the third one",
    "te4": "the fourth one",
}

OPEN_FILES = {
    "open-files": "change files in place though the system cannot tell whether other programs have them open",
}

MERGE_ALLOW = {
    "lossy": "requantize codes of fewer than 8 bits, which keep almost nothing of a delta",
    "widen": "add columns of zeros to an image model's input, for adapters of a control image",
    **OPEN_FILES,
}

# --by, implemented by `streaming.in_place`
WAYS_IN_PLACE = {
    "shard": "write each file anew beside the former one, and rename it: needs room for the largest",
    "window": "write ranges over the former bytes: needs room for 64 MB, and no program may have the file open",
}

# --drop of a checkpoint, implemented by `convert.checkpoint`
MODEL_DROP_CHOICES = {
    "ema": "the running average of the weights (EMA)",
    "optimizer": "the state of the optimizer",
}

# --drop of a denoiser whose tensors are renamed, implemented by `convert.denoiser`
DENOISER_DROP_CHOICES = {
    "components": "all parts of an image model but the denoiser",
}

# --method of init, implemented by `init.methods.INITS`
INIT_CHOICES = {
    "lora": "A uniform, B = 0",
    "gaussian": "A normal, B = 0",
    "orthogonal": "A and B normal with B A = 0, for an even rank",
    "pissa": "A and B from the top singular triplets, subtracted from the base",
    "milora": "A and B from the last singular triplets, subtracted from the base",
    "mica": "A = 0, B from the last left singular vectors, frozen",
    "olora": "A and B from the first columns of a QR, subtracted from the base",
}

# A method that needs more than the files of a base -> the reason.
INIT_REFUSED = {
    "eva": "it needs activations: run a model on data (peft.initialize_lora_eva_weights)",
    "corda": "it needs activations: run a model on data (peft.tuners.lora.corda.preprocess_corda)",
    "lora_ga": "it needs gradients: run a model on data (peft.tuners.lora.loraga)",
    "loftq": "it needs the quantizer that the base will have (peft.LoftQConfig)",
}

# --method of combine, implemented by `combine.methods.table`, which has the sources
COMBINE_METHODS = {
    "cat": "the exact weighted sum with the factors side by side, or its best approximation by a rank",
    "ties": "keep the largest entries of each delta that have the majority sign",
    "ties-mergekit": "ties with weighted votes and a weighted mean",
    "dare-linear": "keep random entries of each delta, rescaled, and sum them",
    "dare-ties": "keep random entries, rescaled, that have the majority sign",
    "magnitude": "keep the largest entries of each delta, and sum them",
    "della": "keep random entries, large ones more often, rescaled, with the sign of a weighted majority",
    "knots": "ties in a basis of columns that all deltas share",
    "tsv": "the sum, after making all singular vectors orthogonal",
    "iso-c": "the sum with all singular values made equal",
    "iso-cts": "iso-c with some directions of each delta beside those of the sum",
    "wudi": "the delta that acts on the rows of each delta as that delta does, by least squares",
    "core-ties": "ties in bases that all deltas share on both sides",
    "core-dare": "dare-linear in these bases",
    "core-magnitude": "magnitude in these bases",
}

# a method of other tools -> why it is not here, and the nearest thing that has a meaning for changes
COMBINE_REFUSED = {
    "linear": "a sum of factors adds cross terms B_i A_j that no adapter has; use cat for the sum of the changes",
    "task_arithmetic": "use cat, which is the same for adapters",
    "svd": "use cat with --rank",
    "ties_svd": "use ties with --rank and --rank-method truncate",
    "dare_linear": "it is spelled dare-linear",
    "dare_linear_svd": "use dare-linear with --rank and --rank-method truncate",
    "dare_ties": "it is spelled dare-ties",
    "dare_ties_svd": "use dare-ties with --rank and --rank-method truncate",
    "magnitude_prune": "it is spelled magnitude",
    "magnitude_prune_svd": "use magnitude with --rank and --rank-method truncate",
    "della_linear": "this is della without its votes; the nearest is dare-linear",
    "core_space": "this is a family of methods; use core-ties, core-dare or core-magnitude",
    "breadcrumbs": "it also removes the largest entries, noise only in full fine-tunes; the nearest is magnitude",
    "breadcrumbs_ties": "it also removes the largest entries, noise only in full fine-tunes; the nearest is ties",
    "slerp": "it interpolates the weights of two models; for adapters use cat with weights 1-t and t",
    "nuslerp": "it interpolates the weights of two models; for adapters use cat with weights 1-t and t",
    "multislerp": "it interpolates the weights of models; for adapters use cat with weights that sum to 1",
    "karcher": "it averages the weights of models on a sphere; for adapters use cat with weights that sum to 1",
    "model_stock": "it averages fine-tunes of one task by their angles; the nearest is cat with weights",
    "sce": "it weighs models by the entries in which they vary; the nearest is ties or magnitude",
    "arcee_fusion": "it copies the weights in which a model differs most; the nearest is magnitude",
    "nearswap": "it moves the weights of one model that are close to another's; the nearest is cat with weights",
    "passthrough": "it stacks layers of several models; --target and --exclude select modules",
    "fisher": "it needs gradients: run a model on data; the nearest is cat with weights",
    "regmean": "it needs activations: run a model on data; the nearest is wudi, which uses the deltas' rows",
    "adamerging": "it learns the weights on data; the nearest is cat with weights",
}

# --allow of combine: inputs that are refused by default
# --to of patch: keys of patches.dialects.table.DIALECTS, those that are written
PATCH_DIALECTS = {
    "disk-delta": "of slime, miles and SGLang",
    "skyrl": "of SkyRL",
    "prime-rl": "a sparse update of prime-rl",
    "trl": "a sparse patch of TRL",
    "arc_v2": "of Fireworks",
}

# --allow of apply, for patches of other programs
APPLY_ALLOW = {
    "unknown": "leave out changes of tensors that BASE does not have",
    "unverified": "apply patches without any checksum, so that nothing proves the base or the result",
    **OPEN_FILES,
}

COMBINE_ALLOW = {"unrelated": "combine adapters that look like those of two different models"}

# --rank-method of combine, where a method's result has more than --rank
RANK_METHODS = {
    "ctm": "compress the deltas to --rank shared directions, then run the method on these",
    "truncate": "run the method, then truncate its result to --rank",
}

# --layout of convert
QKV_LAYOUTS = {
    "split": "q_proj, k_proj, v_proj and gate_proj, up_proj, as in Llama and Qwen",
    "fused": "qkv_proj and gate_up_proj, as in Phi-3 and vLLM, and GPT-2's c_attn",
}

# --embed of extract: how changed embeddings and heads are stored
EMBED_CHOICES = {
    "lora": "as factors, like every other matrix",
    "full": "as full tensors, exactly",
    "skip": "not at all, but the report lists them",
}
