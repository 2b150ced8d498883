"""List the values of options whose implementations need torch, each with its meaning.

The tables are here so that help, completions and schemas start without torch. The module that implements an option has
a table with the same keys.
"""

from __future__ import annotations

# --drop of an adapter, implemented by `inputs.leave_out`; the components are those of WEIGHED
DROP_CHOICES = {
    "extras": "embeddings of tokens, which no weight could hold",
    "unet": "an image model's denoiser",
    "unet2": "its second denoiser",
    "te": "its text encoders",
    "te1": "the first",
    "te2": "the second",
    "te3": "the third",
    "te4": "the fourth",
}


# --drop of a checkpoint, implemented by `convert.checkpoint`
MODEL_DROP_CHOICES = {
    "ema": "a checkpoint's running mean, beside its weights",
    "optimizer": "its optimizer's state",
}


# --drop of a denoiser whose tensors are renamed, implemented by `convert.denoiser`
DENOISER_DROP_CHOICES = {
    "components": "of an image model's file all but the denoiser",
}


# --method of init, implemented by `init.methods.INITS`
INIT_CHOICES = {
    "lora": "A uniform, B = 0",
    "gaussian": "A normal, B = 0",
    "orthogonal": "A and B normal with B A = 0, of an even rank",
    "pissa": "the weight's top triplets, taken out of the base",
    "milora": "the weight's last triplets, taken out of the base",
    "mica": "B the weight's last left singular vectors, frozen; A = 0",
    "olora": "the start of the weight's QR, taken out of the base",
}


# --method of combine, implemented by `combine.methods.METHODS`; in brackets
# the paper, and the variant if there are several
COMBINE_METHODS = {
    "cat": "the exact weighted sum, the factors side by side; with a rank, the best of that rank "
    "(peft's cat, and with --rank its svd)",
    "ties": "the largest entries of each, by majority sign "
    "(Yadav et al., NeurIPS 2023, as in peft: the sign of sum D_i, then sum w_i D_i over the number that agree)",
    "ties-mergekit": "the same with weighted votes and a weighted mean "
    "(mergekit's ties: the sign of sum w_i D_i, then sum w_i D_i over the sum of the w_i that agree)",
    "dare-linear": "random entries of each, rescaled, summed "
    "(Yu et al., ICML 2024: entries kept with probability `density`, divided by it; sum w_i D_i)",
    "dare-ties": "random entries of each, rescaled, by majority sign "
    "(DARE, then the second half of ties (peft's; mergekit sums without the mean, and rescales by the L1 norm))",
    "magnitude": "the largest entries of each, summed (peft's magnitude_prune: sum w_i D_i of the trimmed)",
    "knots": "ties in the changes' common basis "
    "(Stoica et al., ICLR 2025: the SVD of [D_1 ... D_N], ties on S V_i^T; trimmed by module as ties is here)",
}


# --allow of combine: inputs that are refused by default
COMBINE_ALLOW = {"unrelated": "adapters that look like those of two models"}


# --layout of convert
QKV_LAYOUTS = {
    "split": "q_proj, k_proj, v_proj and gate_proj, up_proj, as Llama and Qwen have them",
    "fused": "qkv_proj and gate_up_proj, as Phi-3 and vLLM have them, and GPT-2's c_attn",
}


# --embed of extract: how changed embeddings and heads are stored
EMBED_CHOICES = {
    "lora": "factors, as for every other matrix",
    "full": "kept whole, exactly",
    "skip": "left out, and named",
}
