"""Make a folder of transformers of a GGUF model: names, config.json, and a tokenizer's files from elsewhere."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import InputError, NeedsFlag, UsageError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import TORCH_FLOATS
from ...files.folder.side_files import LeftBehind, encode_json, find_tokenizer
from ...files.gguf_model import TransformersView, as_transformers
from ...files.output.output import Output

CONFIG = "config.json"

BESIDE = "beside a GGUF model: --tokenizer names the folder whose files are copied"

# model type -> what of its class GGUF does not have
LACKS = {"bert": "GGUF has no pooler: transformers makes one of random numbers, unless add_pooling_layer=False"}


@dataclass(frozen=True)
class GgufFolder:
    """A GGUF model that becomes a folder of transformers."""

    view: TransformersView
    tokenizer: dict[str, Path]  # name of a file -> the file to copy

    def with_side_files(self, output: Output, dtype: str | None) -> Output:
        """Return the output with config.json and the tokenizer's files, and with none from beside the GGUF file.

        Args:
            dtype: of the output's weights, in safetensors; None keeps them.
        """
        base, nbytes = self.view.checkpoint, Counter[str]()
        for spec in base.specs.values():
            nbytes[spec.dtype] += spec.nbytes
        config = base.config | {"dtype": TORCH_FLOATS[dtype or nbytes.most_common(1)[0][0]]}
        index = {name: data for name, data in output.extras.items() if name != CONFIG}
        beside = {} if output.is_file else {CONFIG: encode_json(config)}
        travels = {} if output.is_file else self.tokenizer
        beside_gguf = (LeftBehind(name, path.stat().st_size, BESIDE) for name, path in output.travels.items())
        left = (*output.left_behind, *(each for each in beside_gguf if each.name not in travels))
        return replace(output, extras=index | beside, travels=travels, left_behind=left)

    def notes(self, output: Output) -> Iterator[str]:
        """Yield what a loader needs beside the output."""
        if lacking := LACKS.get(self.view.checkpoint.model_type or ""):
            yield lacking
        if output.is_file:
            yield f"a file has no {CONFIG}: name a folder with -o for what transformers loads"
        elif not self.tokenizer:
            yield "the tokenizer is missing, which GGUF has in a form of its own: --tokenizer FOLDER copies its files"


def open_gguf(opened: Checkpoint, dtype: str | None, tokenizer: str | os.PathLike[str] | None) -> GgufFolder | None:
    """Return a GGUF model as what it becomes; None if the checkpoint is none.

    Raises:
        UsageError: a tokenizer for another checkpoint.
        NeedsFlag: it has codes, for which transformers has no place.
        InputError: no table tells its names, a tensor is missing, or the folder has no tokenizer.
    """
    if not opened.is_gguf:
        if tokenizer is not None:
            raise UsageError("--tokenizer is for a GGUF model: others have theirs beside them")
        return None
    view = as_transformers(opened)
    coded = next((name for name in opened.weights), None)
    if coded and dtype is None:
        raise NeedsFlag(
            f"is stored as {opened.stored[coded].dtype}, for which transformers' files have no place",
            culprit=coded,
            flags="--dtype bf16",
            why="(or fp16, fp32)",
        )
    files = {} if tokenizer is None else find_tokenizer(Path(tokenizer))
    if tokenizer is not None and not files:
        raise InputError("has no tokenizer's files", culprit=os.fspath(tokenizer))
    return GgufFolder(view, files)
