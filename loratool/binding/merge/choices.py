"""The choices that a user has for a merge, each value with its meaning.

The tables are here so that help starts without importing the modules that implement them.
"""

from __future__ import annotations

# --tied: how to resolve a tie if one side changes -> the meaning
TIED = {
    "untie": "write the head as a matrix of its own, and say so in config.json",
    "share": "apply every change to the one matrix, so that both sides change",
    "refuse": "stop",
}

# The values of --quantized -> their effect on the quantized weights that an adapter changes
WAYS = {
    "mixed": "they become plain numbers, and all others keep their codes",
    "dequantize": "all coded weights become plain numbers, others too",
    "requantize": "they keep codes and scales, each weight rounded to the nearest code",
}

# The values of --allow
LOSSY = "lossy"

# A value of `tokenizer` -> its meaning; any other names a folder
TOKENIZERS = {"base": "the base's", "adapter": "the one beside the adapter"}
