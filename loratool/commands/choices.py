"""The values of options whose implementations need torch, with their meanings.

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

# A method that the files of a base are not enough for -> the reason.
INIT_REFUSED = {
    "eva": "it needs activations: run a model on data (peft.initialize_lora_eva_weights)",
    "corda": "it needs activations: run a model on data (peft.tuners.lora.corda.preprocess_corda)",
    "lora_ga": "it needs gradients: run a model on data (peft.tuners.lora.loraga)",
    "loftq": "it needs the quantizer that the base will have (peft.LoftQConfig)",
}

# --method of combine, implemented by `combine.methods.table`, which has the sources
COMBINE_METHODS = {
    "cat": "the exact weighted sum, the factors side by side; with a rank, the best of that rank",
    "ties": "the largest entries of each, by majority sign",
    "ties-mergekit": "the same with weighted votes and a weighted mean",
    "dare-linear": "random entries of each, rescaled, summed",
    "dare-ties": "random entries of each, rescaled, by majority sign",
    "magnitude": "the largest entries of each, summed",
    "della": "random entries of each, large ones more often, rescaled, by weighted votes",
    "knots": "ties in the changes' common basis of columns",
    "tsv": "the sum, with the singular vectors of all made orthogonal",
    "iso-c": "the sum, all its singular values made equal",
    "iso-cts": "the same, with directions of each beside those of the sum",
    "wudi": "what acts on the rows of each as it does, by least squares",
    "core-ties": "ties in the changes' common basis of both sides",
    "core-dare": "dare-linear there",
    "core-magnitude": "magnitude there",
}

# a method of other tools -> why it is not here, and the nearest thing that has a meaning for changes
COMBINE_REFUSED = {
    "linear": "a sum of factors has the cross terms B_i A_j, which no adapter has; cat is the sum of the changes",
    "task_arithmetic": "that is cat: a change is a task vector",
    "svd": "that is cat with --rank",
    "ties_svd": "that is ties with --rank and --rank-method truncate",
    "dare_linear": "it is spelled dare-linear",
    "dare_linear_svd": "that is dare-linear with --rank and --rank-method truncate",
    "dare_ties": "it is spelled dare-ties",
    "dare_ties_svd": "that is dare-ties with --rank and --rank-method truncate",
    "magnitude_prune": "it is spelled magnitude",
    "magnitude_prune_svd": "that is magnitude with --rank and --rank-method truncate",
    "della_linear": "that is della without its votes, and nearly dare-linear",
    "core_space": "that is a family of methods: core-ties, core-dare, core-magnitude",
    "breadcrumbs": "it leaves out a change's largest entries too, as noise of a full fine-tune; magnitude keeps them",
    "breadcrumbs_ties": "it leaves out a change's largest entries too, as noise of a full fine-tune; ties keeps them",
    "slerp": "it turns one model's weights into another's; of changes that is cat with weights 1-t and t",
    "nuslerp": "it turns one model's weights into another's; of changes that is cat with weights 1-t and t",
    "multislerp": "it turns models' weights into each other; of changes that is cat with weights that sum to 1",
    "karcher": "it averages models' weights on a sphere; of changes that is cat with weights that sum to 1",
    "model_stock": "it averages fine-tunes of one task by their angles; the nearest is cat with weights",
    "sce": "it weighs models by entries in which they vary; the nearest is ties or magnitude",
    "arcee_fusion": "it takes over the weights in which a model differs most; the nearest is magnitude",
    "nearswap": "it moves weights of one model that are near to another's; the nearest is cat with weights",
    "passthrough": "it stacks layers of models; --target and --exclude choose modules of each adapter",
    "fisher": "it needs gradients: run a model on data; the nearest is cat with weights",
    "regmean": "it needs activations: run a model on data; wudi takes the changes' rows for them",
    "adamerging": "it learns the weights on data; the nearest is cat with weights",
}

# a method that does not run on changes that were compressed to shared directions -> why


# --allow of combine: inputs that are refused by default
COMBINE_ALLOW = {"unrelated": "adapters that look like those of two models"}

# --rank-method of combine, where a method's result has more than --rank
RANK_METHODS = {
    "ctm": "compress the changes to --rank directions that they share, then run the method on these",
    "truncate": "run the method, then keep the best --rank of its result",
}

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
