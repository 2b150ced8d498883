"""Hold the pages of all reports against their reports: titles, rows, issues, figures, hashes.

Expected numbers are those of the files, read by the official safetensors and hashed by hashlib.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from safetensors.torch import save_file

import loratool
from loratool.commands.report_files import REPORTS, report_classes
from loratool.views.parts import quantities as q
from loratool.views.parts.content import Page, Sheet
from loratool.views.parts.document import Row, text_of
from loratool.views.parts.report import Report
from loratool.views.parts.rows import Measure
from loratool.views.parts.table import make_table

MODULES = [f"model.layers.{i}.self_attn.{kind}" for i in range(3) for kind in ("q_proj", "v_proj")]


def pair(seed: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return factors(24, 20, rank, seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of one model: a, b that lacks a module of a and has another, c = -a; the model, and what is no LoRA."""
    folder = tmp_path_factory.mktemp("pages")
    a = {name: pair(i) for i, name in enumerate(MODULES)}
    a[MODULES[2]] = (a[MODULES[2]][0], torch.zeros(24, 4))
    b = {name: pair(i + 10, 3) for i, name in enumerate(MODULES[1:])} | {"model.layers.0.self_attn.o_proj": pair(9, 3)}
    write_peft(folder / "a", a)
    write_peft(folder / "b", b)
    write_peft(folder / "c", {name: (A, -B) for name, (A, B) in a.items()})
    for i, name in enumerate("ab"):
        saved = load_model(folder / name) | {"base_model.model.model.norm.weight": weights(24, seed=i)}
        save_file(saved, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
        config = folder / name / "adapter_config.json"
        config.write_text(config.read_text()[:-1] + ', "modules_to_save": ["norm"]}')
    tensors = {f"{name}.weight": weights(24, 20, seed=i) for i, name in enumerate([*MODULES, *b])}
    write_model(folder / "base", tensors | {"model.norm.weight": weights(24)}, {"model_type": "llama"})
    (folder / "prompts").mkdir()
    save_file({"prompt_embeddings": torch.ones(4, 8)}, folder / "prompts" / "adapter_model.safetensors")
    (folder / "prompts" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}')
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> dict[str, Any]:
    """A report of each kind that has a page."""
    a, b, c, base = (folder / name for name in ("a", "b", "c", "base"))
    return {
        "merge": loratool.merge(base, a, folder / "merged"),
        "verify": loratool.verify(base, a, folder / "merged"),
        "wrong": loratool.verify(base, a, base),
        "inspect": loratool.inspect(a),
        "inspect beside a base": loratool.inspect(a, base=base),
        "inspect a model": loratool.inspect(base),
        "inspect a method": loratool.inspect(folder / "prompts"),
        "diff": loratool.diff(a, b),
        "diff beside a base": loratool.diff(a, b, base=base),
        "diff of several": loratool.diff(a, b, c),
        "diff of models": loratool.diff(base, folder / "merged"),
        "patch": loratool.patch(base, folder / "merged", folder / "merged.patch"),
        "apply": loratool.apply(base, folder / "merged.patch", folder / "applied"),
        "inspect a patch": loratool.inspect(folder / "merged.patch"),
        "combine": loratool.combine([c, b, a], folder / "never", dry_run=True, exclude="norm", allow="unrelated"),
        "spectra": loratool.spectra(a, base=base),
        "diff of spectra": loratool.diff_spectra(base, folder / "merged"),
        "diff of headers": loratool.diff_headers(a, b),
        "resize": loratool.resize(a, folder / "resized", rank=2),
        "extract": loratool.extract(base, folder / "merged", folder / "extracted", rank=2),
    }


def of_each(reports: dict[str, Any]) -> Iterator[tuple[str, Any, Page]]:
    for name, report in reports.items():
        yield name, report, report.page()


def with_rows(report: Any, **changes: Any) -> Any:
    """The report with fields of its rows replaced."""
    return replace(report, **{report.rows: tuple(replace(row, **changes) for row in getattr(report, report.rows))})


def table_rows(sheet: Sheet[Any]) -> tuple[Row, ...]:
    found = make_table(sheet.rows, sheet.columns, find_issue=sheet.find_issue, verbose=True)
    return found.rows


def test_every_report_with_a_page_is_here(reports: dict[str, Any]) -> None:
    paged = {each for verb in REPORTS for each in report_classes(verb) if getattr(each, "page_function", "")}
    assert paged == {type(report) for report in reports.values()}


def test_columns_that_few_reports_have_are_on_their_pages(reports: dict[str, Any], tmp_path: Path) -> None:
    ranks = tuple(replace(row, new_rank=i) for i, row in enumerate(reports["resize"].modules))
    rare = {
        "missed": with_rows(reports["merge"], missed=0.5),
        "size": replace(reports["merge"], quantized="like"),
        "out. error": with_rows(reports["resize"], weighted_error=0.1),
        "shared": replace(reports["combine"], kept=0.5, rank_method="ctm"),
        "new rank": replace(reports["resize"], modules=ranks),
        "gap (at most)": with_rows(reports["extract"], how="certified", stored=0.1),
        "gap (about)": with_rows(reports["extract"], how="estimated"),
    }
    for title, report in rare.items():
        loratool.write_report(report, tmp_path / "report.html")
        assert f"<dt>{title}" in (tmp_path / "report.html").read_text()


def test_a_sheet_has_all_rows_of_its_report(reports: dict[str, Any]) -> None:
    for name, report, page in of_each(reports):
        rows = getattr(report, report.rows)
        assert [row.name for row in page.sheets[0].rows] == [row.name for row in rows], name
        for sheet in page.sheets[1:]:
            assert sheet.rows == report.values, name


def test_the_issues_of_a_sheet_are_those_of_the_document(reports: dict[str, Any]) -> None:
    """Of two adapters the document lists what one of them lacks, where the page has a row with an issue."""
    told = Counter[str]()
    for name, report, page in of_each(reports):
        if type(report).__name__ in ("VerifyReport", "CheckpointReport", "MethodReport"):
            continue  # whose tables are made of other rows
        (table, *_) = report.document(verbose=True).tables
        issues = [each for row in table.rows for each in row.issues]
        ours = [each for row in table_rows(page.sheets[0]) for each in row.issues]
        assert issues == [each for each in ours if not each.reason.startswith("only in")], name
        told.update(each.reason.split(" in ")[0] for each in ours)
    assert told["delta is 0"] >= 5 and told["only"] >= 4


def test_figures_and_sentences_are_short(reports: dict[str, Any]) -> None:
    for name, _, page in of_each(reports):
        assert 3 <= len(page.figures) <= 8, name
        assert all(len(each.label) <= 20 and len(each.value) <= 20 and len(each.note) <= 60 for each in page.figures)
        assert page.arithmetic and all(not each.endswith(".") for each in page.arithmetic), name


def test_hashes_are_those_of_the_weights_files(reports: dict[str, Any], folder: Path) -> None:
    def sha256(adapter: str) -> str:
        return hashlib.sha256((Path(adapter) / "adapter_model.safetensors").read_bytes()).hexdigest()

    a, b, c = (str(folder / name) for name in "abc")
    adapters = {
        "inspect": [a],
        "inspect beside a base": [a],
        "diff": [a, b],
        "diff beside a base": [a, b],
        "diff of several": [a, b, c],
        "combine": [c, b, a],
        "verify": [a],
        "wrong": [a],
        "merge": [a],
    }
    for name, report, page in of_each(reports):
        if any(field.name == "sha256" for field in fields(report)) and name in adapters:
            assert report.sha256 == page.hashes, name
        if name in adapters:
            assert page.hashes == {each: sha256(each) for each in adapters[name]}, name


def figures(report: Report) -> dict[str, tuple[str, str]]:
    return {each.label: (each.value, each.note) for each in report.page().figures}


def test_the_figures_of_an_adapter(reports: dict[str, Any], folder: Path) -> None:
    tensors = load_model(folder / "a")
    count, nbytes = sum(x.numel() for x in tensors.values()), sum(x.nbytes for x in tensors.values())
    assert figures(reports["inspect beside a base"]) == {
        "rank": ("4", "alpha 4 (scale 1)"),
        "modules": ("7", "lora, replace"),
        "parameters": (f"{count:,}", "F32"),
        "size": (f"{nbytes / 1000:.3g} kB", ""),
        "in the base": ("7", "of 7 modules"),
        "problems": ("1", ""),
    }
    assert text_of(reports["inspect beside a base"].document().verdict[0]).startswith("1 problem;")


def test_more_than_all_of_a_delta_is_drawn_and_copied_as_it_is_written(reports: dict[str, Any]) -> None:
    """Rounding adds to what is kept of a small delta: 131% is told as 100%, and so must a cell's colour."""
    (sheet,) = with_rows(reports["merge"], kept=1.31).page().sheets
    (kept,) = [column for column in sheet.columns if isinstance(column, Measure) and column.what == q.KEPT]
    assert {(kept.of(row), kept.write(kept.of(row) or 0)) for row in sheet.rows} == {(1.0, "100%")}


def test_the_figures_of_a_verification(reports: dict[str, Any]) -> None:
    assert figures(reports["verify"])["the merge is"] == ("proven", "")
    assert figures(reports["verify"])["exact"] == ("7", "of 7 tensors")
    wrong = figures(reports["wrong"])
    assert wrong["the merge is"] == ("wrong", "") and wrong["untouched"] == ("1", "equal to the base's")
    sheet = reports["wrong"].page().sheets[0]
    verdict, what = (column.of for column in sheet.columns)
    marked = [row.name for row in sheet.rows if sheet.find_issue(row)]
    assert marked == [row.name for row in sheet.rows if verdict(row) == "wrong"] and len(marked) == int(
        wrong["wrong"][0]
    )
    assert {what(row) for row in sheet.rows if row.name in marked} == {row.detail for row in sheet.rows if row.detail}


def test_the_angles_of_two_adapters(reports: dict[str, Any]) -> None:
    """cos of the angles are the singular values of U'W, of orthonormal bases of the spans of both deltas."""
    page = reports["diff"].page()
    (curve,) = page.sheets[0].curves
    lines = {row.name: curve.lines(row) for row in page.sheets[0].rows}
    assert [bool(each) for each in lines.values()] == [False, True, False, True, True, True, False]
    name, (A1, B1), (A2, B2) = MODULES[1], pair(1), pair(10, 3)
    assert (curve.y.what.unit, set(lines[name])) == ("°", {"output side", "input side"})
    for side, one, two in (("output side", B1, B2), ("input side", A1.T, A2.T)):
        bases = [torch.linalg.qr(each.double()).Q for each in (one, two)]
        cosines = torch.linalg.svdvals(bases[0].T @ bases[1]).tolist()
        assert lines[name][side] == [
            (i, pytest.approx(math.degrees(math.acos(each)), rel=5.01e-6)) for i, each in enumerate(cosines, 1)
        ]


def test_a_module_of_one_adapter_has_no_cosine(reports: dict[str, Any]) -> None:
    sheet = reports["diff"].page().sheets[0]
    of = {column.what.title: column.of for column in sheet.columns}
    found = {row.name: (of["cosine"](row) is None, of["ranks"](row)) for row in sheet.rows if of["cosine"](row) is None}
    assert found == {MODULES[0]: (True, "4/0"), "model.layers.0.self_attn.o_proj": (True, "0/3")}


def test_the_heat_maps_of_what_adapters_share(reports: dict[str, Any]) -> None:
    cosine, interference, apart = reports["diff of several"].page().heatmaps
    assert cosine.columns == cosine.rows == ["A", "B", "C"]
    assert cosine.values[0][2] == cosine.values[2][0] == pytest.approx(-1)
    assert [cosine.values[i][i] for i in range(3)] == pytest.approx([1] * 3)
    assert apart.values[0][2] == pytest.approx(2) and apart.write(apart.values[0][2] or 0) == "200%"
    assert [interference.values[i][i] for i in range(3)] == [None] * 3
    assert interference.values[0][2] == interference.values[2][0] == pytest.approx(1)
    ours = reports["combine"].page().heatmaps
    assert [each.cell for each in ours] == [q.COSINE, q.INTERFERENCE] and ours[0].values[0][2] == pytest.approx(-1)
    assert reports["diff"].page().heatmaps[0].columns == ("1", "2", "3")


def names(kind: str, layers: Sequence[int]) -> set[str]:
    return {f"model.layers.{i}.{kind}.weight" for i in layers}


def test_a_row_of_a_model_stands_for_its_weights(tmp_path: Path) -> None:
    """Two kinds of types in the layers, experts, and a layer that alone has a kind."""
    types = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": weights(4, 6, dtype=each) for i, each in enumerate(types)}
    tensors |= {f"model.layers.{i}.mlp.experts.{e}.w1.weight": weights(2, 2) for i in (1, 3) for e in range(3)}
    tensors |= {f"model.layers.2.mlp.gate.{e}.weight": weights(2, 4) for e in range(2)}
    tensors["model.layers.3.self_attn.q_proj.weight"] = weights(4, 4)
    tensors["lm_head.weight"] = weights(8, 4)
    tensors |= {f"decoder.block.{i}.layer.0.q.weight": weights(4, 4) for i in range(2)}  # T5's: the layer is 0 and 1
    tensors |= {f"up_blocks.{i}.attentions.{i}.proj_in.weight": weights(2, 2) for i in (0, 1)}
    tensors |= {f"model.layers.{i}.mlp.experts.{e}.w2.weight": weights(2, 3) for i, e in ((1, 0), (2, 1), (3, 1))}
    report = loratool.inspect(write_model(tmp_path, tensors, {"model_type": "llama"}))
    (sheet,) = report.page().sheets
    assert sheet.members
    of = {column.what.title: column.of for column in sheet.columns}
    odd = "up_blocks.{0..1}.attentions.{0..1}.proj_in.weight"  # whose ranges would be those of four
    assert {row.name: (set(sheet.members(row)), of["count"](row), of["bits"](row)) for row in sheet.rows} == {
        "model.layers.{0,2}.mlp.up_proj.weight": (names("mlp.up_proj", (0, 2)), 2, 32),
        "model.layers.{1,3}.mlp.up_proj.weight": (names("mlp.up_proj", (1, 3)), 2, 16),
        "model.layers.{1,3}.mlp.experts.{0..2}.w1.weight": (
            {f"model.layers.{i}.mlp.experts.{e}.w1.weight" for i, e in ((1, 0), (3, 1), (1, 2))},
            6,
            32,
        ),
        "model.layers.2.mlp.gate.{0..1}.weight": (names("mlp.gate.0", [2]) | names("mlp.gate.1", [2]), 2, 32),
        "model.layers.3.self_attn.q_proj.weight": (names("self_attn.q_proj", [3]), 1, 32),
        "lm_head.weight": ({"lm_head.weight"}, 1, 32),
        odd: ({odd}, 2, 32),
        "model.layers.{1..3}.mlp.experts.{0..1}.w2.weight": (
            {f"model.layers.{i}.mlp.experts.{e}.w2.weight" for i, e in ((1, 0), (2, 1), (3, 0))},
            3,
            32,
        ),
        "decoder.block.{0..1}.layer.0.q.weight": ({f"decoder.block.{i}.layer.0.q.weight" for i in range(2)}, 2, 32),
    }
    count, nbytes = sum(x.numel() for x in tensors.values()), sum(x.nbytes for x in tensors.values())
    assert report.bits == nbytes * 8 / count


@pytest.mark.slow
def test_the_largest_page_of_a_model_of_224_modules_is_below_1_5_mb(tmp_path: Path) -> None:
    """Of two adapters of rank 64 the angles and phi are most of it."""
    kinds = [f"self_attn.{letter}_proj" for letter in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    for name in "ab":
        names = [f"model.layers.{i}.{kind}" for i in range(32) for kind in kinds]
        seeds = enumerate(names, 1000 * (name == "a"))
        write_peft(tmp_path / name, {each: factors(160, 160, 64, seed) for seed, each in seeds})
    report = loratool.diff(tmp_path / "a", tmp_path / "b")
    assert 1_200_000 < loratool.write_report(report, tmp_path / "report.html") < 1_500_000


@pytest.mark.parametrize(("way", "word"), [("requantize", "the base's scales"), ("like", "with new scales")])
def test_a_merge_into_codes_says_what_they_are(reports: dict[str, Any], way: str, word: str) -> None:
    """Codes are not the nearest number of a type, which a page of plain numbers says alone."""
    plain = reports["merge"]
    assert len(plain.page().arithmetic) == 1
    assert word in replace(plain, quantized=way).page().arithmetic[1]
    assert replace(plain, quantized="mixed").page().arithmetic == plain.page().arithmetic
