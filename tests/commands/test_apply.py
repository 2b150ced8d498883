"""Hold `apply` to the bytes of the files that `patch` compared: forwards, back, in chains, and of wrong models."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import few
from lib.models.patch_pairs import PAIRS, tree

import loratool

DEFAULT = ("llama", "side files", "torch", "gguf blocks", "diffusers", "int4", "mixed", "to bf16", "other tensors")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", few(PAIRS, *DEFAULT))
def test_every_byte_comes_back(tmp_path: Path, name: str, fast: bool) -> None:
    write, leads_back = PAIRS[name]
    base, tuned = write(tmp_path)
    patch, out, back = (tmp_path / each for each in ("p.patch", f"out{tuned.suffix}", f"back{base.suffix}"))
    report = loratool.patch(base, tuned, patch, fast=fast)
    loratool.apply(base, patch, out)
    assert tree(out) == tree(tuned)
    assert fast or report.reversible is leads_back
    if report.reversible:
        loratool.apply(tuned, patch, back, reverse=True)
        assert tree(back) == tree(base)
