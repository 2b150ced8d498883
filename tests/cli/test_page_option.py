"""--html of the commands: a page beside the text and the JSON, refused before any work, and no part of the call."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest
from conftest import ROOT, factors, weights, write_model, write_peft

import loratool
from loratool.cli.render.document import typed_call
from loratool.errors import UsageError

Run = Callable[..., Any]

# a call -> its exit code, and what it writes beside its page
CALLS = {
    "inspect adapter": (0, ()),
    "inspect base": (0, ()),
    "inspect adapter --base other --strict": (1, ()),
    "inspect adapter --for vllm --base other": (1, ()),
    "inspect base --spectra": (0, ()),
    "diff adapter second": (0, ()),
    "diff adapter second adapter": (0, ()),
    "diff base merged --fail-above 0": (1, ()),
    "diff base merged --spectra": (0, ()),
    "diff base other --headers --fail-above 0": (1, ()),
    "verify base adapter merged": (0, ()),
    "verify base adapter base": (1, ()),
    "merge base adapter -o out": (0, ("out",)),
    "merge base adapter -o out --dry-run": (0, ()),
    "extract base merged --rank 2 -o out": (0, ("out",)),
    "resize adapter --rank 1 -o out": (0, ("out",)),
    "resize adapter --rank 1 -o out --dry-run": (0, ()),
    "combine adapter second -o out": (0, ("out",)),
    "patch base merged -o out": (0, ("out",)),
    "apply base p -o out": (0, ("out",)),
    "apply base p --dry-run": (0, ()),
}
MERGE = ("merge", "base", "adapter", "-o", "out", "--html", "out.html")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    modules = {f"model.layers.{n}.self_attn.{name}_proj": (8, 6) for n in range(2) for name in "qk"}
    tensors = {f"{name}.weight": weights(*shape, seed=i) for i, (name, shape) in enumerate(modules.items())}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    write_model(folder / "base", tensors, config)
    write_model(folder / "other", {"model.norm.weight": weights(6)}, config)
    for seed, name in enumerate(("adapter", "second")):
        pairs = {module: factors(*shape, 2, seed=seed + i) for i, (module, shape) in enumerate(modules.items())}
        write_peft(folder / name, pairs)
    loratool.merge(folder / "base", folder / "adapter", folder / "merged")
    loratool.patch(folder / "base", folder / "merged", folder / "p")
    return folder


@pytest.fixture
def work(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder in which the stage's models have their names."""
    for each in stage.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def held(page: Path) -> dict[str, Any]:
    """Return the JSON that a page holds."""
    (text,) = re.findall(r'<script type="application/json" id="report">(.*?)</script>', page.read_text(), re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def shown(page: Path) -> str:
    """Return the command line that a page shows."""
    *_, found = re.findall(r"<code>([^<]*loratool [^<]*)</code>", page.read_text())  # others are hints
    return unescape(found)


@pytest.mark.parametrize("call", CALLS)
def test_the_page_has_what_json_prints(call: str, work: Path, run: Run) -> None:
    code, written = CALLS[call]
    before = set(os.listdir())
    result = run(*call.split(), "--html", "x.html")
    assert result.exit_code == code, result.stderr
    assert {*os.listdir()} - before == {"x.html", *written}
    again = ["--force"] * bool(written)
    printed = run(*call.split(), "--json", *again)
    in_json, in_page = json.loads(printed.stdout), held(Path("x.html"))
    for each in (in_json, in_page):
        each["report"].pop("free_bytes", None)
    assert (printed.exit_code, in_page) == (code, in_json)
    assert shown(Path("x.html")) == f"loratool {call} --html x.html"
    outputs = run(*call.split(), *again).stdout, result.stdout
    plain, lines = (re.sub(r"[\d.]+ GB free", "", text).splitlines() for text in outputs)  # other tests write too
    assert [line for line in lines if not re.fullmatch(r"page  x\.html  \d{3} kB", line)] == plain != lines
    assert lines[-1] == plain[-1] or "--spectra" in call or call == "inspect base"


def test_the_same_call_makes_the_same_page_and_replaces_the_former(work: Path, run: Run) -> None:
    call = ("diff", "adapter", "second", "--html", "x.html")
    assert run(*call).exit_code == 0
    first = Path("x.html").read_bytes()
    assert run(*call).exit_code == 0
    assert Path("x.html").read_bytes() == first
    assert run("inspect", "adapter", "--html", "x.html").exit_code == 0
    assert Path("x.html").read_bytes() != first and held(Path("x.html"))["verb"] == "inspect"


def test_json_is_one_object_and_quiet_is_the_verdict(work: Path, run: Run) -> None:
    call = ("verify", "base", "adapter", "merged", "--html", "x.html")
    assert json.loads(run(*call, "--json").stdout) == held(Path("x.html"))
    assert run(*call, "-q").stdout.splitlines() == run(*call).stdout.splitlines()[-1:]


def test_a_recipe_has_no_page(work: Path, run: Run) -> None:
    recipes = []
    for options in ((), ("--html", "x.html")):
        assert (
            run("merge", "base", "adapter", "-o", "out", "--save-recipe", "r.json", "--force", *options).exit_code == 0
        )
        recipes.append(Path("r.json").read_text())
    assert recipes[0] == recipes[1]
    Path("x.html").unlink()
    assert run("run", "r.json", "--force").exit_code == 0 and not Path("x.html").exists()


def test_each_command_has_a_variable_of_its_own(work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all would have the page of the last."""
    monkeypatch.setenv("LORATOOL_MERGE_HTML", "m.html")
    monkeypatch.setenv("LORATOOL_HTML", "x.html")
    assert run("merge", "base", "adapter", "-o", "out").exit_code == 0
    assert run("verify", "base", "adapter", "out").exit_code == 0
    assert shown(Path("m.html")) == "LORATOOL_MERGE_HTML=m.html loratool merge base adapter -o out"
    assert not Path("x.html").exists()


def test_the_call_is_the_same_when_it_is_pasted(work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With words that a shell would take apart, and with what the environment says of its options."""
    odd = Path("an adapter;$(x)<b>&'\"é")
    odd.symlink_to("adapter")
    monkeypatch.setenv("LORATOOL_MERGE_DTYPE", "fp16")
    monkeypatch.setenv("LORATOOL_MERGE_EXCLUDE", "k_proj *.1.*")
    call = ("merge", "base", f"{odd}:0.5", "--html=x.html", "--no-undo", "-o")
    assert run(*call, "out").exit_code == 0
    tell = """loratool() { printf '%s\\0' "$LORATOOL_MERGE_DTYPE" "$LORATOOL_MERGE_EXCLUDE" "$@"; }"""
    script = f"set -eu; {tell}; {shown(Path('x.html'))}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("LORATOOL_")}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == ["fp16", "k_proj *.1.*", *call, "out"]


@pytest.mark.parametrize(
    ("typed", "told"),
    {
        "https://hf.co/org/a?token=hf_x": "hf://org/a",
        "https://hf.co/org/a?token=hf_x:0.5,q_proj=2": "hf://org/a:0.5,q_proj=2",
        "--base=https://huggingface.co/org/a/tree/v1?token=hf_x": "--base=hf://org/a@v1",
        "https://example.org/a?token=b": "https://example.org/a",  # no input, which would be refused
        "--target=re:https://.*": "'--target=re:https://.*'",
        "a?b": "'a?b'",
    }.items(),
)
def test_no_token_of_a_link_is_shown(typed: str, told: str) -> None:
    with click.Context(click.Command("merge"), obj=["merge", typed]):
        assert typed_call() == f"loratool merge {told}"


@pytest.mark.parametrize("call", ["inspect {}", "merge base {}:0.5 --dry-run -o out", "resize {} --rank 1 --dry-run"])
def test_a_page_has_no_token(call: str, work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor has what is printed, as the library does not keep it."""
    snapshots = work / "hub" / "models--org--name" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / ("0" * 40)).symlink_to(work / "adapter")
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(work / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*call.format("https://huggingface.co/org/name?token=hf_secret").split(), "--html", "x.html")
    assert result.exit_code == 0, result.stderr
    assert "hf://org/name" in Path("x.html").read_text()
    assert not [text for text in (result.stdout, result.stderr, Path("x.html").read_text()) if "hf_secret" in text]


REFUSED = {
    "": "--html: '' is not",
    "x" * 300 + ".html": "--html: 'xxxxx",
    "-": "-: ",
    "x.pdf": "x.pdf: ",
    "x": "x: ",
    "absent/x.html": "absent: there is no such folder",
    "base": "base: ",
    "notes.html": "notes.html: exists already and is not a page",
    "link.html": "link.html: is a link",
    "full.html": "full.html.loratool-partial: is in the way",
}


@pytest.mark.parametrize("command", ["merge base adapter -o out", "inspect adapter"])
@pytest.mark.parametrize("page", REFUSED)
def test_a_place_is_refused_before_any_work(page: str, command: str, work: Path, run: Run) -> None:
    Path("notes.html").write_text("<!doctype html><p>mine")
    Path("link.html").symlink_to("notes.html")
    Path("full.html.loratool-partial").hardlink_to("notes.html")  # would be emptied
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    result = run(*command.split(), "--html", page)
    assert (result.exit_code, result.stdout) == (2, "")
    error, hint = result.stderr.splitlines()
    assert REFUSED[page] in error and hint.startswith("hint: ")
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("page", "options"),
    [
        ("out.html", ("-o", "out.html")),
        ("out/x.html", ("-o", "out")),
        ("sub/../out/x.html", ("-o", "out")),
        ("link/x.html", ("-o", "out")),
        ("out/in/x.html", ("-o", "out/")),
        ("merged/x.html", ()),  # the default's name
        ("out.loratool-partial/x.html", ("-o", "out")),
        ("base/x.html", ("-o", "base")),
    ],
)
def test_a_page_in_the_output_is_refused(
    page: str, options: tuple[str, ...], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be replaced with it, and be in the way of --force then."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("base"), {"x.weight": weights(4, 4)}, {"model_type": "llama"})
    write_peft(Path("adapter"), {"x": factors(4, 4, 1)})
    for name in ("out/in", "sub", "merged", "out.loratool-partial"):
        Path(name).mkdir(parents=True)
    if page == options[-1:]:
        Path("out/in").rmdir()
    Path("link").symlink_to("out")
    before = sorted(Path().rglob("*"))
    result = run("merge", "base", "adapter", "--html", page, *options, "--force")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {page}: is in the output ") and "with --html" in result.stderr
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("command", ["merge base adapter -o out", "inspect adapter", "diff base merged --spectra"])
def test_without_jinja_it_is_refused_before_any_work(
    command: str, work: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # so an import of it fails
    before = sorted(os.listdir())
    result = run(*command.split(), "--html", "x.html")
    assert (result.exit_code, result.stdout) == (5, "")
    assert result.stderr.splitlines()[-1] == "hint: pip install '.[html]' in a clone of loratool"
    assert sorted(os.listdir()) == before
    assert run(*command.split()).exit_code == 0


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(partial: Path, path: Path) -> None:
    if path.name == "out.html":
        raise FULL
    os.rename(partial, path)


TAKEN = UsageError("is taken", culprit="out.html", remedy="name another")


# what fails, how, what is said
FAILURES: dict[str, tuple[str, Any, str]] = {
    "full": ("loratool.commands.report_files.write_at", Mock(side_effect=FULL), "No space left on device"),
    "full at the end": ("loratool.durable.disk.rename", full_disk, "No space left on device"),
    "memory": ("loratool.views.page.render.render", Mock(side_effect=MemoryError), "out of memory"),
    "bug": (
        "loratool.views.page.render.render",
        Mock(side_effect=KeyError("x")),
        "internal error, please report it: KeyError: 'x'",
    ),
    "place": (
        "loratool.commands.report_files.check_page_path",
        Mock(side_effect=(None, TAKEN) * 6),  # free before the command's work, and taken after it
        "out.html: is taken; name another",
    ),
}


@pytest.mark.parametrize("options", [(), ("-q",), ("--json",)])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_page_that_fails_is_a_warning(
    failure: str, options: tuple[str, ...], work: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, fails, why = FAILURES[failure]
    plain = run("merge", "base", "adapter", "-o", "out", *options, "--force")
    monkeypatch.setattr(place, fails)
    result = run(*MERGE, *options, "--force")
    assert (result.exit_code, result.stdout) == (0, plain.stdout)
    said = f"warning: out is written and whole, but its page out.html is not written: {why}\n"
    assert result.stderr.count(said) == result.stderr.count("its page") == 1 and "Traceback" not in result.stderr
    assert run("verify", "base", "adapter", "out").exit_code == 0
    wrong = run("verify", "base", "adapter", "base", "--html", "out.html", *options)
    assert wrong.exit_code == 1 and f"warning: the page out.html is not written: {why}\n" in wrong.stderr
    assert not [name for name in os.listdir() if name.startswith("out.")]


def test_a_traceback_tells_why_a_page_failed(work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.views.page.render.render", Mock(side_effect=KeyError("x")))
    monkeypatch.setenv("LORATOOL_DEBUG", "1")
    result = run("inspect", "adapter", "--html", "out.html")
    assert result.exit_code == 0 and "Traceback" in result.stderr


@pytest.mark.parametrize("name", ["LORATOOL_INSPECT_FOR", "LORATOOL_INSPECT_RUNTIME"])
def test_both_variables_of_an_option_are_shown(
    name: str, work: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by its word, and one by the name of its argument."""
    monkeypatch.setenv(name, "vllm")
    result = run("inspect", "adapter", "--html", "x.html")
    assert "warning: the page" not in result.stderr and shown(Path("x.html")).startswith(
        f"{name}=vllm loratool inspect"
    )


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("options", [(), pytest.param(("--json",), marks=pytest.mark.slow)])
def test_a_signal_while_the_page_is_made_says_so_too(options: tuple[str, ...], work: Path) -> None:
    program = (
        "import os, signal\nfrom loratool.views.page import render\n"
        "render.render = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from loratool.cli import main\nmain()"
    )
    call = [sys.executable, "-c", program, *MERGE, *options]
    done = subprocess.run(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 143
    said = json.loads(done.stdout)["error"]["message"] if options else done.stderr
    assert "interrupted; out is written and whole, only its page is not" in said
    assert not [name for name in os.listdir() if name.startswith("out.")] and Path("out/loratool.undo").exists()


def test_a_shell_completes_the_file(work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is checked meanwhile."""
    monkeypatch.setenv("_LORATOOL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "loratool inspect base --html x.pdf --html re")
    monkeypatch.setenv("COMP_CWORD", "6")
    assert run().stdout == "file,re\n"
