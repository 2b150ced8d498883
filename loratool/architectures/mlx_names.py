"""mlx-lm's module names of each model type, where they differ from transformers 5.

mlx-lm loads a model's files from the hub and saves them under the names of its modules. Folders and adapters of MLX
have these names. It has no towers, and stacks all experts as (experts, out, in), with gate and up separate.
Source: mlx-lm 0.32.2, `sanitize` and the classes of each file of `mlx_lm/models/`. `tests/adapters/test_mlx_oracle.py`
compares the rows of its list with mlx-lm on small models; the others were only read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

FORMAT = "mlx"  # value of `format` in the metadata of MLX's files

# The last part of a stack's path -> (parameter of the class, number of its share of the rows, number of shares)
Shares = Mapping[str, tuple[str, int, int]]

GATED: Shares = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}

PLAIN: Shares = {"fc1": ("up_proj", 0, 1), "fc2": ("down_proj", 0, 1)}


@dataclass(frozen=True)
class MlxNames:
    """The differences for one model type."""

    # parts of a path, full words between dots: transformers' -> MLX's; the first match counts. `starts` are prefixes
    starts: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    wrapped: bool = False  # it is the language model of a class that also has towers
    root: str = ""  # prefix of the path of every module
    experts: str = "switch_mlp"  # replacement of `experts` in the path of a stack
    shares: Shares = field(default_factory=lambda: GATED)
    interleaved: bool = False  # the shares are every second row
    absent: tuple[str, ...] = ()  # last names of modules that its class lacks, or has in another shape
    scaled: str = ""  # a pattern for modules whose weights it multiplies on loading; it saves the product
    shifted: bool = False  # it adds 1 to the weights of norms on loading; it saves the sum


_WRAPPED = (("model.language_model", "language_model.model"), ("lm_head", "language_model.lm_head"))
_WRAPPER = MlxNames(wrapped=True, root="language_model.")
_LATENT = MlxNames(absent=("kv_b_proj",))  # it multiplies its two halves into the queries and the output
_MIXTRAL = MlxNames(parts=(("mlp.gate", "block_sparse_moe.gate"), ("mlp.switch_mlp", "block_sparse_moe.switch_mlp")))
_IN_PLACE = MlxNames(experts="experts")
_GRANITE = MlxNames(parts=(("block_sparse_moe.router", "block_sparse_moe.router.layer"),))

# model_type of config.json -> its names
MLX: dict[str, MlxNames] = {
    **dict.fromkeys(
        """apertus cohere cohere2 deepseek_v2 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_mamba gemma gemma2
        gemma3_text glm glm4 glm4_moe granite helium hunyuan_v1_dense internlm3 iquestcoder jamba lfm2 llama mamba
        mamba2 mellum ministral3 mistral nemotron olmo2 olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe
        recurrent_gemma seed_oss smollm3 stablelm starcoder2""".split(),
        MlxNames(),
    ),
    **dict.fromkeys(
        "gemma3 llava mistral3 qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe".split(),
        _WRAPPER,
    ),
    **dict.fromkeys("deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_k2 mistral4".split(), _LATENT),
    **dict.fromkeys("minimax minimax_m2 mixtral".split(), _MIXTRAL),
    **dict.fromkeys("afmoe dots1".split(), _IN_PLACE),
    **dict.fromkeys("granitemoe granitemoehybrid".split(), _GRANITE),
    **dict.fromkeys("qwen3_5 qwen3_5_moe".split(), replace(_WRAPPER, shifted=True)),
    "baichuan_m1": MlxNames(scaled=r"lm_head$"),
    "bailing_moe": MlxNames(parts=(("mlp.gate", "mlp.gate.gate_proj"),), scaled=r"lm_head$"),
    "exaone": MlxNames(
        (("model.embed_tokens", "transformer.wte"), ("model.layers", "transformer.h")),
        (
            ("self_attn.o_proj", "attn.attention.out_proj"),
            ("self_attn", "attn.attention"),
            ("mlp.gate_proj", "mlp.c_fc_0"),
            ("mlp.up_proj", "mlp.c_fc_1"),
            ("mlp.down_proj", "mlp.c_proj"),
        ),
    ),
    "falcon_h1": MlxNames(scaled=r"."),
    "gemma4": replace(_WRAPPER, experts="experts.switch_glu"),
    "gemma4_text": MlxNames(experts="experts.switch_glu"),
    "gpt2": MlxNames((("transformer", "model"),)),
    "gpt_neox": MlxNames((("gpt_neox.layers", "model.h"), ("lm_head", "model.embed_out"), ("gpt_neox", "model"))),
    "gpt_oss": MlxNames(experts="experts", interleaved=True),
    "gptj": MlxNames((("transformer", "model"),)),
    "kimi_k25": replace(_WRAPPER, absent=_LATENT.absent),
    "laguna": MlxNames(parts=(("mlp.gate", "mlp.gate.proj"), ("mlp.shared_experts", "mlp.shared_expert"))),
    "lfm2_moe": MlxNames(
        parts=tuple(
            (f"feed_forward.w{n}", f"feed_forward.{name}_proj") for n, name in ((1, "gate"), (3, "up"), (2, "down"))
        )
    ),
    "llama4": MlxNames(experts="experts", root="language_model."),
    "minimax_m3_vl": replace(
        _WRAPPER,
        parts=(("mlp.shared_experts", "block_sparse_moe.shared_experts"), *_MIXTRAL.parts),
        absent=("shared_experts.gate_up_proj",),
    ),
    "nemotron_h": MlxNames((("model", "backbone"),), shares=PLAIN),
    "phimoe": MlxNames(parts=(("mlp.router", "block_sparse_moe.gate"), *_MIXTRAL.parts[1:])),
    "qwen3_next": MlxNames(shifted=True),
}

# Types whose MLX folders differ from the hub's files only in that these have separate experts.
ONE_BY_ONE = frozenset(
    """afmoe dots1 exaone_moe glm4_moe mellum minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe""".split()
)


@dataclass(frozen=True)
class Share:
    """The rows of a stack of the class that are one of MLX's stacks."""

    stack: str  # path of the class's parameter
    part: int  # rows [part * n, (part + 1) * n) of each of its matrices, which have parts * n
    parts: int
    interleaved: bool = False  # or rows part, part + parts, ... of each


