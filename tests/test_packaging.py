"""Build the package as a user and a release do: with a compiler, without one, and for all machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, needs_passes

pytestmark = pytest.mark.slow
COPIED = ("pyproject.toml", "README.md", "LICENSE")
PASSES = "loratool/numerics/passes"
INCLUDED = sysconfig.get_paths()["include"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project, without what was built in it."""
    for name in COPIED:
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "loratool", tmp_path / "loratool", ignore=ignored)
    return tmp_path


def build(project: Path, **variables: str) -> Path:
    """Return the wheel that pip builds."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "wheels", "."]
    subprocess.run(command, cwd=project, check=True, env={**os.environ, **variables})
    (wheel,) = (project / "wheels").iterdir()
    return wheel


def refusal(wheel: Path) -> str:
    """Return what the release check says of a wheel."""
    done = subprocess.run([sys.executable, ROOT / ".ci/check_wheels", wheel], capture_output=True, text=True)
    assert bool(done.stderr) == bool(done.returncode)
    return done.stderr


def native_of(wheel: Path, folder: Path) -> str:
    """Return what a wheel's `loratool --version` says of the passes."""
    shutil.unpack_archive(wheel, folder, "zip")
    call = "from loratool.numerics.passes.native import describe_native; print(describe_native())"
    done = subprocess.run([sys.executable, "-c", call], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@needs_passes
def test_a_wheel_has_the_passes(project: Path) -> None:
    wheel = build(project)
    assert "-cp310-abi3-" in wheel.name and refusal(wheel) == ""
    assert native_of(wheel, project / "installed") == "avx2"
    assert not [*(project / "installed" / PASSES).glob("*.[ch]")]


def test_without_a_compiler_it_has_none_and_is_not_released(project: Path) -> None:
    wheel = build(project, CC="/bin/false")
    assert native_of(wheel, project / "installed") == "none (not built)"
    assert "is for one platform, and lacks the compiled passes" in refusal(wheel)


def test_the_wheel_for_all_machines(project: Path) -> None:
    tables = project / "pyproject.toml"
    text = tables.read_text()
    start, end = text.index("[[tool.setuptools.ext-modules]]"), text.index("[tool.setuptools.exclude-package-data]")
    tables.write_text(text[:start] + text[end:])
    wheel = build(project)
    assert wheel.name.endswith("-py3-none-any.whl") and refusal(wheel) == ""
    assert native_of(wheel, project / "installed") == "none (not built)"
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr(f"{PASSES}/_native.abi3.so", b"")
    assert "is for all platforms, and has the compiled passes" in refusal(wheel)


def test_the_source_has_what_builds_the_passes(project: Path) -> None:
    command = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", command], cwd=project, check=True)
    (source,) = (project / "dist").iterdir()
    with tarfile.open(source) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / PASSES).glob("*.[ch]")}
    assert needed | {f"{PASSES}/_native.pyi"} <= names


@needs_passes
@pytest.mark.parametrize(
    ("flag", "message"),
    [("-ffast-math", "the bounds do not hold"), ("-mfpmath=387", "a wider type"), ("-D__BYTE_ORDER__=4321", "endian")],
)
def test_compilers_that_break_the_bounds_are_refused(project: Path, flag: str, message: str) -> None:
    command = ["gcc", flag, "-I", INCLUDED, "-c", f"{PASSES}/kernel.c", "-o", "/dev/null"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode and message in done.stderr


@needs_passes
def test_sanitizers_find_nothing(project: Path) -> None:
    """No access beyond a buffer and no undefined behaviour, in hostile blocks both ways, and in damaged patches."""
    flags = "-shared -fPIC -O1 -g -fno-trapping-math -fsanitize=undefined,address -fno-sanitize-recover=all".split()
    out = f"{PASSES}/_native.abi3.so"
    subprocess.run(["gcc", *flags, "-I", INCLUDED, f"{PASSES}/kernel.c", "-o", out], cwd=project, check=True)
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    path = os.pathsep.join(map(str, (project, *(ROOT / f"tests/{folder}" for folder in (".", "numerics", "patches")))))
    variables = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}
    check = "check(0, 200, 7); check(0, 100, 7, make_cast); check_damaged(61)"
    imports = "import loratool; from test_passes import check, make_cast; from test_bodies import check_damaged"
    code = f"{imports}; {check}; print(loratool.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(project / "loratool/__init__.py")
