"""Count what commands do for each tensor and what they take of memory, where many tensors or a high rank would tell."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import factors, weights, write_model, write_peft

import loratool
from loratool.adapters.formats import peft
from loratool.files.containers import safetensors_file
from loratool.numerics.products import lowest_bits

MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(20)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", {f"{module}.weight": weights(6, 4) for module in MODULES})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_peft(tmp_path / "adapter", {module: factors(6, 4, 2) for module in MODULES})


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Counter[Any]:
    """Count the calls of a function by its first argument."""
    calls: Counter[Any] = Counter()
    own: Callable[..., Any] = getattr(module, name)

    def counted(first: Any, *more: Any) -> Any:
        calls[first] += 1
        return own(first, *more)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("what", ["base", "adapter"])
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_header_is_parsed_once(
    what: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(what)
    calls = count_calls(monkeypatch, safetensors_file, "_parse_header")
    if command == "inspect":
        loratool.inspect(source)
    elif what == "base":
        loratool.convert_model(source, tmp_path / "out", dtype="bf16")
    else:
        loratool.convert(source, tmp_path / "out", to="mlx")
    assert set(calls.values()) == {1}  # of what was read and, for an adapter's digest, of what was written


def test_a_header_that_another_file_had_is_not_taken_for_its_own(base: Path, tmp_path: Path) -> None:
    file = base / "model.safetensors"
    before = loratool.inspect(file)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(loratool.errors.InputError, match="foreign bytes"):
        loratool.inspect(file)
    write_model(base, {"lm_head.weight": weights(3, 5)})
    assert before.tensors == len(MODULES) and loratool.inspect(file).tensors == 1


def test_a_name_in_the_output_is_made_once_a_factor(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, peft, "saved_name")
    loratool.convert(adapter, tmp_path / "out", to="peft", plain=True)
    assert len(calls) == 2 * len(MODULES) and max(calls.values()) == 1  # of the source's names, which the output has


def test_the_lowest_bits_of_a_large_factor_take_no_memory_like_it() -> None:
    x = np.arange(1, 1 + (1 << 20), dtype=np.float64).reshape(1 << 10, 1 << 10)
    tracemalloc.start()
    found = lowest_bits([x], len(x))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < x.nbytes / 2
    assert set(found) == {0}
    assert list(lowest_bits([x[:, -1:]], len(x))[:3]) == [10, 11, 10]  # of 1024, 2048 and 3072