def mlx_names(model_types: Collection[str]) -> MlxNames | None:
    """Return the row of a base's outer model type, which decides mlx-lm's class; None if there is none."""
    return MLX.get(next(iter(model_types), ""))


def find_share(path: str, model_types: Collection[str]) -> Share | None:
    """Return the share of transformers' stack for the path of MLX's stack; None for another `renames.canonical` path.

    `switch_mlp` occurs only in MLX. Whether `experts` is the path of an MLX stack depends on the type.
    """
    owner, _, last = path.removesuffix(".weight").rpartition(".")
    names = mlx_names(model_types) or MlxNames(shares=PLAIN if last in PLAIN else GATED)
    if last not in names.shares or not f".{owner}".endswith(f".{names.experts}"):
        return None
    parameter, part, parts = names.shares[last]
    front = owner.removesuffix(names.experts)
    return Share(f"{front}experts.{parameter}", part, parts, names.interleaved and parts > 1)


def stacks_of(path: str, names: MlxNames) -> list[str]:
    """Return the paths of MLX's stacks with the rows of a stack of the class, in order; [] for another path."""
    owner, _, parameter = path.rpartition(".")
    if not f".{owner}".endswith(".experts"):
        return []
    lasts = [last for last, (name, *_) in names.shares.items() if name == parameter]
    return [mlx_path(f"{owner.removesuffix('experts')}{names.experts}.{last}", names) for last in lasts]


def mlx_path(path: str, names: MlxNames) -> str:
    """Return MLX's name of a module; `path` is the name in transformers 5."""
    for pairs, before in ((_starts(names), "^"), (names.parts, r"(?<=\.)")):
        for old, new in pairs:
            changed = re.sub(rf"{before}{re.escape(old)}(?=\.|$)", new, path, count=1)
            if changed != path:
                path = changed
                break
    return path


def to_transformers(model_types: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Return the rules, as in `renames.RENAMES`, from MLX's names of modules to those of transformers 5."""
    rules = []
    for names in (MLX[each] for each in model_types if each in MLX):
        if names.wrapped or len(model_types) == 1:
            rules += [(rf"^{re.escape(new)}(?=\.|$)", old) for old, new in _starts(names)]
        rules += [(rf"(?<=\.){re.escape(new)}(?=\.|$)", old) for old, new in names.parts]
    return tuple(rules)


def _starts(names: MlxNames) -> tuple[tuple[str, str], ...]:
    return _WRAPPED if names.wrapped else names.starts
