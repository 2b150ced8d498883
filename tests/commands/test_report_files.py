"""commands/report_files.py: a page is written whole or not at all, and what is read back is what the command returned.

That every report comes back, and no other, is in tests/cli/test_schemas.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, ROOT

import loratool
from loratool.commands.report_files import MAX_FILE, check_page_path
from loratool.durable import disk
from loratool.errors import InputError, MachineError, UsageError
from loratool.views.parts.envelope import BEGIN, REPORT_TAG

CONFIG = FIXTURES / "gpt2" / "base" / "config.json"


@pytest.fixture(scope="module")
def report() -> loratool.CountReport:
    return loratool.count(CONFIG)


@pytest.fixture(scope="module")
def page(report: loratool.CountReport, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert loratool.write_report(report, path, command="loratool count x") == path.stat().st_size
    return path.read_bytes()


def test_a_page_is_written_whole_over_a_former_one(report: loratool.CountReport, page: bytes, tmp_path: Path) -> None:
    path = tmp_path / "report.HTM"
    path.write_text(f"{BEGIN}\na former page")
    loratool.write_report(report, path, command="loratool count x")
    assert path.read_bytes() == page and os.listdir(tmp_path) == ["report.HTM"]
    assert page.startswith(BEGIN.encode() + b"\n") and page.count(REPORT_TAG.encode()) == 1


def test_a_page_that_cannot_be_written_leaves_the_former(
    report: loratool.CountReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, full = tmp_path / "report.html", OSError(28, "No space left on device")
    path.write_text(f"{BEGIN}\na former page")

    def fail(*_: object) -> int:
        raise full

    for call in ("write_some", "sync", "rename"):
        with monkeypatch.context() as patch, pytest.raises(OSError) as error:
            patch.setattr(disk, call, fail)
            loratool.write_report(report, path)
        assert error.value is full and full.filename == str(path)
        assert path.read_text() == f"{BEGIN}\na former page" and os.listdir(tmp_path) == ["report.html"]


SCRIPT = """
import json, sys
import loratool
report = loratool.count(sys.argv[1])
print(loratool.write_report(report, sys.argv[2], command="loratool count x"))
assert not {"torch", "numpy"} & {*sys.modules}, "writing loads torch"
"""
READ = """
import sys
sys.modules["jinja2"] = None  # as where the extra is not installed
import loratool
print(repr(loratool.read_report(sys.argv[1])))
assert not {"torch", "numpy"} & {*sys.modules}, "reading loads torch"
"""


def python(script: str, *arguments: object, seed: str = "0", cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(argv, env=environment, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_the_bytes_are_the_same_in_any_process(report: loratool.CountReport, page: bytes, tmp_path: Path) -> None:
    """Whatever its hashes and its folder; and what needs headers alone needs no torch, nor to read it Jinja2."""
    path = tmp_path / "other.html"
    assert python(SCRIPT, CONFIG, path, seed="1", cwd=tmp_path) == f"{len(page)}\n"
    assert path.read_bytes() == page
    assert python(READ, path, seed="2") == f"{report!r}\n"


def taken(path: Path) -> Path:
    path.write_text("<!doctype html><html>mine</html>")
    return path


def linked(path: Path) -> Path:
    path.symlink_to(path.with_name("target.html"))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


# what is at a path, or would be, below a folder -> what is said of it
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an ending": (
        lambda path: path.with_suffix(".json"),
        "a page must end in .html, not .json\nfor example report.html",
    ),
    "none": (lambda path: path.with_suffix(""), "must end in .html, not without a suffix"),
    "a hidden file": (lambda path: path.with_name(".html"), "must end in .html, not without a suffix"),
    "no folder": (
        lambda path: path / "b.html",
        "there is no such folder to write into\nmake it first, or choose",
    ),
    "another page": (
        taken,
        "exists already and is not a page of a report; only these are replaced\nchoose another file",
    ),
    "a link": (linked, "is a link, which a file would replace\nchoose another file with --html"),
    "a folder": (folder, "is a folder, which a file would replace\nchoose another file with --html"),
    "too long": (lambda path: path.with_name("x" * 250 + ".html"), "has a name of 255 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_page_replaces_nothing_but_a_page(name: str, report: loratool.CountReport, tmp_path: Path) -> None:
    make, says = REFUSED[name]
    path = make(tmp_path / "a.html")
    before = {each: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()}
    for call in (lambda: check_page_path(path), lambda: loratool.write_report(report, path)):
        with pytest.raises(UsageError, match=re.escape(says)):
            call()
    assert {each: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()} == before


def test_a_page_needs_its_package(
    report: loratool.CountReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.commands.report_files.find_spec", lambda name: None)
    for call in (check_page_path, lambda path: loratool.write_report(report, path)):
        with pytest.raises(MachineError) as error:
            call(tmp_path / "a.html")
        assert str(error.value) == "write_report: a page needs Jinja2\npip install '.[html]' in a clone of loratool"


class Foreign(loratool.MergeReport):
    """A report that no command makes."""


@pytest.mark.parametrize("value", [None, {}, "report.html", Foreign, loratool.MergeReport, 3])
def test_only_what_a_command_returned_has_a_page(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="^report: .* is not a report that a command returned$"):
        loratool.write_report(value, tmp_path / "a.html")
    assert not os.listdir(tmp_path)


def envelope(of: loratool.CountReport, /, **changes: Any) -> bytes:
    value = {"schema": 2, "verb": "count", "ok": True, "exit_code": 0, "report": of.to_dict()}
    return json.dumps({**value, **changes}).encode()


def wrapped(data: bytes) -> bytes:
    return f"{BEGIN}\n<html>{REPORT_TAG}".encode() + data + b"</script></html>\n"


def field(of: loratool.CountReport, /, **changes: Any) -> bytes:
    return envelope(of, report={**of.to_dict(), **changes})


# what a file holds -> what is said of it, behind its name
UNREAD: dict[str, tuple[Callable[[loratool.CountReport], bytes], str]] = {
    "nothing": (lambda r: b"", ": holds no report\ngive a page written by write_report"),
    "a foreign page": (lambda r: b"<!doctype html><p>x</p></html>", ": holds no report"),
    "weights": (lambda r: (FIXTURES / "gpt2" / "base" / "model.safetensors").read_bytes()[:99], ": holds no report"),
    "two reports": (lambda r: wrapped(envelope(r)) * 2, ": holds more than one report"),
    "half a page": (lambda r: wrapped(envelope(r))[:-200], ": is truncated or was edited\nfetch it again"),
    "a page without its end": (lambda r: wrapped(envelope(r))[:-9], ": is truncated or was edited"),
    "markup in the JSON": (lambda r: wrapped(envelope(r, verb="<b>")), ": is truncated or was edited"),
    "a list": (lambda r: wrapped(b"[]"), ": holds a JSON list, not an object"),
    "no JSON": (lambda r: envelope(r)[:-1], ": is not valid JSON: "),
    "a page of no JSON": (lambda r: wrapped(b"x"), ": is not valid JSON: "),
    "deep JSON": (lambda r: field(r, path=7).replace(b"7", b"[" * 10**5 + b"]" * 10**5, 1), "is not valid JSON: "),
    "a key twice": (lambda r: envelope(r)[:-1] + b', "verb": "count"}', "the name 'verb' stands twice"),
    "NaN": (lambda r: field(r, width=float("nan")), ": is not valid JSON: the number NaN"),
    "too large a number": (lambda r: envelope(r).replace(b'"exit_code": 0', b'"exit_code": 1e999'), "the number 1e999"),
    "digits": (lambda r: envelope(r).replace(b'"exit_code": 0', b'"exit_code": ' + b"9" * 5000), "is not valid JSON"),
    "much memory": (lambda r: field(r, path=[[]] * 3_000_000), ": is JSON that would take more than 360 MB"),
    "an index of shards": (lambda r: b'{"weight_map": {}}', ": holds no report\ngive a page"),
    "a schema": (lambda r: envelope(r, schema=3), ": has schema 3, but this loratool reads schema 2\nread it"),
    "no number of one": (lambda r: envelope(r, schema=True), ": holds no report"),
    "a failure": (
        lambda r: envelope(r, ok=False, exit_code=3, error={"kind": "input"}),
        ": is the output of a call that failed, and holds no report",
    ),
    "a verb": (
        lambda r: envelope(r, verb="prune"),
        ": report: is a report of 'prune', which is not a command of this loratool",
    ),
    "no verb": (lambda r: envelope(r, verb=None), ": has a header that loratool does not write\nread it with"),
    "a list for a verb": (lambda r: envelope(r, verb=["count"]), ": has a header that"),
    "another end": (lambda r: envelope(r, exit_code=1), ": has a header that"),
    "no status": (lambda r: envelope(r, ok=False, exit_code=1), ": has a header that"),
    "a number for true": (lambda r: envelope(r, ok=1), ": has a header that"),
    "false for a number": (lambda r: envelope(r, exit_code=False), ": has a header that"),
    "a key more": (lambda r: envelope(r, more=1), ": has a header that"),
    "no report": (lambda r: envelope(r, report=None), ": report: is None, not an object\n"),
    "a newer field": (lambda r: field(r, newer=1), ": report: has an unknown key 'newer' for a CountReport\nread"),
    "a type": (lambda r: field(r, layers="x"), ": report.layers: is 'x', not a whole number from 0 to 2^63"),
    "a huge number": (lambda r: field(r, layers=1 << 63), ": report.layers: is 9223372036854775808, not a"),
    "a type of a row": (
        lambda r: field(r, methods=[r.to_dict()["methods"][0], {**r.to_dict()["methods"][1], "share": None}]),
        ": report.methods[1].share: is None, not a number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_no_report_is_refused_by_name(name: str, report: loratool.CountReport, tmp_path: Path) -> None:
    make, says = UNREAD[name]
    path = tmp_path / "a.html"
    path.write_bytes(make(report))
    with pytest.raises(InputError) as error:
        loratool.read_report(path)
    assert str(error.value).startswith(str(path)) and says in str(error.value)


def test_a_page_that_another_program_saved_is_read(report: loratool.CountReport, page: bytes, tmp_path: Path) -> None:
    """With a byte order mark, other ends of lines, and the comment of a browser before its elements."""
    path = tmp_path / "a.html"
    saved = page.replace(BEGIN.encode(), b"<!DOCTYPE html>\n<!-- saved from url=(0016)http://localhost -->")
    for data in (b"\xef\xbb\xbf" + page, page.replace(b"\n", b"\r\n"), saved + b"\n\n", page.rstrip()):
        path.write_bytes(data)
        assert loratool.read_report(path) == report
    path.write_bytes(b"\xef\xbb\xbf" + envelope(report) + b"\r\n")
    assert loratool.read_report(path) == report


def test_what_is_no_file_of_a_size_is_refused(tmp_path: Path) -> None:
    large = tmp_path / "a.html"
    with open(large, "wb") as file:
        file.truncate(MAX_FILE + 1)
    for path, says in (
        (large, "is 100 MB; a page of a report"),
        (tmp_path, "s a directory"),
        (tmp_path / "b", "No such"),
    ):
        with pytest.raises(InputError, match=says):
            loratool.read_report(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.html")
    with pytest.raises(InputError, match="is a pipe or a device"):
        loratool.read_report(tmp_path / "a.html")
    with pytest.raises(UsageError, match="is a named pipe, which a file would replace"):
        check_page_path(tmp_path / "a.html")


def test_a_recipe_in_a_recipe_without_end_is_refused(tmp_path: Path) -> None:
    step = {"number": 1, "command": "run", "out": None, "state": "done", "waits_for": [], "exists": False}
    report = (
        '{"recipe": "r", "dry_run": false, "digests": {}, "lock": null, "locked": false, "differs": null, "total": 1,'
    )
    report += ' "steps": [%s]}'
    text, most = "null", 150  # in each two levels of JSON
    for _ in range(most):
        text = report % (json.dumps(step)[:-1] + f', "report": {text}}}')
    path = tmp_path / "a.json"
    path.write_text(f'{{"schema": 2, "verb": "run", "ok": true, "exit_code": 0, "report": {text}}}')
    with pytest.raises(InputError) as error:
        loratool.read_report(path)
    assert "nested too deeply" in str(error.value) or "is not valid JSON" in str(error.value)


NAMES = ("caf\udce9", "\0\x1b[31m", "</script><script>alert(1)</script>", "<!--", "\u2028\u202e", "\U0001f600" * 1024)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_any_name_comes_back(name: str, report: loratool.CountReport, tmp_path: Path) -> None:
    """Half of a surrogate pair too, by which Python writes a byte of a path that is no UTF-8."""
    path, odd = tmp_path / "a.html", replace(report, path=name, targets=(name,))
    loratool.write_report(odd, path, command=f"loratool count {name}", status=name)
    assert loratool.read_report(path) == odd
    path.write_text(json.dumps({**json.loads(envelope(report)), "report": odd.to_dict()}))
    assert loratool.read_report(path) == odd


def test_a_page_says_no_where_its_report_does(tmp_path: Path) -> None:
    """Also one that the library wrote, where no command line has said what its check found."""
    llama = FIXTURES / "llama"
    report = loratool.verify(llama / "base", llama / "adapter", llama / "base")
    loratool.write_report(report, tmp_path / "no.html")
    text = (tmp_path / "no.html").read_text()
    assert '"ok":false,"exit_code":1,"status":"wrong"' in text
    loratool.write_report(loratool.diff(llama / "base", llama / "tuned"), tmp_path / "yes.html")
    assert '"ok":true,"exit_code":0,"report"' in (tmp_path / "yes.html").read_text()
