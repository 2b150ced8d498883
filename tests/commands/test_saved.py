"""Write adapters of tensors in memory: the files that `convert` writes, what PEFT applies, and nothing after a no."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, factors, write_kohya, write_model, write_peft
from lib.models.peft_models import by_peft
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import loratool
from loratool.adapters.formats import FORMATS, written_formats
from loratool.errors import InputError, NeedsFlag, UsageError
from loratool.files.output.output import CONTAINERS

LLAMA, SDXL = FIXTURES / "llama", FIXTURES / "sdxl"
Q = "model.layers.0.self_attn.q_proj"


def read(path: Path, **options: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    with loratool.open_adapter(path, **options) as adapter:
        return {name: (module.A, module.B, module.scale) for name, module in adapter.items()}


def weights_file(path: Path) -> Path:
    return path if path.is_file() else max(path.iterdir(), key=lambda each: each.stat().st_size)


@pytest.mark.parametrize("to", written_formats())
def test_what_was_opened_is_written_again(to: str, tmp_path: Path) -> None:
    """The tensors, and the very file if nothing but tensors and scales are in it."""
    can, of_image = FORMATS[to].can, FORMATS[to].can.components == "many"
    ending = "" if can.folder else CONTAINERS[FORMATS[to].container][0]
    first, again = tmp_path / f"first{ending}", tmp_path / f"again{ending}"
    base = LLAMA / "base" if can.named_by_model else None
    start = SDXL / "adapter.safetensors" if of_image else LLAMA / "adapter"
    loratool.convert(start, first, to=to, base=base, card=False)
    alpha = {"alpha": 16.0} if can.alpha == "none" else {}
    modules = read(start if can.named_by_model else first, **({} if can.named_by_model else alpha))
    nbytes = loratool.save_adapter(again, modules, to=to, base=base)  # type: ignore[arg-type]
    assert nbytes < weights_file(again).stat().st_size
    if to != "diffusers":  # whose metadata had more
        assert weights_file(first).read_bytes() == weights_file(again).read_bytes()
    found = read(again, **alpha)
    for one, other in zip(read(first, **alpha).items(), found.items(), strict=True):
        (name, (A, B, scale)), (same, (C, D, factor)) = one, other
        assert name == same and torch.equal(A, C) and torch.equal(B, D) and scale == factor


def test_what_is_written_acts_in_peft(tmp_path: Path) -> None:
    """With a scale and a rank of its own in each module, an embedding, and arrays of numpy."""
    sizes = {Q: (64, 64, 2), "model.layers.1.mlp.down_proj": (64, 176, 3), "model.embed_tokens": (64, 256, 2)}
    vocabulary = loratool.open_checkpoint(LLAMA / "base").specs["model.embed_tokens.weight"].shape[0]
    sizes["model.embed_tokens"] = (64, vocabulary, 2)
    given = {n: (*map(torch.Tensor.numpy, factors(*s, seed=i)), 0.5 + i) for i, (n, s) in enumerate(sizes.items())}
    loratool.save_adapter(tmp_path / "a", given, base=LLAMA / "base")
    found = by_peft(LLAMA / "base", tmp_path / "a", LlamaForCausalLM)
    base = load_weights(LLAMA / "base")
    for name, (A, B, scale) in given.items():
        change = scale * B.astype(np.float64) @ A.astype(np.float64)
        change = change.T if "embed" in name else change
        assert np.allclose(found[f"{name}.weight"].double() - base[f"{name}.weight"].double(), change, atol=1e-5)
    with loratool.open_adapter(tmp_path / "a") as adapter:
        assert adapter.base_model == str(LLAMA / "base")


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def test_a_convolution_keeps_its_kernel(tmp_path: Path) -> None:
    A, B = torch.randn(2, 4, 3, 3), torch.randn(8, 2, 1, 1)
    start = write_kohya(tmp_path / "a.safetensors", {"down_blocks.0.resnets.0.conv1": (A, B)}, torch.tensor(1.0))
    modules = read(start)
    loratool.save_adapter(tmp_path / "b.safetensors", modules, to="kohya", architecture="sdxl")
    one, two = (load_file(tmp_path / f"{each}.safetensors") for each in "ab")  # sd-scripts' names in the second
    ends = [{name.partition(".")[2]: x for name, x in each.items()} for each in (one, two)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][end], ends[1][end]) for end in ends[0])


def test_what_is_refused_leaves_what_was_there(tmp_path: Path) -> None:
    A, B = factors(64, 64, 2)
    out = write_peft(tmp_path / "out", {Q: (A, B)})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    base, nan = write_model(tmp_path / "base", {f"{Q}.weight": A}), torch.full_like(A, torch.nan)
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: loratool.save_adapter(out, {Q: (A, B, 1)}), NeedsFlag, "exists already\nadd force=True"),
        (lambda: loratool.save_adapter(out, {Q: (nan, B, 1)}, force=True), InputError, "nan or inf"),
        (lambda: loratool.save_adapter(out, {Q: (A, A, 1)}, force=True), UsageError, "not .r, in. and .out, r"),
        (lambda: loratool.save_adapter(out, {Q: (A.int(), B, 1)}, force=True), UsageError, "A is not a matrix of"),
        (lambda: loratool.save_adapter(out, {Q: (A, B)}), UsageError, "is not .A, B, scale"),  # type: ignore[dict-item]
        (lambda: loratool.save_adapter(out, {Q: (A, B, np.nan)}), UsageError, "scale nan is not a finite number"),
        (lambda: loratool.save_adapter(out, {}), UsageError, "is not a mapping of module"),
        (lambda: loratool.save_adapter(out, {Q: (A, B, 1)}, to="kohya"), UsageError, "are single files"),
        (lambda: loratool.save_adapter("s3://a/b", {Q: (A, B, 1)}), UsageError, "is not on this machine"),
        (lambda: loratool.save_adapter(out.with_suffix(".gguf"), {Q: (A, B, 1)}, to="gguf"), NeedsFlag, "base=BASE"),
        (
            lambda: loratool.save_adapter(base, {Q: (A, B, 1)}, base=base, force=True),
            UsageError,
            "would overwrite an input",
        ),
    ]
    for call, error, match in calls:
        with pytest.raises(error, match=match):
            call()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and {*tmp_path.iterdir()} == {out, base}
    loratool.save_adapter(out, {Q: (A, 2 * B, 1)}, force=True)
    assert torch.equal(read(out)[Q][1], 2 * B)


def test_the_examples_of_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loratool.demo("demo")
    examples = 0
    for name in loratool.__all__:
        for test in doctest.DocTestFinder().find(getattr(loratool, name), name, globs={"loratool": loratool}):
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
            examples += result.attempted
            assert not result.failed, test.name
    assert examples == 4
