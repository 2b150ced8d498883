"""Show every report in a notebook, as plain data and as a table of pandas: each has what --json prints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from lib.harness.interrupted import interrupted
from safetensors.torch import save_file

import loratool
from loratool.commands.report_files import REPORTS, report_classes
from loratool.errors import MachineError
from loratool.views.parts.document import HEATS, SPAN_STYLES, Strip, text_of
from loratool.views.parts.html import STYLES
from loratool.views.parts.report import Report, WritingReport

BASE, ADAPTER, TUNED = (FIXTURES / "llama" / name for name in ("base", "adapter", "tuned"))
OTHER = FIXTURES / "gpt2" / "base"

# each command line that prints a report, with {out} for a place that is free
COMMANDS = {
    "merge": "merge {base} {adapter} -o {out}",
    "unmerge": "unmerge {merged} {adapter} -o {out} --dry-run",
    "verify": "verify {base} {adapter} {merged}",
    "verify a statement": "verify --attestation {statement}",
    "patch": "patch {base} {tuned} -o {out}",
    "patch of another program": "patch {base} {tuned} --to prime-rl --step 2 -o {out}",
    "apply": "apply {base} {patch} -o {out} --dry-run",
    "extract": "extract {base} {tuned} -o {out} --rank 2",
    "init": "init {base} -o {out}",
    "resize": "resize {adapter} --rank 2 -o {out}",
    "combine": "combine {adapter} {adapter} -o {out}",
    "convert": "convert {adapter} --to peft -o {out}",
    "convert a model": "convert {base} --dtype fp32 -o {out}",
    "convert metadata": "convert {file} --set a=b --unset x -o {out}.safetensors",
    "count": "count {base}",
    "demo": "demo {out}",
    "env": "env",
    "diff": "diff {adapter} {adapter}",
    "diff of models": "diff {base} {tuned}",
    "inspect": "inspect {adapter}",
    "inspect a model": "inspect {base}",
    "inspect a patch": "inspect {patch}",
    "inspect files": "inspect {merged} --digest --files",
    "inspect for a runtime": "inspect {adapter} --for vllm",
    "inspect a method": "inspect {method}",
    "spectra": "inspect {adapter} --spectra",
    "spectra beside a base": "inspect {adapter} --spectra --base {base}",
    "diff of spectra": "diff {base} {tuned} --spectra",
    "run": "run {recipe} --force",
    "recover": "recover {left} --dry-run",
}
FUNCTIONS: dict[str, Callable[[dict[str, Path]], Any]] = {
    "merge": lambda p: loratool.merge(p["base"], p["adapter"], p["out"]),
    "unmerge": lambda p: loratool.unmerge(p["merged"], p["adapter"], p["out"], dry_run=True),
    "verify": lambda p: loratool.verify(p["base"], p["adapter"], p["merged"]),
    "verify a statement": lambda p: loratool.verify_attestation(p["statement"]),
    "patch": lambda p: loratool.patch(p["base"], p["tuned"], p["out"]),
    "patch of another program": lambda p: loratool.patch(p["base"], p["tuned"], p["out"], to="prime-rl", step=2),
    "apply": lambda p: loratool.apply(p["base"], p["patch"], p["out"], dry_run=True),
    "extract": lambda p: loratool.extract(p["base"], p["tuned"], p["out"], rank=2),
    "init": lambda p: loratool.init(p["base"], p["out"]),
    "resize": lambda p: loratool.resize(p["adapter"], p["out"], rank=2),
    "combine": lambda p: loratool.combine([p["adapter"]] * 2, p["out"]),
    "convert": lambda p: loratool.convert(p["adapter"], p["out"], to="peft"),
    "convert a model": lambda p: loratool.convert_model(p["base"], p["out"], dtype="fp32"),
    "convert metadata": lambda p: loratool.edit_metadata(
        p["file"], f"{p['out']}.safetensors", set={"a": "b"}, unset="x"
    ),
    "count": lambda p: loratool.count(p["base"]),
    "demo": lambda p: loratool.demo(p["out"]),
    "env": lambda p: loratool.env(),
    "diff": lambda p: loratool.diff(p["adapter"], p["adapter"]),
    "diff of models": lambda p: loratool.diff(p["base"], p["tuned"]),
    "inspect": lambda p: loratool.inspect(p["adapter"]),
    "inspect a model": lambda p: loratool.inspect(p["base"]),
    "inspect a patch": lambda p: loratool.inspect(p["patch"]),
    "inspect files": lambda p: loratool.inspect_files(p["merged"]),
    "inspect for a runtime": lambda p: loratool.inspect_for(p["adapter"], runtime="vllm"),
    "inspect a method": lambda p: loratool.inspect(p["method"]),
    "spectra": lambda p: loratool.spectra(p["adapter"]),
    "spectra beside a base": lambda p: loratool.spectra(p["adapter"], base=p["base"]),
    "diff of spectra": lambda p: loratool.diff_spectra(p["base"], p["tuned"]),
    "diff of headers": lambda p: loratool.diff_headers(p["base"], p["base"]),
    "run": lambda p: loratool.run(p["recipe"], force=True),
    "recover": lambda p: loratool.recover(p["left"], dry_run=True),
}


class Fragment(HTMLParser):
    """The text of a fragment of HTML, by its cells; tags that are not closed in order are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        if tag in ("td", "th", "div", "pre"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def test_every_command_is_here() -> None:
    assert {line.split()[0] for line in COMMANDS.values()} == REPORTS.keys() - {"guide"}


@pytest.mark.parametrize("command", REPORTS)
def test_a_report_on_what_was_written_names_it(command: str) -> None:
    for kind in report_classes(command):
        names = {each.name for each in fields(kind)}
        assert names >= {"out", "dry_run"} or not issubclass(kind, WritingReport), (
            f"{kind.__name__} lacks out or dry_run"
        )


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shows")
    loratool.merge(BASE, ADAPTER, folder / "merged", attest=folder / "merged.json")
    loratool.patch(BASE, TUNED, folder / "tuned.patch")
    save_file({"prompt_embeddings": torch.ones(4, 8)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}')
    words = {"command": "resize", "adapter": str(ADAPTER), "rank": 2, "out": str(folder / "of-run")}
    (folder / "recipe.json").write_text(json.dumps(words))
    inputs = {
        "base": BASE,
        "adapter": ADAPTER,
        "tuned": TUNED,
        "merged": folder / "merged",
        "statement": folder / "merged.json",
        "left": interrupted(BASE, ADAPTER, folder / "left"),
        "patch": folder / "tuned.patch",
    }
    save_file({"w": torch.ones(2, 2)}, folder / "file.safetensors", {"x": "y"})
    inputs["file"] = folder / "file.safetensors"
    return {**inputs, "method": folder, "recipe": folder / "recipe.json", "folder": folder}


@pytest.fixture(scope="module", params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def report(command: str, places: dict[str, Path]) -> Any:
    return FUNCTIONS[command]({**places, "out": places["folder"] / command.replace(" ", "-")})


def test_a_report_shows_itself(report: Any) -> None:
    assert isinstance(report, Report)
    document = report.document()
    shown = Fragment(report._repr_html_())
    assert shown.tags <= {"div", "span", "table", "thead", "tbody", "tr", "th", "td", "pre"}
    for table in document.tables:
        cells = [cell for row in table.rows for cell in row.cells if isinstance(cell, str)]
        strips = [cell for row in table.rows for cell in row.cells if isinstance(cell, Strip)]
        assert set(cells) <= set(shown.cells) and {column.title for column in table.columns} <= set(shown.cells)
        assert all(any(len(each) == len(strip.heats) for each in shown.cells) for strip in strips)
    for line in (document.subject, *document.verdict):
        assert text_of(line) in shown.cells
    said = repr(report)
    assert said.startswith(f"<{type(report).__name__} ") and said.endswith(">") and "\n" not in said and len(said) < 400


def test_a_report_is_plain_data_and_a_table(report: Any) -> None:
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain.keys() == {field.name for field in fields(report)}
    pytest.importorskip("pandas")
    frame = report.to_dataframe()
    rows = plain[report.rows] if report.rows else [plain]
    assert len(frame) == len(rows) and all(list(frame.columns) == [*row] for row in rows)
    assert [*frame.get("name", [])] == [row["name"] for row in rows if "name" in row]


def test_it_is_what_json_prints(
    command: str, report: Any, places: dict[str, Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    printed = run(*COMMANDS[command].format(**places, out=tmp_path / "out").split(), "--json")
    assert printed.exit_code == 0
    ours, theirs = places["folder"] / command.replace(" ", "-"), tmp_path / "out"
    texts = [json.dumps(report.to_dict()), json.dumps(json.loads(printed.stdout)["report"])]
    if command == "demo":  # whose adapters name their bases by the path that was given
        texts = [re.sub(r'"nbytes": \d+', "", text) for text in texts]
    assert texts[0].replace(str(ours), str(theirs)) == texts[1]


def test_names_are_text_and_no_html(tmp_path: Path) -> None:
    name = "x<script>alert(1)</script>&amp;\x1b[31m"
    save_file({f"{name}.weight": torch.ones(4, 6)}, tmp_path / "base.safetensors")
    factors = {f"{name}.lora_A.weight": torch.ones(2, 6), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file(factors, tmp_path / "a.safetensors")
    report = loratool.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out", alpha=2)
    html = report._repr_html_()
    assert "<script" not in html and "\x1b" not in html and "\x1b" not in repr(report)
    assert any("x<script>alert(1)</script>&amp;\\x1b[31m" in cell for cell in Fragment(html).cells)


def test_colours_are_legible_on_light_and_dark_pages() -> None:
    """By WCAG 2's contrast, 3 for large text and graphics, which light and dark can both have."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

    assert STYLES.keys() == {*SPAN_STYLES, *(f"heat{i}" for i in range(HEATS))}
    colours = [style.removeprefix("color:#") for style in STYLES.values() if style.startswith("color:")]
    for colour in colours:
        assert luminance("ffffff") / luminance(colour) >= 3 and luminance(colour) / luminance("111111") >= 3, colour


def test_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MachineError, match="to_dataframe: needs pandas\npip install pandas"):
        loratool.count(BASE).to_dataframe()


@pytest.mark.slow
def test_a_notebook(tmp_path: Path) -> None:
    """What a notebook shows of a report is its table, of a mapping its line; a mistake is one error."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    sources = [
        "import loratool",
        f"report = loratool.merge({str(BASE)!r}, {str(ADAPTER)!r}, 'merged')\nreport",
        "report.to_dataframe()",
        f"loratool.open_adapter({str(ADAPTER)!r})",
        f"loratool.merge({str(BASE)!r}, {str(ADAPTER)!r}, rank='8')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, allow_errors=True, resources=resources).execute()
    shown = [cell.outputs for cell in notebook.cells]
    assert shown[0] == []
    table = Fragment(shown[1][0].data["text/html"])
    assert "self_attn.q_proj" in table.cells and "21 of 30 tensors changed, 100% of the delta kept" in table.cells
    assert shown[1][0].data["text/plain"].startswith("<MergeReport ")
    assert "model.layers.0.self_attn.q_proj.weight" in shown[2][0].data["text/html"]
    assert shown[3][0].data["text/plain"].startswith("<peft adapter ")
    assert shown[4][0].ename == "UsageError" and "merge: takes no argument 'rank'" in shown[4][0].evalue
