"""Hold every document to its budget: 25 lines, within the width, names whole, the same text with and without colour.

The model has the layers of a 7B, with tiny widths.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, weights, write_model, write_peft

import loratool
from loratool.cli.render.document import BUDGET, print_document
from loratool.cli.surface import Surface
from loratool.files.folder.side_files import LeftBehind
from loratool.views.merge import AdapterReport, MergeReport, TensorReport
from loratool.views.parts.report import Report
from loratool.views.verify import TensorVerdict, VerifyReport

LAYERS = 32
SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (4, 16), "self_attn.v_proj": (4, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip
MODULES = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in SHAPES]
DEAD, LOUD = "model.layers.17.self_attn.v_proj", "model.layers.9.mlp.down_proj"
WIDTHS = (60, 80, 120)


class Files:
    """A base of 32 layers, an adapter with a dead and a loud module, and its merge."""

    def __init__(self, folder: Path) -> None:
        self.base, self.adapter, self.merged = folder / "base", folder / "style", folder / "merged"
        shapes = {name: SHAPES[name.split(".", 3)[3]] for name in MODULES}
        tensors = {f"{name}.weight": weights(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
        norms = [f"model.layers.{i}.{name}_layernorm.weight" for i in range(LAYERS) for name in ("input", "post")]
        tensors |= {name: torch.ones(16) for name in [*norms, "model.norm.weight"]}
        tensors |= {name: weights(32, 16, seed=9) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        config = {"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": 16}
        write_model(self.base, {name: tensor.bfloat16() for name, tensor in tensors.items()}, config)
        pairs = {name: factors(*shape, 2, seed=i) for i, (name, shape) in enumerate(shapes.items())}
        pairs[DEAD] = (pairs[DEAD][0], 0 * pairs[DEAD][1])
        pairs[LOUD] = (pairs[LOUD][0], 20 * pairs[LOUD][1])
        write_peft(self.adapter, pairs)
        self.report = loratool.merge(self.base, [self.adapter], self.merged)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """In the working folder, as a user has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("documents"))
        yield Files(Path())


def wrong(names: Sequence[str], details: Sequence[str]) -> VerifyReport:
    """What `verify` returns of tensors with these faults, in turn."""
    faults = {f"{name}.weight": details[i % len(details)] for i, name in enumerate(names)}
    verdicts = [TensorVerdict(f"{name}.weight", "exact", "") for name in MODULES]
    verdicts = [TensorVerdict(v.name, "wrong", faults[v.name]) if v.name in faults else v for v in verdicts]
    exact = len(MODULES) - len(faults)
    return VerifyReport(
        "base", "merged", "wrong", tuple(verdicts), exact, 0, len(faults), 67, (), (), (), (), adapters=("style",)
    )


def merged(names: Sequence[str], **more: Any) -> MergeReport:
    """What `merge` returns of a model with these weights, a hundredth of which is too strong, and much to tell."""
    rows = tuple(
        TensorReport(
            f"{name}.weight", (64, 64), "BF16", "lora", 4, (2.0,), (0.9 if i % 100 == 7 else 0.05 + i % 7 / 1000),
            0.9, 0.999, more.get("stored", "BF16"), 8192,
        )
        for i, name in enumerate(names)
    )  # fmt: skip
    left = tuple(f"text_model.encoder.layers.{i}.mlp.fc{j}" for i in range(12) for j in (1, 2))
    warnings = tuple(f"fact {i} that takes more than one line where a terminal is as narrow as that" for i in range(9))
    behind = tuple(LeftBehind(f"{name}.bin", 10**9, f"reason {name}") for name in "abcdefgh")
    notes = tuple(f"note {i}" for i in range(7))
    return MergeReport(
        "base", "merged", False, 10**9, (AdapterReport("style", "peft", 0.8, len(rows), "", {"text_encoder": 0.4}),),
        rows, len(rows), 0.999, 70, "merged/loratool.undo", 10**6, left, (), (), warnings, more.get("quantized"),
        10**9, notes=notes, left_behind=behind,
    )  # fmt: skip


