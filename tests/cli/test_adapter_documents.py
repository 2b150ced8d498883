"""Hold the documents of the commands on adapters to the budget of `test_documents`, and to what each must tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, factors, load_model, write_kohya, write_model, write_peft
from test_documents import DEAD, LOUD, MODULES, WIDTHS, Files, files, shown

import loratool
from loratool.cli.render.document import BUDGET
from loratool.views.convert import ConvertReport
from loratool.views.parts.report import Report

__all__ = ["files"]
BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
MAKES = {
    "inspect": lambda f: loratool.inspect(f.adapter),
    "inspect --base": lambda f: loratool.inspect(f.adapter, base=f.base),
    "inspect --base, wrong": lambda f: loratool.inspect(FIXTURES / "gpt2" / "adapter", base=f.base),
    "inspect --for": lambda f: loratool.inspect_for(f.adapter, runtime="vllm"),
    "inspect --spectra": lambda f: loratool.spectra(f.adapter),
    "inspect BASE --spectra": lambda f: loratool.spectra(f.base),
    "diff": lambda f: loratool.diff(f.adapter, f.other),
    "diff --base": lambda f: loratool.diff(f.adapter, f.other, base=f.base),
    "diff of one": lambda f: loratool.diff(f.adapter, f.adapter),
    "diff of models": lambda f: loratool.diff(f.base, f.merged),
    "diff of one model": lambda f: loratool.diff(f.base, f.base),
    "resize --rank": lambda f: loratool.resize(f.other, "resized", rank=2),
    "resize --energy": lambda f: loratool.resize(f.other, "even", energy=0.6),
    "extract": lambda f: loratool.extract(f.base, f.tuned, "extracted", rank=2),
    "init": lambda f: loratool.init(f.base, "started", rank=2),
    "init --residual": lambda f: loratool.init(f.base, "pissa", method="pissa", rank=2, residual="residual"),
    "combine": lambda f: loratool.combine([(f.adapter, 0.7), (f.other, -0.3)], "sum"),
    "combine --rank": lambda f: loratool.combine([f.adapter, f.other], "best", rank=2),
    "combine ties": lambda f: loratool.combine([f.adapter, f.other], "ties", method="ties", rank=2),
    "convert": lambda f: loratool.convert(f.adapter, "loralib.safetensors", to="loralib"),
    "convert --layout": lambda f: loratool.convert(ADAPTER, "fused", to="peft", layout="fused", base=BASE),
    "convert --plain --rank": lambda f: loratool.convert(f.other, "plain", to="peft", plain=True, rank=2),
    "convert MODEL": lambda f: loratool.convert_model(f.base, "half", dtype="fp16"),
}  # type: dict[str, Callable[[More], Report]]


class More:
    """What `Files` has, a second adapter on the same modules, and a fine-tune."""

    def __init__(self, stage: Files) -> None:
        self.base, self.adapter, self.merged = stage.base, stage.adapter, stage.merged
        self.other, self.tuned = Path("task"), Path("tuned")
        shapes = {name: load.shape for name, load in load_model(self.base).items()}
        write_peft(
            self.other,
            {name: factors(*shapes[f"{name}.weight"], 4, seed=900 + i) for i, name in enumerate(MODULES)},
            lora_alpha=8,
        )
        torch.manual_seed(5)
        write_model(
            self.tuned,
            {name: (W + 0.002 * torch.randn_like(W.float())).bfloat16() for name, W in load_model(self.base).items()},
            {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 16},
        )


@pytest.fixture(scope="module")
def more(files: Files) -> More:
    return More(files)


@pytest.fixture(scope="module")
def reports(more: More) -> dict[str, Report]:
    return {name: make(more) for name, make in MAKES.items()}


@pytest.mark.parametrize("name", MAKES)
class TestEveryReport:
    @pytest.mark.slow
    @pytest.mark.parametrize("width", WIDTHS)
    def test_it_keeps_its_budget(self, name: str, width: int, reports: dict[str, Report]) -> None:
        lines = shown(reports[name], width).splitlines()
        assert len(lines) <= BUDGET and max(map(len, lines)) <= width, "\n".join(lines)

    def test_colour_changes_nothing_but_colour(self, name: str, reports: dict[str, Report]) -> None:
        coloured = shown(reports[name], 100, colour=True)
        assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == shown(reports[name], 100)

    def test_a_pipe_gets_no_pictures(self, name: str, reports: dict[str, Report]) -> None:
        assert not set("▁▂▃▄▅▆▇█") & set(shown(reports[name], None))

    def test_quiet_leaves_the_verdict(self, name: str, reports: dict[str, Report]) -> None:
        whole, quiet = (shown(reports[name], 80, quiet=each).splitlines() for each in (False, True))
        assert 1 <= len(quiet) <= 6 and set(quiet) <= set(whole)

    def test_every_module_is_counted_once(self, name: str, reports: dict[str, Report]) -> None:
        """In the rows and in the lines of their own: of each table as many as the report has rows to show."""
        for table in reports[name].document().tables:
            titles = [column.title for column in table.columns]
            at = titles.index("count") if "count" in titles else None
            count = sum(1 if at is None else int(str(row.cells[at]).replace(",", "")) for row in table.rows)
            told = count + sum(len(row.issues) for row in table.rows)
            rows = [len(each.rows) for each in reports[name].document(verbose=True).tables]
            report = reports[name]
            exact = sum(row.how == "exact" for row in report.modules) if isinstance(report, ConvertReport) else 0
            dead = name in ("inspect", "inspect --base")  # which a problem's line tells
            assert told in [each - exact - dead for each in rows]


class TestInspect:
    def test_a_dead_module_is_told_once_and_a_loud_one_has_a_line(self, reports: dict[str, Report]) -> None:
        lines = shown(reports["inspect --base"], 80).splitlines()
        assert lines[0] == "style: peft lora"
        assert lines[1] == "rank 2, alpha 2 (scale 1), F32, 224 modules, 14.3K parameters, 57.3 kB"
        (loud,) = [line for line in lines if line.startswith("! ")]
        assert re.fullmatch(rf"! {re.escape(LOUD)}  1\d\.\dx its neighbours: [\d,.]+%", loud)
        assert [line for line in lines if DEAD in line] == [f"problem: B @ A is 0 in 1 of 224 modules: {DEAD}"]
        (row,) = [line.split() for line in lines if line.startswith("self_attn.v_proj")]
        assert row[1] == "0-16,18-31"
        assert lines[-1] == "1 problem; 224 of 224 modules are in base"

    def test_of_another_model_there_is_no_table(self, reports: dict[str, Report]) -> None:
        document = reports["inspect --base, wrong"].document()
        assert document.tables == () and shown(reports["inspect --base, wrong"], 80).splitlines()[-1].endswith(
            "in base"
        )

    def test_a_file_without_alpha_has_none(self, tmp_path: Path) -> None:
        pairs = {f"down_blocks_1_attentions_{i}_transformer_blocks_0_attn1_to_q": factors(8, 8, 2) for i in range(2)}
        report = loratool.inspect(write_kohya(tmp_path / "a.safetensors", pairs))
        assert shown(report, None).splitlines()[1].startswith("rank 2, no alpha, F32, 2 modules")
        both = loratool.inspect(write_kohya(tmp_path / "b.safetensors", pairs, torch.tensor(1.0)))
        assert shown(both, None).splitlines()[1].startswith("rank 2, alpha 1 (scale 0.5), F32, 2 modules")

    def test_what_runs_next_is_a_whole_command(self, more: More, tmp_path: Path) -> None:
        good = loratool.inspect(more.other, base=more.base)
        assert shown(good, 80).splitlines()[-2:] == [
            "ok: 224 of 224 modules are in base, no problem found",
            "next: loratool merge base task -o merged",
        ]

    def test_each_component_of_an_image_model_has_rows(self) -> None:
        lines = shown(loratool.inspect(FIXTURES / "sdxl" / "adapter.safetensors"), 80).splitlines()
        names = {line.split()[0] for line in lines if line.startswith(("te", "unet"))}
        assert names == {"te1", "te2", "unet"}


def test_layers_are_sorted_as_numbers_under_whole_names(reports: dict[str, Report]) -> None:
    for name in ("inspect --spectra", "inspect BASE --spectra"):
        lines = shown(reports[name], 60).splitlines()
        rows = [line.split() for line in lines if line.startswith(("self_attn", "mlp"))]
        assert [row[:2] for row in rows] == [
            [kind, "0-31"] for kind in dict.fromkeys(m.split(".", 3)[3] for m in MODULES)
        ]
    verbose = shown(reports["inspect --spectra"], 80, verbose=True)
    assert "effective rank by kind, mean\n" in verbose and re.search(r"^gate_proj  █+ \d", verbose, re.MULTILINE)


class TestDiff:
    def test_the_verdict_is_a_word(self, reports: dict[str, Report]) -> None:
        assert shown(reports["diff of one"], 80).splitlines()[-1] == "same: the same delta in 224 modules"
        assert re.fullmatch(
            r"unrelated: cosine -?0\.0\d, [\d.]+% apart, at most 1[\d.]+%", shown(reports["diff"], 80).splitlines()[-1]
        )
        assert shown(reports["diff of one model"], 80).splitlines()[-1] == "same: 291 of 291 tensors are equal"
        last = shown(reports["diff of models"], 200).splitlines()[-1]
        assert re.fullmatch(r"different: 223 of 291 tensors, [\d.]+% apart in all, at most [\d,.]+%", last)

    def test_phi_is_drawn_for_those_who_ask(self, reports: dict[str, Report]) -> None:
        assert "phi(i, j), input" not in shown(reports["diff"], 80)
        lines = shown(reports["diff"], 80, verbose=True).splitlines()
        assert any(line.startswith("phi(i, j), input") for line in lines)

    def test_a_limit_is_told(self, more: More, run: Callable[..., object]) -> None:
        result = run("diff", more.base, more.tuned, "--fail-above", "0.01", "-q")
        assert result.exit_code == 1 and result.stdout.endswith(", which is above 1.00%\n")  # type: ignore[attr-defined]


def test_what_was_written_stands_last(reports: dict[str, Report]) -> None:
    lasts = {name: shown(reports[name], 100).splitlines() for name in MAKES}
    assert lasts["resize --rank"][1] == "rank 4 -> 2, F32"
    assert re.fullmatch(r"wrote resized  14\.3K parameters, 57\.3 kB \(was 115 kB\)", lasts["resize --rank"][-1])
    assert lasts["combine"][0] == "0.7 style - 0.3 task -> sum, by cat"
    assert lasts["combine"][1] == "rank 2 + 4 = 6, F32, 224 modules" and "exact sum (error " in lasts["combine"][2]
    assert lasts["extract"][-1] == "next: loratool merge base extracted -o rebuilt"
    assert lasts["convert"][-2] == "224 modules, factors copied byte for byte"
    assert lasts["convert MODEL"][1] == "291 tensors BF16 -> F16, no number became 0"
    assert lasts["init"][0] == "adapter for base, by lora" and lasts["init"][-1].startswith(
        "wrote started  14.3K parameters"
    )
    assert [line.split()[0] for line in lasts["init --residual"][-3:]] == ["wrote", "wrote", "undo"]
