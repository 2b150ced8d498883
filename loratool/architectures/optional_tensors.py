"""What a model's file can have or lack and be the same model: buffers that are computed, heads of the pretraining.

Some versions of transformers store a buffer that others compute; and a class for one task loads and saves a base
without the heads of another. Both as literal tables. Sources: `_keys_to_ignore_on_load_unexpected` and the classes of
transformers 5.24, and its `register_buffer` before 4.31, where `position_ids` and `inv_freq` were stored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BUFFERS = re.compile(
    r"(^|[./])(position_ids|(original_)?inv_freq|masked_bias|causal_mask|relative_position_index|num_batches_tracked|"
    r"(encoder|decoder)\.version)$"
)


MASKS = re.compile(r"(^|[./])(attn|attention|crossattention)\.bias$")  # of shape (1, 1, n, n)


# A head's names -> the classes that have it. Of a pooler these are all but the ones that were seen without it.
_MASKED = "(ForPreTraining|ForMaskedLM|ForCausalLM|LMHeadModel)$"


_ROBERTAS = "(XLM)?Roberta|XLMRobertaXL|RobertaPreLayerNorm|Camembert|Data2VecText|Longformer|MPNet|Xmod"


_BERTS = "Albert|Bert|Ernie|MegatronBert|MobileBert|RemBert|RoCBert"


_OTHERS = "(ForMaskedLM|ForCausalLM|LMHeadModel|ForTokenClassification|ForQuestionAnswering)$"


HEADS = {
    r"cls\.seq_relationship\.": "(ForPreTraining|ForNextSentencePrediction)$",
    r"sop_classifier\.|discriminator_predictions\.": "ForPreTraining$",
    r"(cls\.|(lm|mask|generator)_)?predictions\.|generator_lm_head\.": _MASKED,
    r"vocab_(transform|layer_norm|projector)\.": _MASKED,
    r"lm_head\.(bias$|(dense|layer_norm|decoder)\.)": _MASKED,
    r"(\w+\.)?pooler\.": rf"^(?!({_BERTS}|{_ROBERTAS}){_OTHERS}|({_ROBERTAS})ForSequenceClassification$)",
}


def is_optional(name: str, shape: Sequence[int], architecture: str) -> bool:
    """Whether a model of this class (`""`: not known) is whole without a tensor of this name and shape."""
    if BUFFERS.search(name) or (MASKS.search(name) and len(shape) == 4):
        return True
    classes = next((classes for names, classes in HEADS.items() if re.match(names, name)), None)
    return classes is not None and not re.search(classes, architecture)
