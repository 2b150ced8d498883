"""The composite action in `.github/actions/loratool`, run step by step as a runner does, and the hook of pre-commit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from lib.harness.workflow_commands import commands_in
from test_docs import TEXTS, blocks
from test_release import NOT_SOURCE, needs_torch_for_cpus, torch_for_cpus

import loratool
from loratool.cli.output_formats import COMMANDS

FOLDER = ROOT / ".github" / "actions" / "loratool"
ACTION = yaml.safe_load((FOLDER / "action.yml").read_text())
HOOKS = ROOT / ".pre-commit-hooks.yaml"
BY_HAND = [step for step in ACTION["runs"]["steps"] if "run" in step]
EXPRESSION = re.compile(r"\$\{\{ (.*?) \}\}")
Outputs = dict[str, dict[str, str]]  # step -> its outputs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these steps are run here by a bash of Linux or macOS")


class Runner:
    """What a runner of GitHub gives a step: the variables, the files that they name, and bash as it calls it."""

    def __init__(self, workspace: Path, temp: Path) -> None:
        self.workspace, self.temp = workspace, temp
        self.summary = temp / "summary.md"
        temp.mkdir()

    def run(
        self, name: str, inputs: Mapping[str, str], outputs: Outputs, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the step of a name, and add its outputs."""
        (step,) = [each for each in BY_HAND if each["name"] == name]
        context = {f"inputs.{key}": each.get("default", "") for key, each in ACTION["inputs"].items()}
        context |= {f"inputs.{key}": value for key, value in inputs.items()}
        context |= {f"steps.{id}.outputs.{key}": v for id, each in outputs.items() for key, v in each.items()}
        written = self.temp / "output"
        written.write_text("")
        env = {key: EXPRESSION.sub(lambda match: context[match[1]], str(each)) for key, each in step["env"].items()}
        env |= {
            "GITHUB_ACTIONS": "true",
            "GITHUB_ACTION_PATH": str(FOLDER),
            "GITHUB_OUTPUT": str(written),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_WORKSPACE": str(self.workspace),
            "RUNNER_ARCH": "X64",
            "RUNNER_OS": "Linux",
            "RUNNER_TEMP": str(self.temp),
            "PATH": os.environ["PATH"],
            "HOME": str(self.temp),
            **more,
        }
        script = self.temp / "script.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", script],
            cwd=self.workspace, env=env, capture_output=True, text=True,
        )  # fmt: skip
        if "id" in step:
            outputs[step["id"]] = dict(line.split("=", 1) for line in written.read_text().splitlines())
        return done


