"""Measure what `extract --imatrix` gains where a sentence encoder's activations are known.

    python moments_quality.py BASE TUNED

BASE and TUNED are those of sentence_similarity.py, and so is what is measured. The mean of x_j^2 at the input of each
linear layer is collected of TUNED over sentences of Python's documentation, and written as llama.cpp's imatrix by its
own `gguf`. The adapter is judged on other sentences of it, and on verse, which has little in common with them.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from random import Random

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.sentence_similarity import SONNETS, similarities
from lib.files.imatrix_files import write_gguf

import loratool

RANKS = (2, 4, 8, 16)
COLLECTED, HELD_OUT = 400, 200  # sentences
BATCH = 20


def documentation() -> list[str]:
    """Return sentences of what `help()` of Python says of the language, in an order without meaning."""
    texts = (re.sub(r"\s+", " ", topics[name]) for name in sorted(topics))
    found = [part for text in texts for part in re.split(r"(?<=[.:]) ", text) if re.match(r"[A-Z].{40,300}$", part)]
    sentences = list(dict.fromkeys(found))
    Random(0).shuffle(sentences)
    return sentences


@torch.no_grad()
def moments(folder: Path, sentences: list[str]) -> dict[str, tuple[Tensor, int]]:
    """Return the sum of x_j^2 at the input of each linear layer, (in,), and over how many tokens; padding is none."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found: dict[str, tuple[Tensor, int]] = {}
    mask = torch.empty(0, dtype=torch.bool)

    def add(name: str, x: Tensor) -> None:
        if x.shape[:2] == mask.shape:  # the pooler, which sees one token of each sentence, is in no GGUF
            total, count = found.get(name, (torch.zeros(x.shape[-1], dtype=torch.float64), 0))
            found[name] = total + x[mask].double().square().sum(0), count + int(mask.sum())

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
    for start in range(0, len(sentences), BATCH):
        tokens = tokenizer(sentences[start : start + BATCH], padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].bool()
        model(**tokens)
    return found


def write_imatrix(path: Path, found: dict[str, tuple[Tensor, int]]) -> None:
    """Write the file of llama-imatrix, under the names that llama.cpp's converter gives the tensors of a BERT."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    layers = 1 + max(int(name.split("layer.")[1].split(".")[0]) for name in found)
    names = get_tensor_name_map(MODEL_ARCH.BERT, layers)
    write_gguf(
        path, {f"{names.get_name(name)}.weight": (total[None], [count]) for name, (total, count) in found.items()}
    )


def main(base: Path, tuned: Path) -> None:
    sentences = documentation()
    verse = [line.strip() for line in SONNETS.read_text().splitlines() if len(line.strip()) > 20][:40]
    evaluated = {"documentation": sentences[COLLECTED : COLLECTED + HELD_OUT], "verse": verse}
    before, after = ([similarities(model, lines) for lines in evaluated.values()] for model in (base, tuned))
    print("| rank | imatrix | " + " | ".join(evaluated) + " |\n|---|---|" + "---|" * len(evaluated))
    with tempfile.TemporaryDirectory() as scratch:
        adapter, merged, imatrix = (Path(scratch) / name for name in ("adapter", "merged", "imatrix.gguf"))
        write_imatrix(imatrix, moments(tuned, sentences[:COLLECTED]))
        for rank in RANKS:
            for given in (None, imatrix):
                loratool.extract(base, tuned, adapter, rank=rank, imatrix=given, force=True)
                loratool.merge(base, adapter, merged, undo=False, force=True)
                now = [similarities(merged, lines) for lines in evaluated.values()]
                back = [1 - (n - a).norm() / (b - a).norm() for n, a, b in zip(now, after, before, strict=True)]
                cells = " | ".join(f"{share:.1%}" for share in back)
                print(f"| {rank} | {'yes' if given else 'no'} | {cells} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