MOE = [
    f"model.layers.{i}.mlp.experts.{e}.{p}_proj"
    for i in range(1, 17)
    for e in range(64)
    for p in ("gate", "up", "down")
]
UNET = [
    f"{block}.attentions.{i}.transformer_blocks.{j}.{end}"
    for block in ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1")
    for i in range(2)
    for j in range(10)
    for end in ("attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
]


REPORTS: dict[str, Callable[[Files], Report]] = {
    "merge": lambda files: files.report,
    "merge --dry-run": lambda files: loratool.merge(files.base, [files.adapter], Path("m"), dry_run=True),
    "merge --target": lambda files: loratool.merge(
        files.base, [files.adapter], Path("m"), dry_run=True, target=["attention"]
    ),
    "merge, MoE": lambda files: merged([*MODULES, *MOE]),
    "merge, image": lambda files: merged(UNET),
    "merge, quantized": lambda files: merged(MODULES, stored="gptq", quantized="mixed"),
    "unmerge": lambda files: loratool.unmerge(files.merged, [files.adapter], Path("b")),
    "unmerge --approximate": lambda files: loratool.unmerge(files.merged, [files.adapter], Path("c"), approximate=True),
    "verify": lambda files: loratool.verify(files.base, [files.adapter], files.merged),
    "verify, all wrong": lambda files: wrong(MODULES, ["the delta is applied with half its scale"]),
    "verify, some wrong": lambda files: wrong(
        [*MODULES[:3], *MODULES[70:78]],
        [
            "the delta is not applied",
            "1 weight altered, by up to 656 ulps",
            "64 weights altered, by up to 1 ulp",
        ],
    ),
    "inspect": lambda files: loratool.inspect(files.base),
    "count": lambda files: loratool.count(files.base, rank=2),
}


def shown(report: Report, width: int | None, colour: bool = False, quiet: bool = False, verbose: bool = False) -> str:
    """stdout and stderr as one terminal shows them."""
    both = io.StringIO()
    surface = Surface(both, width, colour, False)
    print_document(report.document(verbose), surface, surface, quiet)
    return both.getvalue()


@pytest.fixture(scope="module")
def reports(files: Files) -> dict[str, Report]:
    return {name: make(files) for name, make in REPORTS.items()}


@pytest.mark.parametrize("name", REPORTS)
class TestEveryReport:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_it_keeps_its_budget(self, name: str, width: int, reports: dict[str, Report]) -> None:
        lines = shown(reports[name], width).splitlines()
        assert len(lines) <= BUDGET
        assert max(map(len, lines)) <= width

    def test_colour_changes_nothing_but_colour(self, name: str, reports: dict[str, Report]) -> None:
        coloured = shown(reports[name], 100, colour=True)
        assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == shown(reports[name], 100)
        assert "\x1b]8" not in coloured, "paths are no links"

    def test_a_pipe_gets_whole_lines_and_says_the_same(self, name: str, reports: dict[str, Report]) -> None:
        wide = shown(reports[name], None)
        assert not any(block in wide for block in "▁▂▃▄▅▆▇█")
        head = wide.splitlines()[0]
        assert " ".join(shown(reports[name], 60).split()).startswith(" ".join(head.split()))

    def test_quiet_leaves_the_verdict(self, name: str, reports: dict[str, Report]) -> None:
        loud, quiet = (shown(reports[name], 80, quiet=each).splitlines() for each in (False, True))
        verdict = quiet[-3:] if name.startswith("merge") else quiet[-1:]
        if name != "inspect":  # a model has no verdict: what it is
            assert loud[-len(verdict) :] == verdict or loud[-len(verdict) - 1 : -1] == verdict
        assert 1 <= len(quiet) <= 9  # three of a verdict, six of warnings

    def test_a_notebook_gets_all_of_it(self, name: str, reports: dict[str, Report]) -> None:
        html = reports[name]._repr_html_()
        assert html.startswith("<div") and html.count("<table") == html.count("</table")
        names = {str(row.cells[0]) for table in reports[name].document().tables for row in table.rows}
        assert all(each.replace("&", "&amp;") in html for each in names)


class TestMerge:
    def test_groups_and_lines_of_their_own(self, reports: dict[str, Report]) -> None:
        lines = shown(reports["merge"], 70).splitlines()
        rows = [line.split() for line in lines[4:13]]
        assert [row[0] for row in rows] == [
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "!", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "!",
        ]  # fmt: skip
        assert lines[7] == f"! {DEAD}  delta is 0" and rows[2][1] == "0-16,18-31"
        assert re.fullmatch(rf"! {re.escape(LOUD)}  [12]\d\.\dx its neighbours: [\d,.]+%", lines[12])
        counts = [int(row[2]) for row in rows if row[0] != "!"]
        assert sum(counts) + 2 == len(MODULES) and counts == [32, 32, 31, 32, 32, 32, 31]

    def test_the_last_lines_tell_what_was_written(self, files: Files, reports: dict[str, Report]) -> None:
        *_, changed, wrote, undo, then = shown(reports["merge"], 200).splitlines()
        assert changed == "223 of 291 tensors changed, 100% of the delta kept"
        assert wrote.startswith(f"wrote {files.merged}  ") and undo.startswith(f"undo  {files.merged}/loratool.undo  ")
        assert then == f"next: loratool verify {files.base} {files.adapter} {files.merged}"

    def test_verbose_has_a_row_a_tensor(self, reports: dict[str, Report]) -> None:
        lines = shown(reports["merge"], None, verbose=True).splitlines()
        assert {line.split()[0] for line in lines if line} >= {f"{name}.weight" for name in MODULES}

    def test_what_is_left_out_takes_a_line(self, reports: dict[str, Report]) -> None:
        text = shown(reports["merge --target"], None)
        assert "excluded: mlp.gate_proj, mlp.up_proj, mlp.down_proj, layers 0-31 (96)\n" in text

    def test_a_dry_run_where_the_output_exists(self, files: Files) -> None:
        before = sorted(path.stat().st_mtime_ns for path in files.merged.iterdir())
        report = loratool.merge(files.base, [files.adapter], files.merged, dry_run=True)
        assert report.exists and f"{files.merged} exists: --force replaces it)" in shown(report, None)
        assert not loratool.merge(files.base, [files.adapter], files.merged, dry_run=True, force=True).exists
        assert sorted(path.stat().st_mtime_ns for path in files.merged.iterdir()) == before
        with pytest.raises(loratool.NeedsFlag):
            loratool.merge(files.base, [files.adapter], files.merged)

    def test_many_warnings_are_cut_on_a_terminal(self, files: Files) -> None:
        report = replace(files.report, warnings=tuple(f"fact {i}" for i in range(20)))
        assert shown(report, 80).count("warning: ") == 6 and "and 15 more: --json has them" in shown(report, 80)
        assert shown(report, None).count("warning: ") == 20


def test_no_stream_is_an_output(files: Files) -> None:
    for call in (
        lambda: loratool.merge(files.base, [files.adapter], "-"),
        lambda: loratool.resize(files.adapter, "-", rank=1),
    ):
        with pytest.raises(loratool.UsageError, match="a stream cannot be"):
            call()


def test_verify_says_what_is_wrong_and_what_would_be_right(reports: dict[str, Report]) -> None:
    assert shown(reports["verify, all wrong"], 100).splitlines()[1:] == [
        "wrong  224 of 224 tensors: the delta is applied with half its scale",
        "wrong: merged is not base + style, 67 unchanged",
        "hint: loratool verify base style:0.5 merged",
    ]
    titles = [shown(reports[name], 100).splitlines()[0] for name in ("verify, all wrong", "verify")]
    assert titles == ["merged is not base + style", "base + style = merged"]
    some = shown(reports["verify, some wrong"], 100)
    assert "1..64 weights altered, by up to 1..656 ulps" in some
    assert some.splitlines()[-1] == "wrong: 11 of 224 tensors, 213 exact, 67 unchanged"
    proven = shown(reports["verify"], None).splitlines()
    assert proven[-1] == "proven: 224 of 224 tensors exact, 67 others unchanged"


def test_a_report_exports_itself(files: Files) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas, which is in the extra `oracles`")
    frame = files.report.to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 224 and "relative" in frame.columns
    told: dict[str, Any] = files.report.to_dict()
    assert told["tensors"][0]["name"] == files.report.tensors[0].name


@pytest.mark.parametrize(
    "command", ["merge", "unmerge", "extract", "init", "resize", "combine", "convert", "convert MODEL"]
)
def test_a_dry_run_tells_what_force_would_replace(command: str, files: Files, tmp_path: Path) -> None:
    base, adapter, there = files.base, files.adapter, files.report.out
    calls: dict[str, Callable[..., Any]] = {
        "merge": lambda **more: loratool.merge(base, [adapter], there, **more),
        "merge, MoE": lambda files: merged([*MODULES, *MOE]),
        "merge, image": lambda files: merged(UNET),
        "merge, quantized": lambda files: merged(MODULES, stored="gptq", quantized="mixed"),
        "unmerge": lambda **more: loratool.unmerge(files.merged, [adapter], tmp_path / "out", **more),
        "extract": lambda **more: loratool.extract(base, files.merged, tmp_path / "out", target=["q_proj"], **more),
        "init": lambda **more: loratool.init(base, tmp_path / "out", rank=2, **more),
        "resize": lambda **more: loratool.resize(adapter, tmp_path / "out", rank=1, **more),
        "combine": lambda **more: loratool.combine([adapter], tmp_path / "out", **more),
        "convert": lambda **more: loratool.convert(adapter, tmp_path / "out", to="peft", **more),
        "convert MODEL": lambda **more: loratool.convert_model(base, tmp_path / "out", dtype="fp16", **more),
    }
    if command != "merge":
        shutil.copytree(base if command in ("unmerge", "convert MODEL") else adapter, tmp_path / "out")
    found = calls[command](dry_run=True)
    assert found.exists and "exists: --force replaces it)" in shown(found, None)
    assert not calls[command](dry_run=True, force=True).exists
    with pytest.raises(loratool.NeedsFlag, match="exists already"):
        calls[command]()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_fault_that_differs_by_its_numbers_is_told_at_every_width(width: int) -> None:
    times = (49.9, 50, 320)
    details = [f"the scale alpha / r is another: the change is {x} times what it should be" for x in times]
    for faults in (details, [*details, "the change is not applied"]):
        tensors = [TensorVerdict(f"model.layers.{i}.up_proj.weight", "wrong", fault) for i, fault in enumerate(faults)]
        count = len(tensors)
        report = VerifyReport(
            "base", "merged", "wrong", tuple(tensors), 0, 0, count, 67, (), (), (), (), adapters=("a",)
        )
        assert "49.9..320 times what it should be" in " ".join(shown(report, width).split())


def test_codes_whose_shapes_no_header_tells_are_not_zero_parameters() -> None:
    report = loratool.inspect(Path(__file__).parents[2] / "fixtures/coded/gptq_v1_4bit.safetensors")
    assert ": unknown family, GPTQ, 1 tensor, 1.44 kB in 1 file\n" in shown(report, None)