@pytest.fixture(scope="module")
def bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `loratool` of these sources, as the step of the installation leaves one."""
    folder = tmp_path_factory.mktemp("installed") / "bin"
    folder.mkdir()
    (folder / "loratool").write_text(f'#!/bin/sh\nexec env PYTHONPATH={ROOT} {sys.executable} -m loratool "$@"\n')
    (folder / "loratool").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    loratool.demo(folder / "demo")
    loratool.merge(folder / "demo/base", folder / "demo/adapter", folder / "merged")
    return folder


@pytest.fixture
def call(made: Path, bin: Path, tmp_path: Path) -> Callable[[str], tuple[Any, dict[str, str], str]]:
    """Return a function that runs a command by the action: the ended step, its outputs, and the summary."""
    runner = Runner(made, tmp_path / "temp")

    def run(command: str) -> tuple[Any, dict[str, str], str]:
        outputs: Outputs = {"install": {"bin": str(bin)}}
        done = runner.run("Run loratool", {"command": command}, outputs)
        return done, outputs["run"], runner.summary.read_text() if runner.summary.exists() else ""

    return run


class TestAction:
    def test_inputs_reach_a_shell_as_variables(self) -> None:
        """An expression in a script would be text of the script, whatever it says."""
        assert len(BY_HAND) == 3
        for step in BY_HAND:
            assert step["shell"] == "bash" and "${{" not in step["run"]
        used = set(re.findall(r"inputs\.([\w-]+)", (FOLDER / "action.yml").read_text()))
        assert used == set(ACTION["inputs"])
        made = {f"steps.{step['id']}.outputs" for step in ACTION["runs"]["steps"] if "id" in step}
        assert {each["value"].split()[1].rpartition(".")[0] for each in ACTION["outputs"].values()} <= made

    @pytest.mark.slow
    def test_a_check_that_passes(self, call: Callable[..., Any]) -> None:
        done, outputs, summary = call("verify demo/base demo/adapter merged")
        assert (done.returncode, outputs["exit-code"], commands_in(done.stdout)) == (0, "0", [])
        verdict = "proven: 21 of 21 tensors exact, 9 others unchanged"
        assert verdict in done.stdout.splitlines()
        assert summary.startswith("<pre>\n$ loratool verify demo/base demo/adapter merged\n")
        assert summary.endswith(f"\n{verdict}\nexit code 0\n</pre>\n")
        page = Path(outputs["page"])
        assert page.is_file() and page.parent.name == outputs["artifact"]
        assert loratool.read_report(page).ok

    def test_a_check_that_fails(self, call: Callable[..., Any]) -> None:
        """With an annotation, which the summary does without, and with the page."""
        done, outputs, summary = call("inspect demo/adapter\n--base demo/gpt2/base --strict")
        assert (done.returncode, outputs["exit-code"]) == (1, "1")
        assert {each.properties["title"] for each in commands_in(done.stdout)} == {"loratool inspect: problem"}
        assert Path(outputs["page"]).is_file() and "::error" not in summary and "exit code 1" in summary

    @pytest.mark.slow
    def test_an_error(self, call: Callable[..., Any]) -> None:
        done, outputs, summary = call("verify demo/base demo/none merged")
        (annotation,) = commands_in(done.stdout)
        assert (done.returncode, "page" in outputs) == (3, False)
        assert annotation.message.startswith("demo/none: no such file or folder\n")
        assert "error: demo/none: no such file or folder" in summary

    @pytest.mark.slow
    def test_commands_of_all_kinds(self, call: Callable[..., Any], made: Path) -> None:
        """With a page or without, with annotations or without, with their own format, and none at all."""
        for command, code, has_page in [
            ("merge demo/base demo/adapter -o 'a b' --dry-run", 0, True),
            ("count demo/base", 0, False),
            ("verify demo/base demo/adapter merged --json", 0, True),
            ("verify demo/base demo/adapter merged --output-format sarif", 0, True),
            ("mrge demo/base", 2, False),
            ("", 2, False),
        ]:
            done, outputs, _ = call(command)
            assert (done.returncode, "page" in outputs) == (code, has_page), (command, done.stdout, done.stderr)

    def test_an_open_quote(self, call: Callable[..., Any], made: Path) -> None:
        """Nothing is run, the words before it neither."""
        done, outputs, _ = call("merge demo/base demo/adapter -o part 'verbose")
        (annotation,) = commands_in(done.stdout)
        assert (done.returncode, outputs, annotation.name) == (2, {}, "error") and not (made / "part").exists()

    @pytest.mark.slow
    def test_nothing_of_an_input_is_run(self, call: Callable[..., Any], made: Path) -> None:
        for command in (
            "inspect $(touch owned)",
            "inspect `touch owned`",
            "inspect x; touch owned",
            "inspect x && touch owned",
        ):
            done, _, _ = call(command)
            assert done.returncode > 0 and not (made / "owned").exists(), command
        done, _, summary = call("inspect '*' '</pre><b>&amp;'")
        assert "</pre><b>" not in summary and "'</pre><b>&amp;'" in unescape(summary)

    def test_the_commands_with_annotations_are_those_that_check(self, run: Callable[..., Any]) -> None:
        """As the step finds them: in the help."""
        for command in (*COMMANDS, "merge", "run"):
            shown = run(command, "--help").stdout
            assert ("  --output-format " in shown) is (command in COMMANDS)
            assert ("  --html " in shown) is (command != "run")

    def test_the_guide_uses_it(self, call: Callable[..., Any]) -> None:
        (job,) = yaml.safe_load(blocks("check-adapters", "yaml")[0])["jobs"].values()
        step = job["steps"][1]
        assert step["uses"].removeprefix("OWNER/loratool/") == f"{FOLDER.relative_to(ROOT)}@v0"
        assert set(step["with"]) <= set(ACTION["inputs"])
        assert call(step["with"]["command"])[0].returncode == 0
        for name, each in ACTION["inputs"].items():
            if default := each.get("default"):
                assert f"`{name}`" in TEXTS["check-adapters"] and f"`{default}`" in TEXTS["check-adapters"]

    @pytest.mark.slow
    def test_it_installs_what_is_beside_it(self, made: Path, tmp_path: Path) -> None:
        """All steps in order. The dependencies are those of this environment."""
        runner, outputs = Runner(made, tmp_path / "temp"), dict[str, dict[str, str]]()
        outputs["python"] = {"python-path": sys.executable, "python-version": "3.12.1"}
        shutil.copytree(ROOT, tmp_path / "sources", ignore=shutil.ignore_patterns(*NOT_SOURCE))
        here = {
            "GITHUB_ACTION_PATH": str(tmp_path / "sources" / FOLDER.relative_to(ROOT)), "PIP_NO_DEPS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("-packages")),
        }  # fmt: skip
        assert runner.run("Find pip's cache", {}, outputs).returncode == 0
        assert outputs["pip"]["key"] == "loratool-Linux-X64-3.12.1-" and outputs["pip"]["folder"].endswith("pip")
        done = runner.run("Install loratool as it is beside this file", {"extras": ""}, outputs, **here)
        assert done.returncode == 0, done.stderr
        done = runner.run("Run loratool", {"command": "verify demo/base demo/adapter merged"}, outputs, **here)
        assert done.returncode == 0 and "proven: 21 of 21" in done.stdout, done.stderr
        installed = Path(outputs["install"]["bin"]).parent.glob("lib/*/site-packages/loratool/cli/as_github.py")
        assert len([*installed]) == 1


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the programs that read these files."""
    folder = tmp_path_factory.mktemp("tools")
    venv.create(folder, with_pip=True)
    packages = ["check-jsonschema", "pre-commit"]
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", *packages], check=True)
    return folder / "bin"


