"""List the tensors that two files of the same model may differ in: computed buffers, and heads of pretraining.

Some versions of transformers store a buffer that others compute, and a class for one task loads and saves a base
without the heads of another task. Sources: `_keys_to_ignore_on_load_unexpected` and the classes of transformers 5.24,
and its `register_buffer` before 4.31, when `position_ids` and `inv_freq` were stored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BUFFERS = re.compile(
    r"(^|[./])(position_ids|(original_)?inv_freq|masked_bias|causal_mask|relative_position_index|num_batches_tracked|"
    r"(encoder|decoder)\.version)$"
)


MASKS = re.compile(r"(^|[./])(attn|attention|crossattention)\.bias$")  # of shape (1, 1, n, n)


# Classes that have the heads of masked and causal language models.
_MASKED = "(ForPreTraining|ForMaskedLM|ForCausalLM|LMHeadModel)$"


_ROBERTAS = "(XLM)?Roberta|XLMRobertaXL|RobertaPreLayerNorm|Camembert|Data2VecText|Longformer|MPNet|Xmod"


_BERTS = "Albert|Bert|Ernie|MegatronBert|MobileBert|RemBert|RoCBert"


_OTHERS = "(ForMaskedLM|ForCausalLM|LMHeadModel|ForTokenClassification|ForQuestionAnswering)$"


# Names of a head's tensors -> the classes that have it; a pooler is in all classes but those seen without one.
HEADS = {
    r"cls\.seq_relationship\.": "(ForPreTraining|ForNextSentencePrediction)$",
    r"sop_classifier\.|discriminator_predictions\.": "ForPreTraining$",
    r"(cls\.|(lm|mask|generator)_)?predictions\.|generator_lm_head\.": _MASKED,
    r"vocab_(transform|layer_norm|projector)\.": _MASKED,
    r"lm_head\.(bias$|(dense|layer_norm|decoder)\.)": _MASKED,
    r"(\w+\.)?pooler\.": rf"^(?!({_BERTS}|{_ROBERTAS}){_OTHERS}|({_ROBERTAS})ForSequenceClassification$)",
}


def is_optional(name: str, shape: Sequence[int], architecture: str) -> bool:
    """Return whether a model of class `architecture` is complete without a tensor of this name and shape.

    architecture: the name of a class of transformers; empty if it is not known.
    """
    if BUFFERS.search(name) or (MASKS.search(name) and len(shape) == 4):
        return True
    classes = next((classes for names, classes in HEADS.items() if re.match(names, name)), None)
    return classes is not None and not re.search(classes, architecture)
