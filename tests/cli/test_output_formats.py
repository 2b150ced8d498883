"""--output-format of the commands that check: GitHub's annotations, SARIF and JUnit, of reports and of errors.

The readers are not ours: XML by Python's, and (slow) SARIF by Microsoft's validator with the rules of code scanning,
JUnit by junitparser, annotations against actions/toolkit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import factors, run_command, weights, write_model, write_peft
from lib.harness.workflow_commands import commands_in
from safetensors.torch import save_file

import loratool
from loratool import errors
from loratool.cli import _signal_reporter, as_github, as_json, as_sarif
from loratool.cli.output_formats import COMMANDS, FORMATS
from loratool.commands.report_files import report_classes
from loratool.errors import InputError, LoratoolError
from loratool.views import issues
from loratool.views.attestation import AttestationReport, Deviation
from loratool.views.inspect_files import FileHash, FilesReport
from loratool.views.issues import KINDS, find_issues
from loratool.views.verify import TensorVerdict, VerifyReport

Run = Callable[..., Any]

HOSTILE = 'a"<b>\n::error file=x::owned%0A\r##[set-output name=x]y]]>&\x1b[2J\ufffe'
COMMAND = "::warning::owned"  # where a row of a table begins
# a call -> its exit code and the kinds of its issues, those of a failed check first
CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    "verify base adapter merged": (0, ()),
    "verify base adapter base": (1, ("wrong",)),
    "verify base adapter unfinished": (1, ("missing",)),
    "verify short adapter merged": (1, ("extra",)),
    "inspect base": (0, ()),
    "inspect adapter": (0, ()),
    "inspect zero": (0, ("problem",)),
    "inspect zero --strict": (1, ("problem",)),
    "inspect psoft --strict": (1, ("other-method",)),
    "inspect adapter --for vllm --base stranger": (1, ("not-applied",)),
    "diff base merged": (0, ()),
    "diff base merged --fail-above 0": (1, ("too-far",)),
    "diff base merged --fail-above 9": (0, ()),
    "diff base short --fail-above 0": (1, ("one-sided",)),
    "diff base other --fail-above 0": (1, ("one-sided", "not-comparable")),
    "diff base other --headers --fail-above 0": (1, ("one-sided", "not-comparable")),
    "diff base other --headers": (0, ()),
    "diff adapter zero --fail-above 0": (1, ("too-far",)),
    "diff adapter zero adapter --fail-above 0": (1, ("too-far",)),
    "diff hostile-1 hostile-2 --fail-above 0": (1, ("too-far",)),
    "inspect hostile-1": (0, ()),
    "verify base adapter absent": (3, ()),
    "verify base": (2, ()),
    "inspect absent\n::error::owned": (3, ()),
    "diff base merged --fail-above x": (2, ()),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    modules = {f"model.layers.{n}.self_attn.{name}_proj": (8, 6) for n in range(2) for name in "qk"}
    tensors = {f"{name}.weight": weights(*shape, seed=i) for i, (name, shape) in enumerate(modules.items())}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    write_model(folder / "base", {**tensors, "model.norm.weight": weights(6)}, config)
    write_model(folder / "short", tensors, config)
    first = next(iter(tensors))
    write_model(folder / "other", {first: weights(6, 6), "model.norm.weight": weights(6)}, config)
    write_model(folder / "stranger", {"model.norm.weight": weights(6)}, config)
    for number in (1, 2):
        names = f"{HOSTILE}.weight", f"{COMMAND}.weight"
        write_model(folder / f"hostile-{number}", {name: weights(4, 4, seed=number) for name in names}, config)
    pairs = {module: factors(*shape, 2, seed=i) for i, (module, shape) in enumerate(modules.items())}
    write_peft(folder / "adapter", pairs)
    write_peft(folder / "zero", {name: (A, 0 * B) for name, (A, B) in pairs.items()})
    (folder / "psoft").mkdir()
    save_file({"base_model.model.x.psoft_R.weight": weights(2, 1)}, folder / "psoft" / "adapter_model.safetensors")
    (folder / "psoft" / "adapter_config.json").write_text('{"peft_type": "PSOFT", "target_modules": ["x"]}')
    loratool.merge(folder / "base", folder / "adapter", folder / "merged")
    loratool.merge(folder / "short", folder / "adapter", folder / "unfinished")
    return folder


@pytest.fixture
def place(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(stage)
    return stage


def in_format(call: str, form: str) -> tuple[int, str, str]:
    result = run_command(*call.split(" "), "--output-format", form)
    return result.exit_code, result.stdout, result.stderr


def test_a_call_says_the_same_in_every_format(place: Path) -> None:
    """Exit code, kinds and levels, whatever the end; and only GitHub's format has lines that its runner acts on."""
    for call, (code, kinds) in CALLS.items():
        texts = {}
        for form in FORMATS:
            ended, texts[form], stderr = in_format(call, form)
            assert ended == code, (call, form, stderr)
            assert form == "github" or commands_in(texts[form] + stderr) == [], call
            assert commands_in(stderr) == [], call
        level = "error" if code else "warning"
        log = json.loads(texts["sarif"])["runs"][0]
        (invocation,) = log["invocations"]
        assert invocation["exitCode"] == code and invocation["executionSuccessful"] is (code < 2)
        suite = ElementTree.fromstring(texts["junit"])[0]
        by_hand = {name: len(suite.findall(f"testcase/{name[:-1]}")) for name in ("failures", "errors")}
        assert suite.attrib == {"name": f"loratool {call.split()[0]}", "tests": str(len(suite)), **texted(by_hand)}
        annotations = commands_in(texts["github"])
        if code > 1:
            (note,) = invocation["toolExecutionNotifications"]
            (annotation,), (error,) = annotations, suite.findall("testcase/error")
            assert log["results"] == [] and note["level"] == annotation.name == "error"
            first = note["message"]["text"].splitlines()[0]
            assert first == annotation.message.splitlines()[0] == error.get("message") and first
            assert json.loads(texts["json"])["error"]["kind"] == note["descriptor"]["id"] == error.get("type")
            continue
        found = [(each["ruleId"], each["level"]) for each in log["results"]]
        assert tuple(dict.fromkeys(found)) == tuple((kind, level) for kind in kinds), call
        assert [(each.properties["title"].partition(": ")[2], each.name) for each in annotations] == found
        assert [each.message for each in annotations] == [each["message"]["text"] for each in log["results"]]
        named = "failure" if code else "system-out"
        assert {case.get("name") for case in suite if case.find(named) is not None} == set(kinds)


