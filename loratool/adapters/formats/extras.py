"""Find the extras of an adapter's file: embeddings of tokens that were trained beside the factors.

No weight of a model can hold them. Trainers write them into the adapter's file, and loaders use them before the prompt
is encoded. Their names are not those of modules with factors, so the factors mean the same without them. Any other
unknown tensor is refused, because it could change the meaning of the factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Pattern that matches the full name of an extra -> description
EXTRAS = {
    # cloneofsimo/lora: `save_safeloras_with_embeds`; diffusers: `examples/textual_inversion`
    r"<[^<>]+>": "a learned token under its own name",
    # AUTOMATIC1111: `extensions-builtin/Lora/networks.py`; OneTrainer, whose `clip_l_out` are learned outputs
    r"bundle_emb\..+": "embeddings that are bundled with a LoRA",
    # kohya-ss/sd-scripts: `train_textual_inversion.py`; ostris/ai-toolkit: `toolkit/embedding.py`
    r"emb_params": "the embeddings of one text encoder",
    # ComfyUI: `embedding_key` in `comfy/sd1_clip.py` and `comfy/text_encoders/`; `_out` are OneTrainer's
    r"(?:clip_[lgh]|t5|t5xxl|umt5xxl|llama|gemma2_2b)(?:_out)?": "the embeddings of the text encoder of this name",
}

EMBED_FLAG = "<embed>"  # cloneofsimo's mark in the metadata, under the name of a learned token

_EXTRA = re.compile("|".join(EXTRAS))


def find_extras(names: Iterable[str], metadata: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the names that are extras."""
    marked = metadata or {}
    return tuple(name for name in names if _EXTRA.fullmatch(name) or marked.get(name) == EMBED_FLAG)
