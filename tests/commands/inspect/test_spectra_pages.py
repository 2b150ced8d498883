"""Hold the pages of spectra, resize and extract against the reports: curves, marked ranks, figures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, weights, write_model, write_peft

import loratool
from loratool.views.parts.content import Page, Points

BASE, ADAPTER, TUNED = (FIXTURES / "llama" / name for name in ("base", "adapter", "tuned"))


def curves(page: Page, row: Any) -> tuple[dict[str, Points], dict[str, Points]]:
    """Return the lines of a row's singular values and of its energy."""
    (sheet,) = page.sheets
    values, energy = sheet.curves
    assert values.y.log and values.x.log and energy.x.log and energy.y.what.unit == "%"
    return dict(values.lines(row)), dict(energy.lines(row))


def figures(page: Page) -> dict[str, str]:
    return {each.label: each.value for each in page.figures}


def test_a_models_spectra() -> None:
    report = loratool.spectra(BASE, target="q_proj")
    page = report.page()
    assert page.sheets[0].rows == report.modules and figures(page)["matrices"] == str(len(report.modules))
    row = report.modules[0]
    values, energy = curves(page, row)
    assert list(values) == list(energy) == ["weight"]
    assert [x for x, _ in values["weight"]] == [1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 23, 32, 45, 64]
    assert [y for _, y in values["weight"]][:8] == pytest.approx(row.top, rel=1e-5)
    assert energy["weight"][-1] == (64, 100.0)


def test_an_adapter_beside_its_base(tmp_path: Path) -> None:
    """The largest direction is new where a delta of rank 1 is far larger than the base; what is 0 is on no axis."""
    module = "model.layers.0.self_attn.q_proj"
    A, B = factors(24, 20, 1)
    adapter = write_peft(tmp_path / "a", {module: (torch.cat([A, A]), torch.cat([B, B], 1) * 1e4)})
    base = write_model(tmp_path / "base", {f"{module}.weight": weights(24, 20, seed=3)}, {"model_type": "llama"})
    report = loratool.spectra(adapter, base=base, top=5)
    (row,), page = report.modules, report.page()
    values, energy = curves(page, row)
    assert list(values) == ["delta", "weight with its delta", "first new 1"] and len(values["delta"]) == 1
    assert len(values["weight with its delta"]) == 5
    low, high = min(y for _, y in values["weight with its delta"]), max(row.top)
    assert values["first new 1"] == [(1, low), (1, pytest.approx(high, rel=1e-4))]
    assert energy["first new 1"] == [(1, 0), (1, 100)] and figures(page)["new"] == "1"
    (plain,) = loratool.spectra(adapter).modules
    assert list(curves(loratool.spectra(adapter).page(), plain)[0]) == ["delta"]


def test_a_weight_of_zeros_has_no_curve_of_values(tmp_path: Path) -> None:
    report = loratool.spectra(write_model(tmp_path / "base", {"a.q_proj.weight": torch.zeros(4, 5)}))
    values, energy = curves(report.page(), report.modules[0])
    assert values == {} and energy == {"weight": [(place, 100.0) for place in (1, 2, 3, 4)]}


def test_a_fine_tunes_spectra() -> None:
    report = loratool.diff_spectra(BASE, TUNED, target="q_proj,down_proj", top=12)
    page = report.page()
    values, energy = curves(page, report.weights[0])
    assert len(values["tuned"]) == len(energy["tuned"]) == 10 and values["tuned"][-1][0] == 12
    assert figures(page)["changed"] == str(len(report.weights)) and "among the 12 leading" in page.arithmetic[0]
    same = loratool.diff_spectra(BASE, BASE).page()
    assert figures(same) == {"changed": "0"} and not same.sheets[0].rows


def test_a_resize(tmp_path: Path) -> None:
    report = loratool.resize(ADAPTER, tmp_path / "out", rank=3)
    page = report.page()
    row = report.modules[0]
    values, energy = curves(page, row)
    assert list(values) == list(energy) == ["delta", "new rank 3"]
    assert energy["new rank 3"] == [(3, 0), (3, 100)] and len(energy["delta"]) == 8
    assert energy["delta"][2][1] == pytest.approx(100 * row.kept, rel=1e-5)
    file = (ADAPTER / "adapter_model.safetensors").read_bytes()
    assert page.hashes == {str(ADAPTER): hashlib.sha256(file).hexdigest()}
    assert page.hashes == loratool.spectra(ADAPTER).page().hashes
    assert figures(page)["rank"] == "3" and figures(page)["kept"] == f"{100 * report.kept:.1f}%"


def test_an_extraction(tmp_path: Path) -> None:
    report = loratool.extract(BASE, TUNED, tmp_path / "out", rank=4)
    page = report.page()
    row = report.modules[0]
    values, energy = curves(page, row)
    assert list(values) == ["delta", "rounding", "rank 4"] and list(energy) == ["delta", "about", "rank 4"]
    assert energy["about"] == [energy["delta"][-1], (row.rank_50, 50), (row.rank_90, 90)]
    assert values["rounding"] == [(1, row.noise), (4, row.noise)]
    assert energy["delta"][-1] == (4, pytest.approx(100 * row.kept, rel=1e-5))
    assert figures(page)["exact"] == str(len(report.exact)) and page.sheets[0].rows == report.modules
