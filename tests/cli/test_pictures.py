"""Hold the pictures and tables of reports: legible at 80 columns, without colour, in ASCII and in a pipe."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from conftest import factors, write_peft

import loratool
from loratool.architectures.numbered_names import last_part
from loratool.cli.render import print_adapter_diff
from loratool.cli.render.pictures import (
    ASCII_RAMP,
    RAMP,
    WIDTH,
    Line,
    bars,
    grid,
    is_ascii_terminal,
    side_by_side,
    strips,
)
from loratool.cli.render.text import print_picture, print_table
from loratool.ops.diff.command import AdapterDiff


class TestPictures:
    """Legible at 80 columns, without colour and in ASCII."""

    def text(self, lines: list[Line]) -> list[str]:
        return ["".join(cell.text for cell in line) for line in lines]

    def values(self, layers: int) -> dict[str, float]:
        kinds = ("self_attn.q_proj", "mlp.a_rather_long_name_of_a_projection")
        return {f"model.layers.{i}.{kind}.weight": i + k for i in range(layers) for k, kind in enumerate(kinds)}

    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize("layers", [2, 32, 126])
    def test_strips(self, layers: int, plain: bool) -> None:
        found = strips(self.values(layers), "size", plain=plain)
        lines = self.text(found)
        ramp = ASCII_RAMP if plain else RAMP
        assert len(lines) == 3 and all(len(line) <= WIDTH for line in lines)
        assert lines[1].startswith("self_attn.q_proj") and lines[1].split()[1][0] == ramp[0]
        assert lines[2].split()[1][-1] == ramp[-1] and (not plain or "".join(lines).isascii())
        heats = [cell.heat for cell in found[1] if cell.heat is not None]
        assert heats == sorted(heats) and len(heats) == min(layers, 36)

    @pytest.mark.parametrize("dot", [".", "_"])
    def test_labels_tell_a_unets_blocks_apart(self, dot: str) -> None:
        names = [
            f"unet.{side}_blocks.{i}.attentions.0.transformer_blocks.1.{end}"
            for side in ("down", "up")
            for i in range(2)
            for end in ("attn1.to_out.0", "attn1.to_q")
        ]
        lines = self.text(strips({name.replace(".", dot): 1.0 for name in names}, "x"))[1:]
        labels = [line.split()[0] for line in lines]
        assert len(set(labels)) == 4 and all(label.startswith(("down", "up")) for label in labels)
        kinds = {last_part(name.replace(".", dot)).replace("_", ".").rpartition(".")[2] for name in names}
        assert kinds == {"out", "q"}

    def test_long_labels_in_ascii(self) -> None:
        values = {f"a.{i}.{kind * 40}": 1.0 for i in range(2) for kind in "xyz"}
        assert all(line.isascii() and len(line) <= WIDTH for line in self.text(strips(values, "x", plain=True)))

    def test_flattened_names_and_single_modules(self) -> None:
        lines = self.text(strips({f"lora_unet_blocks_{i}_to_q": i for i in range(4)}, "x"))
        assert len(lines) == 2 and lines[1].split()[1] == "▁▃▆█"
        assert strips({"a": 1.0, "b": 2.0}, "x") == []
        assert all(cell.heat in (0.0, None) for line in strips(dict.fromkeys("abc", 0.0), "x") for cell in line)

    def test_bars(self) -> None:
        lines = self.text(bars({"q": 1.0, "v": 4.0, "none": 0.0}, "x"))
        assert [line.count("█") for line in lines] == [0, 9, 36, 0] and lines[2].endswith(" 4")
        assert bars({}, "x") == [] and all(
            line.isascii() for line in self.text(bars({"q": 1.0, "v": 3.3}, "x", plain=True))
        )

    def test_a_grid_is_its_numbers(self) -> None:
        steps = (1, 2, 4, 8, 16, 32, 64)
        values = [[(i + j) / 12 for j in range(7)] for i in range(7)]
        one = grid("phi(i, j), input (random 0.012)", steps, steps, values)
        lines = self.text(one)
        assert lines[2].split() == ["1", "▁.00", "▁.08", "▂.17", "▃.25", "▃.33", "▄.42", "▅.50"]
        assert lines[-1].endswith("█1.0")
        assert all(len(line) <= WIDTH for line in self.text(side_by_side(one, one)))
        assert len(side_by_side(one, grid("x" * 70, steps, steps, values))) == 2 * len(one)

    def test_plain_terminals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        assert not is_ascii_terminal("utf-8") and is_ascii_terminal("ascii") and is_ascii_terminal(None)
        monkeypatch.setenv("TERM", "dumb")
        assert is_ascii_terminal("utf-8")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class TestOnATerminal:
    def shown(self, monkeypatch: pytest.MonkeyPatch, show: Callable[[], None]) -> str:
        for name, value in {"COLUMNS": "80", "TERM": "xterm-256color", "COLORTERM": ""}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("NO_COLOR", raising=False)
        with redirect_stdout(Terminal()) as found:
            show()
        return found.getvalue()

    def test_a_row_that_is_too_long_stands_below_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        columns = [("module", False), *((f"number{i}", True) for i in range(5))]
        name = "model.layers.10.a_rather_long_name.of_a_projection"
        found = self.shown(monkeypatch, lambda: print_table(columns, [[name, *"12345"], ["b", *"67890"]]))
        text = re.sub("\x1b\\[[0-9;]*m", "", found).splitlines()
        assert [line.split() for line in text[1:]] == [[name], list("12345"), ["b"], list("67890")]
        assert all(len(line) <= 80 for line in text)

    def test_a_pipe_gets_the_lines_that_rich_would_draw(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wide characters take two columns; a control character is told, not sent."""
        columns = [("module", False), ("数", True), ("what", False)]
        rows = [["層.0\x1b", "1", "café"], ["a" * 90, "1000", ""], ["b", "22", "e\u0301 日本"]]
        with redirect_stdout(io.StringIO()) as found:
            print_table(columns, rows)
        monkeypatch.setenv("FORCE_COLOR", "1")
        with redirect_stdout(io.StringIO()) as drawn:
            print_table(columns, rows)
        assert "\x1b[" in drawn.getvalue() and "\x1b" not in found.getvalue()
        plain = re.sub("\x1b\\[[0-9;]*m", "", drawn.getvalue()).splitlines()
        assert found.getvalue().splitlines() == [line.rstrip() for line in plain]

    def test_blocks_are_drawn_in_the_colour_and_not_over_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full block hides what is behind it: the largest bar was black."""
        found = self.shown(monkeypatch, lambda: print_picture(bars({"q": 1.0, "v": 4.0}, "x")))
        assert "\x1b[38;5;220m█" in found and "\x1b[30" not in found
        found = self.shown(monkeypatch, lambda: print_picture(grid("phi", [1], [1], [[1.0]])))
        assert "\x1b[30;48;5;220m █1.0" in found

    def test_a_cosine_below_that_of_all_has_its_place(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pairs = {f"m.{i}.q": factors(24, 20, 4, seed=i) for i in range(3)}
        other = {name: (A, -B if name == "m.1.q" else B) for name, (A, B) in pairs.items()}
        report = loratool.diff(write_peft(tmp_path / "a", pairs), write_peft(tmp_path / "b", other))
        assert isinstance(report, AdapterDiff)
        print_adapter_diff(report)
        assert re.search(r"cosine  \S -1.00 \.\. \S 1.00", capsys.readouterr().out)