def texted(counts: dict[str, int]) -> dict[str, str]:
    return {name: str(count) for name, count in counts.items()}


def test_names_reach_the_reader(place: Path) -> None:
    """Those of tensors and files, whole but for what cannot be shown, which is escaped."""
    _, text, _ = in_format("diff hostile-1 hostile-2 --fail-above 0", "sarif")
    (result,) = json.loads(text)["runs"][0]["results"]
    (location,) = result["locations"]
    shown = f"{HOSTILE}.weight".replace("\n", "\\n").replace("\r", "\\r").replace("\x1b", "\\x1b")
    shown = shown.replace("\ufffe", "\\ufffe")
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "hostile-2"
    names = [f"{COMMAND}.weight", shown]
    assert [each["fullyQualifiedName"] for each in location["logicalLocations"]] == names
    _, text, _ = in_format("diff hostile-1 hostile-2 --fail-above 0", "junit")
    (failure,) = ElementTree.fromstring(text).iter("failure")
    assert failure.text is not None and failure.text.splitlines()[1:] == [f"  {name}" for name in names]
    (annotation,) = commands_in(in_format("diff hostile-1 hostile-2 --fail-above 0", "github")[1])
    assert annotation.properties == {"title": "loratool diff: too-far", "file": "hostile-2"}
    assert annotation.message.endswith(f": {', '.join(names)}")


