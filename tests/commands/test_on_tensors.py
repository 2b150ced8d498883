"""Commands that compute on a GPU if there is one: on torch's tensors they find what they find on numpy's arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, factors, write_peft

import loratool
from loratool.commands.combine.methods.table import METHODS, NOT_COMPRESSED
from loratool.numerics.arrays import Device

BASE, ADAPTER, TUNED = (FIXTURES / "llama" / name for name in ("base", "adapter", "tuned"))


class Tensors(Device):
    """A device for tensors in the CPU's memory."""

    @property
    def is_gpu(self) -> bool:
        return True


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(each)
    elif isinstance(value, int | float):
        yield value


def same_on_both(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_arrays, asked = [*numbers_in(asdict(call()))], list[str]()

    def choose_device(name: str) -> Device:
        asked.append(name)
        return Tensors("cpu")

    with monkeypatch.context() as patch:
        for name, module in [*sys.modules.items()]:
            if name.startswith("loratool.") and hasattr(module, "choose_device"):
                patch.setattr(module, "choose_device", choose_device)
        on_tensors = [*numbers_in(asdict(call()))]
    assert asked and len(on_arrays) > 9
    assert on_tensors == pytest.approx(on_arrays, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [write_peft(root / str(seed), {"x": factors(60, 40, 3, seed)}) for seed in (1, 2, 3)]


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"energy": 0.9}], ids=["", "rank", "energy"])
@pytest.mark.parametrize("method", METHODS)
def test_combine(
    method: str, options: dict[str, Any], adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "energy" in options and METHODS[method].flat:
        pytest.skip("cannot be truncated")
    if "rank" in options and method in NOT_COMPRESSED:
        options = {**options, "rank_method": "truncate"}
    same_on_both(
        lambda: loratool.combine(adapters, tmp_path / "out", method=method, force=True, **options),  # type: ignore[arg-type]
        monkeypatch,
    )


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.8}, {"rank_rule": ("noise", 1.0)}])
def test_resize(options: dict[str, Any], adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_on_both(lambda: loratool.resize(adapters[0], tmp_path / "out", force=True, **options), monkeypatch)


def test_diff(adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    same_on_both(lambda: loratool.diff(*adapters), monkeypatch)
    same_on_both(lambda: loratool.diff(*adapters[:2]), monkeypatch)
    same_on_both(lambda: loratool.diff(ADAPTER, ADAPTER, base=BASE), monkeypatch)
    same_on_both(lambda: loratool.diff_spectra(BASE, TUNED), monkeypatch)


def test_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    same_on_both(lambda: loratool.spectra(ADAPTER), monkeypatch)
    same_on_both(lambda: loratool.spectra(BASE), monkeypatch)
    same_on_both(lambda: loratool.spectra(ADAPTER, base=BASE), monkeypatch)
