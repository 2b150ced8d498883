"""cli/ and render.py: the words, the exit codes, the JSON, and how fast the command starts."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import FIXTURES, factors, slow, weights, write_model, write_peft
from lib.harness.interrupted import interrupted
from lib.harness.terminal import run_in_terminal

import loratool
from loratool.cli import COMMANDS, _run, cli
from loratool.cli.options import SIZE, WeightedPath
from loratool.durable.fileio import open_scratch, size
from loratool.files.dtypes import MERGE_DTYPES
from loratool.views.parts.envelope import SCHEMA_VERSION

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
OTHER = FIXTURES / "gpt2" / "adapter"
COMMAND = [sys.executable, "-c", "from loratool.cli import main; main()"]
Run = Callable[..., Any]


def best_time(command: list[str], runs: int = 5) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_help_starts_within_three_imports_of_click() -> None:
    """The least of several runs of each: the machine's noise only ever adds."""
    click_only = best_time([sys.executable, "-c", "import click"])
    assert best_time([*COMMAND, "--help"]) < 3 * click_only


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["merge", "-h"],
        ["inspect", str(BASE)],
        ["--version"],
        ["guide", "merging"],
    ],
)
def test_no_torch_and_no_numpy_where_headers_suffice(arguments: list[str]) -> None:
    code = (
        "import sys; from loratool.cli import _run; assert _run(sys.argv[1:]) == 0; "
        "sys.exit(bool({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], *([verb, "-h"] for verb in COMMANDS)])
def test_help_tells_the_story(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert (
        result.exit_code == (0 if arguments else 2) and ("Usage: loratool" if arguments else "merge") in result.stdout
    )
    if len(arguments) == 1:
        assert all(verb in result.stdout for verb in COMMANDS)
    if arguments[:1] == ["merge"]:
        assert all(name in result.stdout for name in ("keep", "fp32", "bf16", "fp16"))


def test_version(run: Run) -> None:
    from importlib.metadata import version

    first, native = run("--version").stdout.splitlines()
    assert first == f"loratool {version('loratool')}" and native.startswith("native: ")


def test_merge_prints_a_line_a_tensor_if_it_is_asked_to(tmp_path: Path, run: Run) -> None:
    result = run("merge", BASE, ADAPTER, "-o", tmp_path / "out", "-v")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and result.stderr == ""
    assert sum(line.startswith("model.layers.") for line in lines) == 21
    assert "21 of 30 tensors changed" in result.stdout and f"wrote {tmp_path / 'out'}" in result.stdout
    dry = run("merge", BASE, ADAPTER, "-o", tmp_path / "dry", "--dry-run")
    assert dry.exit_code == 0 and "would write" in dry.stdout and not (tmp_path / "dry").exists()


def test_json_is_one_object_with_the_reports_fields(tmp_path: Path, run: Run) -> None:
    result = run("merge", BASE, f"{ADAPTER}:0.5", "-o", tmp_path / "out", "--json", "--dtype", "fp32", "--no-undo")
    value = json.loads(result.stdout)
    assert (value["schema"], value["verb"], value["ok"], value["exit_code"]) == (SCHEMA_VERSION, "merge", True, 0)
    report = value["report"]
    assert (
        len(report["tensors"]) == 21
        and report["tensors"][0]["scales"] == [1.0]
        and report["adapters"][0]["weight"] == 0.5
    )
    assert " ".join(report) == (
        "exists digests base out dry_run nbytes adapters tensors changed kept copied undo undo_bytes left_out files "
        "not_copied warnings quantized base_nbytes sizes decoded left_behind notes free_bytes replaced"
    )
    value = json.loads(run("inspect", ADAPTER, "--base", BASE, "--json").stdout)
    assert value["report"]["kind"] == "adapter" and value["report"]["coverage"]["bound"] == 21


# name -> (arguments with {tmp}, exit code, kind, a piece of the message)
FAILURES: dict[str, tuple[list[str], int, str, str]] = {
    "no such verb": (["explode"], 2, "usage", "explode"),
    "no such option": (["merge", "--fast", str(BASE), str(ADAPTER)], 2, "usage", "--fast"),
    "missing argument": (["merge", str(BASE)], 2, "usage", "ADAPTER"),
    "bad dtype": (["merge", str(BASE), str(ADAPTER), "--dtype", "int3", "-o", "{tmp}/o"], 2, "usage", "int3"),
    "bad size": (["merge", str(BASE), str(ADAPTER), "--max-shard-size", "5 apples"], 2, "usage", "5 apples"),
    "bad layers": (["merge", str(BASE), str(ADAPTER), "--layers", "a-b", "-o", "{tmp}/o"], 2, "usage", "a-b"),
    "bad pattern": (["merge", str(BASE), str(ADAPTER), "--exclude", "re:(", "-o", "{tmp}/o"], 2, "usage", "re:("),
    "no such base": (["merge", "absent.safetensors", str(ADAPTER)], 3, "input", "absent.safetensors"),
    "not in the cache": (["merge", "org/absent", str(ADAPTER)], 3, "input", "hf download org/absent"),
    "swapped": (["merge", str(ADAPTER), str(BASE)], 3, "input", "swap them"),
    "wrong adapter": (["merge", str(BASE), str(OTHER), "-o", "{tmp}/o"], 3, "input", "not in the base"),
    "exists": (["merge", str(BASE), str(ADAPTER), "-o", "{tmp}/full"], 4, "needs-flag", "--force"),
    "absent device": (["merge", str(BASE), str(ADAPTER), "--device", "mps", "-o", "{tmp}/o"], 5, "machine", "float64"),
    "read-only": (["merge", str(BASE), str(ADAPTER), "-o", "/proc/out"], 5, "machine", "/proc"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_exit_codes_and_errors(tmp_path: Path, run: Run, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, code, kind, piece = FAILURES[case]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "full", {"x": weights(2)})
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    plain = run(*arguments)
    assert (plain.exit_code, plain.stdout) == (code, "") and piece in plain.stderr and "Traceback" not in plain.stderr
    result = run(*arguments, "--json")
    value = json.loads(result.stdout)
    assert (result.exit_code, value["exit_code"], value["ok"], value["error"]["kind"]) == (code, code, False, kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_exit_4_names_the_flag_that_makes_it_succeed(tmp_path: Path, run: Run) -> None:
    base = write_model(tmp_path / "base", {"a.x.weight": weights(6, 4)})
    adapter = write_peft(tmp_path / "adapter", {"a.x": factors(6, 4, 2), "b.y": factors(6, 4, 2)})
    result = run("merge", base, adapter, "-o", tmp_path / "out")
    assert result.exit_code == 4 and "--exclude y\n" in result.stderr
    result = run("merge", base, adapter, "-o", tmp_path / "out", "--exclude", "y")
    assert result.exit_code == 0 and "excluded: b.y" in result.stdout


def test_warnings_go_to_stderr(tmp_path: Path, run: Run) -> None:
    import torch

    base = write_model(tmp_path / "base", {"x.weight": weights(60, 40, dtype=torch.bfloat16)})
    adapter = write_peft(tmp_path / "adapter", {"x": factors(60, 40, 2)}, lora_alpha=1e-3)
    result = run("merge", base, adapter, "-o", tmp_path / "out")
    assert (
        result.exit_code == 0
        and result.stderr.startswith("warning: rounding to BF16 loses")
        and "warning:" not in result.stdout
    )


def test_options_come_from_the_environment(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATOOL_MERGE_OUT", str(tmp_path / "env"))
    monkeypatch.setenv("LORATOOL_MERGE_DTYPE", "fp32")
    monkeypatch.setenv("LORATOOL_MERGE_NO_UNDO", "1")
    assert run("merge", BASE, ADAPTER).exit_code == 0
    report = loratool.inspect(tmp_path / "env")
    assert report.dtypes == {"F32": 171_456}  # type: ignore[union-attr]


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATOOL_DEBUG", "1")
    assert "Traceback" in run("inspect", "absent.safetensors").stderr


def test_debug_shows_how_weights_were_decided(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr, whatever was logged before, and without it nowhere."""
    arguments = ("merge", BASE, ADAPTER, "--no-undo", "--force", "-o", tmp_path / "out")
    assert "dense" not in run(*arguments).stderr
    monkeypatch.setenv("LORATOOL_DEBUG", "1")
    monkeypatch.setenv("LORATOOL_NATIVE", "0")  # the compiled passes leave none of so few weights
    monkeypatch.setattr(logging.getLogger("loratool"), "handlers", [])
    line = re.search(r"([\d,]+) dense, ([\d,]+) near, ([\d,]+) nearer, ([\d,]+) exact$", run(*arguments).stderr, re.M)
    assert line
    dense, near, nearer, exact = (int(count.replace(",", "")) for count in line.groups())
    assert dense > 100 * near > 0 and near >= nearer >= exact


def test_an_internal_error_is_70_and_short(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.commands.inspect.command.run_inspect", lambda *a, **k: 1 / 0)
    result = run("inspect", BASE)
    assert result.exit_code == 70 and "ZeroDivisionError" in result.stderr and "Traceback" not in result.stderr


def test_a_closed_pipe_is_silent() -> None:
    shell = f"{' '.join(repr(c) for c in COMMAND)} inspect {BASE} | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "" and result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        slow("{L} inspect absent --json | true; exit ${{PIPESTATUS[0]}}", 3),
        ("{L} merge --json | true; exit ${{PIPESTATUS[0]}}", 2),
        slow("{L} inspect absent 2>&1 >/dev/null | true; exit ${{PIPESTATUS[0]}}", 3),
        ("{L} inspect absent --json >/dev/full", 3),
        ("{L} inspect {base} --json >/dev/full", 5),
        slow("{L} inspect {base} --json >&-", 0),
        slow("{L} merge {base} {adapter} -o {tmp}/o >&-", 0),
        ("{L} merge {base} {adapter} -o {tmp}/o --json 2>&-", 0),
        ("PYTHONIOENCODING=ascii {L} merge {tmp}/b\u00e9 {adapter} -o {tmp}/o\u00e9", 0),
        slow("PYTHONIOENCODING=ascii {L} inspect absent\u00e9 --json", 3),
        ("{L} inspect $'absent\\xff' --json", 3),
        ("LORATOOL_INSPECT_JSON=1 {L} inspect absent | grep -q '\"ok\": false'; exit ${{PIPESTATUS[1]}}", 0),
    ],
)
def test_difficult_outputs_change_no_code_and_show_no_traceback(tmp_path: Path, shell: str, code: int) -> None:
    import shutil

    shutil.copytree(BASE, tmp_path / "b\u00e9")
    line = shell.format(L=" ".join(repr(c) for c in COMMAND), base=BASE, adapter=ADAPTER, tmp=tmp_path)
    result = subprocess.run(["bash", "-c", line], capture_output=True)
    assert result.returncode == code and b"Traceback" not in result.stderr and b"Exception" not in result.stderr
    if result.stdout:
        json.loads(result.stdout) if "--json" in shell else result.stdout.decode("ascii")


# A call of each command
EACH = {
    "apply": "apply {base} {tmp}/merged.patch -o {tmp}/out",
    "combine": "combine {adapter} {adapter} -o {tmp}/out",
    "convert": "convert {base} --dtype fp32 -o {tmp}/out",
    "count": "count {base}",
    "demo": "demo {tmp}/demo",
    "diff": "diff {adapter} {adapter}",
    "env": "env",
    "extract": "extract {base} {llama}/tuned -o {tmp}/out",
    "guide": "guide hub",
    "init": "init {base} --rank 2 -o {tmp}/out",
    "inspect": "inspect {base}",
    "merge": "merge {base} {adapter} -o {tmp}/out",
    "patch": "patch {base} {tmp}/merged -o {tmp}/out.patch",
    "resize": "resize {adapter} --rank 2 -o {tmp}/out",
    "run": "run {tmp}/recipe.json",
    "recover": "recover {tmp}/left",
    "unmerge": "unmerge {tmp}/merged {adapter} -o {tmp}/out",
    "verify": "verify {base} {adapter} {tmp}/merged",
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_stdout_is_one_line_and_5(
    command: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    loratool.merge(BASE, ADAPTER, tmp_path / "merged")
    loratool.patch(BASE, tmp_path / "merged", tmp_path / "merged.patch")
    interrupted(BASE, ADAPTER, tmp_path / "left")
    recipe = {"command": "resize", "adapter": str(ADAPTER), "rank": 2, "out": str(tmp_path / "out")}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    call = EACH[command].format(base=BASE, adapter=ADAPTER, llama=BASE.parent, tmp=tmp_path)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = _run([*call.split(), *options])
        monkeypatch.undo()
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert (code, errors) == (5, [f"error: {full.name}: No space left on device"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("LORATOOL_MERGE_DTPE", "did you mean LORATOOL_MERGE_DTYPE?"),
        ("LORATOOL_INSPECT_JSN", "did you mean LORATOOL_INSPECT_JSON?"),
        ("LORATOOL_MEGRE_DTYPE", "did you mean LORATOOL_MERGE_DTYPE?"),
        ("LORATOOL_MERGE_BASE", "unset it; all options: loratool merge --help"),  # an argument, which is none
        ("LORATOOL_DEBUGG", "did you mean LORATOOL_DEBUG?"),
        ("LORATOOL_MERGE_\x1b[2J\n", "unset it; all options: loratool merge --help"),
    ],
)
def test_a_variable_of_no_option_is_an_error(name: str, hint: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any command: a job sets them for all its steps."""
    monkeypatch.setenv(name, "1")
    shown = name.replace("\x1b", "\\x1b").replace("\n", "\\n")
    result = run("inspect", ADAPTER)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {shown}: sets no option\nhint: {hint}\n"
    result = run("inspect", ADAPTER, "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["kind"], error["tensor"], error["remedy"]) == (2, "usage", name, hint)
    for call in (["inspect", "-h"], ["-h"], ["--version"], ["help", "merge"], ["guide", "hub"], ["merge", "--help"]):
        result = run(*call)
        assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("LORATOOL_VERSION", "LORATOOL_VERSION sets no option; did you mean LORATOOL_VERIFY_JSON?"),
        ("LORATOOL_DTYPE", "LORATOOL_DTYPE sets no option; did you mean LORATOOL_INIT_DTYPE?"),
        ("LORATOOL_", "LORATOOL_ sets no option"),
        ("LORATOOL_\x1b[2J\n", "LORATOOL_\\x1b[2J\\n sets no option"),
    ],
)
def test_a_variable_with_the_name_of_none_is_a_warning(
    name: str, warning: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    for options in ((), ("-q",), ("--json",)):
        result = run("inspect", ADAPTER, *options)
        assert result.exit_code == 0
        assert [line for line in result.stderr.splitlines() if "sets no option" in line] == [f"warning: {warning}"]


def test_no_variable_of_any_option_is_warned_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is shared: what sets an option of another command is no mistake. click tells which do."""
    for command in COMMANDS:
        loaded = cli.get_command(click.Context(cli), command)
        assert loaded
        for option in loaded.params:
            if isinstance(option, click.Option) and option.name != "json_schema":
                monkeypatch.setenv(f"LORATOOL_{command.upper()}_{option.name.upper()}", "" if option.is_flag else "1")
    monkeypatch.setenv("LORATOOL_DEBUG", "0")
    for name in ("INSPECT_ALPHA", "INSPECT_RUNTIME", "INSPECT_FOR", "INSPECT_TOP", "INSPECT_THRESHOLD"):
        monkeypatch.delenv(f"LORATOOL_{name}", raising=False)  # they would change the call
    assert "sets no option" not in run("inspect", ADAPTER).stderr


def test_names_cannot_drive_the_terminal(tmp_path: Path, run: Run) -> None:
    hostile = "\x1b]0;owned\x07[red]x[/red]\n"
    model = write_model(tmp_path / "m", {f"{hostile}.weight": weights(4, 4)})
    result = run("inspect", model)
    assert result.exit_code == 0 and "\x1b" not in result.stdout and "[red]x[/red]" in result.stdout
    adapter = write_peft(tmp_path / "a", {"\x1b[2J": factors(6, 4, 2)}, base_model_name_or_path="\x1b[2J")
    result = run("merge", model, adapter, "-o", tmp_path / "o")
    assert result.exit_code == 3 and "\x1b" not in result.stderr
    assert "\x1b" not in run("inspect", adapter, "--base", model).stdout
    forger = write_peft(tmp_path / "b", {"x\nall is well": factors(6, 4, 2)})
    assert "\nall is well" not in run("merge", model, forger, "-o", tmp_path / "out").stderr
    write_model(tmp_path / "m", {"x": weights(2)}, {"model_type": "\x1b[2J"})
    assert "\x1b" not in run("inspect", tmp_path / "m").stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.7", ("a.safetensors", 0.7)),
        ("a:-1e-3", ("a", -1e-3)),
        (r"C:\x.safetensors", (r"C:\x.safetensors", 1.0)),
        (r"C:\x.safetensors:0.7", (r"C:\x.safetensors", 0.7)),
        (r"C:\x.safetensors:0.7,te=0.4", (r"C:\x.safetensors", 0.7, {"te": 0.4})),
        ("a/:te1=-1,unet=2", ("a/", 1.0, {"te1": -1.0, "unet": 2.0})),
        ("a:0.7,te", ("a:0.7,te", 1.0)),
        ("org/name:2", ("org/name", 2.0)),
        ("a:1:2", ("a:1", 2.0)),
        ("a=b.safetensors", ("a=b.safetensors", 1.0)),
        ("a=b.safetensors:-2,te=0", ("a=b.safetensors", -2.0, {"te": 0.0})),
        ("a,b=1.safetensors", ("a,b=1.safetensors", 1.0)),
        (r"C:\x:0.8,te=0.4,up_blocks.*=.5, mlp = -1", (r"C:\x", 0.8, {"te": 0.4, "up_blocks.*": 0.5, "mlp": -1.0})),
        ("a:q_proj=1,te=2", ("a", 1.0, {"q_proj": 1.0, "te": 2.0})),
        (r"C:\x:1,re:(?:q|k)_proj=0.5,te=2", (r"C:\x", 1.0, {"re:(?:q|k)_proj": 0.5, "te": 2.0})),
        (r"a:re:layers\.[0,1]\.(?!x=)=1e-3", ("a", 1.0, {r"re:layers\.[0,1]\.(?!x=)": 1e-3})),
        ("a:0.7,q_proj,v_proj=1", ("a:0.7,q_proj,v_proj=1", 1.0)),
        ("a:0.7,te=1,", ("a:0.7,te=1,", 1.0)),
    ],
)
def test_weighted_paths(text: str, expected: tuple[object, ...]) -> None:
    assert WeightedPath().convert(text, None, None) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (":0,5", "'0,5' is not a weight, like 0.7"),
        (":0.7,q_proj,v_proj=1", "'0.7,q_proj,v_proj=1' is not a weight"),
        (":te=1,te=2", "'te=1,te=2' weighs a component or pattern twice"),
        (":1,re:x=1,re:x=1", "weighs a component or pattern twice"),
    ],
)
def test_weights_that_are_none(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(click.BadParameter, match=says):
        WeightedPath().convert(f"{tmp_path / 'a'}{text}", None, None)


def test_a_path_that_exists_is_never_split(tmp_path: Path) -> None:
    (tmp_path / "a:2").write_text("")
    assert WeightedPath().convert(str(tmp_path / "a:2"), None, None) == (str(tmp_path / "a:2"), 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("7", 7), ("9kb", 9000)],
)
def test_sizes(text: str, expected: int) -> None:
    assert SIZE.convert(text, None, None) == expected


def test_size_is_printed_in_decimal_units() -> None:
    assert [size(n) for n in (0, 999, 1000, 61_290, 614_510_000, 999_600_000, 6e9, 7e12, 7e15)] == [
        "0 B", "999 B", "1.00 kB", "61.3 kB", "615 MB", "1.00 GB", "6.00 GB", "7.00 TB", "7,000 TB",
    ]  # fmt: skip


def test_every_dtype_of_the_table_is_accepted(tmp_path: Path, run: Run) -> None:
    for dtype in MERGE_DTYPES:
        assert (
            run("merge", BASE, ADAPTER, "-o", tmp_path / dtype, "--dtype", dtype, "--dry-run", "--no-undo").exit_code
            == 0
        )


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_table_that_fits_and_a_bar(tmp_path: Path) -> None:
    command = [*COMMAND, "merge", str(BASE), str(ADAPTER), "-o", str(tmp_path / "out")]
    assert "wrote" in run_in_terminal(command, COLUMNS="70")


def test_the_module_runs_too() -> None:
    result = subprocess.run([sys.executable, "-m", "loratool", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("loratool ")


def test_what_an_adapter_announces_and_lacks_is_said_by_every_verb(tmp_path: Path, run: Run) -> None:
    """On stderr, in whichever form the result comes."""
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    out = tmp_path / "out"
    for command in (
        ["merge", BASE, adapter, "-o", out],
        ["verify", BASE, adapter, out],
        ["unmerge", out, adapter, "-o", tmp_path / "back", "--approximate"],
    ):
        for more in ([], ["--json"]):
            result = run(*command, *more, *(["--force"] if more and command[0] != "verify" else []))
            assert result.exit_code == 0
            first, *others = result.stderr.splitlines()
            assert re.fullmatch(r"warning: .* names lm_head, but the file has no tensors of it", first)
            assert len(others) <= (command[0] == "unmerge")  # of an approximate one


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_what_is_no_file_to_be_read(tmp_path: Path, run: Run) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    result = run("inspect", tmp_path / "link")
    assert result.exit_code == 3 and result.stderr.endswith("link: is a link to nowhere, which is not there\n")
    os.mkfifo(tmp_path / "pipe.safetensors")
    result = run("inspect", tmp_path / "pipe.safetensors")
    assert result.exit_code == 3 and "is a pipe or a device" in result.stderr


def test_a_device_for_what_computes_nothing(run: Run) -> None:
    result = run("inspect", BASE, "--device", "cuda")
    assert result.exit_code == 2 and "--device needs --spectra" in result.stderr


def test_a_folder_that_is_not_there_any_more(tmp_path: Path) -> None:
    """The scratch file's random name would say nothing."""
    with pytest.raises(OSError, match="No such file") as raised:
        open_scratch(tmp_path / "gone")
    assert raised.value.filename == str(tmp_path / "gone")


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"guide"}))
def test_options_are_the_keywords_of_the_library(name: str) -> None:
    """Each stands once: what a command does not use itself goes to the function of its name, all of whose keywords can
    be set but those of programs alone."""
    command = cli.get_command(click.Context(cli), name)
    assert command
    given = {(option.name or "").removeprefix("no_") for option in command.params}
    own = {
        "json",
        "json_schema",
        "output_format",
        "quiet",
        "verbose",
        "html",
        "save_recipe",
        "lock",
        "fail_above",
        "strict",
        "spectra",
        "headers",
        "metadata",
        "files",
    }
    more = {
        "inspect": [loratool.spectra, loratool.inspect_for, loratool.inspect_files],
        "verify": [loratool.verify_attestation],
        "diff": [loratool.diff_spectra, loratool.diff_headers],
        "convert": [loratool.convert_model, loratool.edit_metadata],
    }
    functions = [getattr(loratool, name), *more.get(name, [])]
    keywords = {keyword for function in functions for keyword in inspect.signature(function).parameters}
    assert given - own - keywords == set() and keywords - given <= {"progress", "workers"}