@pytest.mark.parametrize(
    ("file", "uri"),
    [("a b/ä#?.safetensors", "a%20b/%C3%A4%23%3F.safetensors"), ("c:d", "c%3Ad"), ("hf://a/b@main", "hf://a/b@main"),
     ("https://me:secret@host/x?token=1", "https://host/x")],
)  # fmt: skip
def test_a_file_has_the_uri_that_leads_to_it(file: str, uri: str) -> None:
    assert as_sarif._uri(file) == uri
    assert as_sarif._uri(os.path.abspath("x y")) == Path("x y").absolute().as_uri()


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "text"])
def test_a_signal_is_reported(
    form: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Once: not below a document that was printed, or is being printed."""
    monkeypatch.setattr(as_json, "begun", False)
    for begun in (False, True):
        as_json.begun = begun
        assert _signal_reporter(["verify", "--output-format", form])(15, None) == 143
        printed = capfdbinary.readouterr().out.decode()
        assert ("interrupted; nothing unfinished is left" in printed) is not begun


class TestOption:
    def test_json_is_its_short_form(self, place: Path, run: Run) -> None:
        for call in ("verify base adapter merged", "inspect zero --strict", "verify base adapter absent"):
            short, long = (run(*call.split(), *more) for more in (["--json"], ["--output-format", "json"]))
            both = run(*call.split(), "--json", "--output-format=json")
            assert (short.exit_code, short.stdout) == (long.exit_code, long.stdout) == (both.exit_code, both.stdout)

    @pytest.mark.parametrize("form", ["text", "github", "sarif", "junit"])
    def test_two_formats_are_refused(self, form: str, place: Path, run: Run) -> None:
        result = run("verify", "base", "adapter", "merged", "--json", f"--output-format={form}")
        message = json.loads(result.stdout)["error"]["message"]
        assert (result.exit_code, message) == (2, f"--json and --output-format {form} exclude each other")

    def test_the_environment_sets_it(self, place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORATOOL_VERIFY_OUTPUT_FORMAT", "sarif")
        for call in ("verify base adapter merged", "verify base adapter absent", "verify --no-such"):
            assert json.loads(run(*call.split()).stdout)["version"] == "2.1.0"
        assert run("verify", "base", "adapter", "merged", "--output-format", "text").stdout.startswith("base + adapter")

    def test_other_commands_have_none(self, place: Path, run: Run) -> None:
        for call in ("merge base adapter -o x", "mrge", "verify base adapter merged --output-format sarif"):
            result = run(*call.split(), "--output-format", "xml")
            assert result.exit_code == 2 and result.stdout == "" and result.stderr.startswith("error: ")


class TestKinds:
    def test_a_failed_check_says_why(self) -> None:
        """Those of reports that the calls above do not have."""
        verdict = TensorVerdict("a.weight", "requantized", "of another program")
        proof = VerifyReport("base", "merged", "inconclusive", (verdict,), 0, 0, 0, 1, (), (), (), (), ("be careful",))
        stated = [Deviation("file", "x.safetensors", "1" * 64, "2" * 64), Deviation("adapter", "style", "3" * 64, None)]
        stated.append(Deviation("dtype", "a.weight", "F32", "F16"))
        files = [FileHash("a", 1, "4" * 64, "differs", None), FileHash("b", 1, "5" * 64, "same", None)]
        unproven = [("inconclusive", "error", "merged"), ("warning", "warning", "merged")]
        reports: list[tuple[Any, list[tuple[str, str, str]]]] = [
            (proof, unproven),
            (AttestationReport("s", "base", (), "merged", 1, 1, (), proof), unproven),
            (
                AttestationReport("s", "base", (), "merged", 1, 1, tuple(stated), None),
                [("not-as-stated", "error", file) for file in ("merged", "style", "merged")],
            ),
            (FilesReport("model", "6" * 64, tuple(files), "model.sig", None), [("digest-differs", "error", "model")]),
        ]
        for report, expected in reports:
            assert [(each.kind, each.level, each.file) for each in find_issues(report, report.said_no)] == expected
        by_calls = {kind for _, kinds in CALLS.values() for kind in kinds}
        assert by_calls | {kind for _, each in reports for kind, *_ in each} == set(KINDS)

    def test_each_is_of_a_report_of_a_command_with_the_option(self) -> None:
        classes = {each for command in COMMANDS for each in report_classes(command)}
        assert set(issues.CHECKS) <= classes
        assert {kind for kinds in issues.CHECKS.values() for kind in kinds} == set(KINDS)

    def test_each_is_a_rule_that_leads_into_the_guide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(errors, "SITE", "https://owner.github.io/loratool")
        rules = json.loads(as_sarif.to_sarif("verify"))["runs"][0]["tool"]["driver"]["rules"]
        assert [rule["id"] for rule in rules] == [*KINDS]
        page, anchor = "https://owner.github.io/loratool/ci.html#", "what-checks-find"
        assert {rule["helpUri"] for rule in rules} == {page + anchor}
        guide = (Path(loratool.__file__).parent / "guides" / "ci.md").read_text()
        assert f"\n## {anchor.replace('-', ' ').capitalize()}\n" in guide


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the programs that read these formats."""
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("others")
    packages = ["@microsoft/sarif-multitool-linux@5", "@actions/core@3"]
    subprocess.run(["npm", "install", "--silent", "--prefix", folder, *packages], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "python", "junitparser"]
    subprocess.run(pip, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Microsoft's validator is the one for Linux")
class TestReaders:
    def test_sarif_is_valid_and_code_scanning_takes_it(self, place: Path, others: Path, tmp_path: Path) -> None:
        """By the schema, the specification's rules and GitHub's; it may only say that we have no home page."""
        validator = others / "node_modules/@microsoft/sarif-multitool-linux/Sarif.Multitool"
        variables = {**os.environ, "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1"}

        def complaints(text: str) -> list[str]:
            (tmp_path / "x.sarif").write_text(text)
            call = [validator, "validate", "x.sarif", "--output", "o", "--log", "ForceOverwrite"]
            done = subprocess.run(
                [*call, "--rule-kind", "Sarif;Gh"], cwd=tmp_path, env=variables, capture_output=True, text=True
            )
            assert "Analysis completed" in done.stdout, done.stderr
            lines = [line for line in done.stdout.splitlines() if re.search(r": (error|warning) [A-Z]+\d+:", line)]
            return [line for line in lines if "'informationUri'" not in line]

        for call in CALLS:
            assert complaints(in_format(call, "sarif")[1]) == [], call
        broken = in_format("inspect base", "sarif")[1].replace('"results"', '"findings"')
        assert any("does not define a property 'findings'" in line for line in complaints(broken))

    def test_junit_is_read(self, place: Path, others: Path) -> None:
        script = "import sys, junitparser as j; x = j.JUnitXml.fromstring(sys.stdin.buffer.read())\n"
        script += (
            "for s in x:\n  for c in s: print(c.classname, c.name, [(type(r).__name__, r.type) for r in c.result])"
        )
        for call, (code, kinds) in CALLS.items():
            text = in_format(call, "junit")[1]
            done = subprocess.run(
                [sys.executable, "-c", script], input=text, capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": str(others / "python")}, check=True,
            )  # fmt: skip
            lines = done.stdout.splitlines()
            assert sum("('Failure'" in line for line in lines) == (len(kinds) if code == 1 else 0), call
            assert sum("('Error'" in line for line in lines) == (code > 1), call

    def test_annotations_are_as_of_actions_toolkit(self, others: Path) -> None:
        error: LoratoolError = InputError(f"50%, or {HOSTILE}", culprit="a,b:c%", remedy="d")
        ours = as_github.to_github("verify", error=error)
        (annotation,) = commands_in(ours)
        script = "const {issueCommand} = await import('./node_modules/@actions/core/lib/command.js');"
        script += "const [p, m] = JSON.parse(process.argv[1]); issueCommand('error', p, m)"
        done = subprocess.run(
            ["node", "--input-type=module", "-e", script, json.dumps([annotation.properties, annotation.message])],
            cwd=others, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == f"{ours}\n", done.stderr