class TestPreCommit:
    def test_it_is_for_weights(self) -> None:
        (hook,) = yaml.safe_load(HOOKS.read_text())
        for name, is_checked in [("a/adapter_model.safetensors", True), ("a.safetensors.index.json", False)]:
            assert bool(re.search(hook["files"], name)) is is_checked

    @pytest.mark.slow
    def test_both_files_are_valid(self, tools: Path) -> None:
        schema = [tools / "check-jsonschema", "--builtin-schema", "vendor.github-actions"]
        subprocess.run([*schema, FOLDER / "action.yml"], check=True)
        subprocess.run([tools / "pre-commit", "validate-manifest", HOOKS], check=True)

    @pytest.mark.slow
    @needs_torch_for_cpus
    def test_the_hook_stops_a_commit(self, tools: Path, tmp_path: Path) -> None:
        """With the configuration of the guide, of which the repository is one with these sources."""
        sources, place = tmp_path / "sources", tmp_path / "place"
        shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*NOT_SOURCE))
        identity = {f"GIT_{role}_{key}": "a@b" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}, **identity,
            **torch_for_cpus(tmp_path), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PRE_COMMIT_HOME": str(tmp_path / "home"),
        }  # fmt: skip

        def run(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)

        def commit(folder: Path, *files: str) -> subprocess.CompletedProcess[str]:
            assert run(folder, "git", "add", "--", *files).returncode == 0
            return run(folder, "git", "commit", "-m", "more")

        run(tmp_path, "git", "init", "-q", sources)
        assert commit(sources, ".").returncode == 0
        text = blocks("check-adapters", "yaml")[1]
        (entry,) = yaml.safe_load(text)["repos"]
        assert entry["rev"] == f"v{loratool.__version__}"
        here = text.replace(entry["repo"], str(sources))
        here = here.replace(entry["rev"], run(sources, "git", "rev-parse", "HEAD").stdout.strip())

        run(tmp_path, "git", "init", "-q", place)
        (place / ".pre-commit-config.yaml").write_text(here)
        loratool.demo(place / "demo")
        assert run(place, "pre-commit", "install").returncode == 0
        weights = "demo/{}.safetensors".format
        done = commit(place, ".pre-commit-config.yaml", "demo/adapter", weights("base/model-00001-of-00002"))
        assert done.returncode == 0 and "Passed" in done.stderr, done.stdout + done.stderr
        damaged = (place / weights("adapter/adapter_model")).read_bytes()[:-1]
        (place / "damaged.safetensors").write_bytes(damaged)
        done = commit(place, "damaged.safetensors", "demo/style")
        assert done.returncode == 1 and "error: damaged.safetensors: " in done.stderr, done.stdout + done.stderr
        assert run(place, "git", "reset", "-q", "damaged.safetensors").returncode == 0
        done = commit(place, "demo/style")
        assert done.returncode == 0 and "Passed" in done.stderr
        done = commit(place, "demo/base/config.json")
        assert done.returncode == 0 and "Skipped" in done.stderr
