"""Locks of recipes: the same bytes anywhere, a no for all that differs, and one error for a lock that is damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES
from conftest import run_command as run
from jsonschema import Draft202012Validator

import loratool
from loratool.cli import schemas
from loratool.commands.digests import digest_of_path
from loratool.commands.run import lock as locks
from loratool.commands.run.lock import lock_path, meaning_of
from loratool.commands.run.steps import plan_steps
from loratool.errors import CheckError, UsageError

STEPS = [
    {"command": "resize", "adapter": "adapter", "rank": 2, "out": "small"},
    {"command": "merge", "base": "base", "adapters": ["small", "adapter"], "out": "merged", "no-undo": True},
    {"command": "verify", "base": "base", "adapters": ["small", "adapter"], "merged": "merged"},
]
CONVERT = {"command": "convert", "source": "adapter", "to": "peft", "out": "plain"}


def flip(path: Path) -> None:
    """Change one bit of the last weight of a file."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base and adapter."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter"):
        shutil.copytree(FIXTURES / "llama" / name, name)
    return tmp_path


def write(recipe: object, name: str = "r.json") -> Path:
    Path(name).write_text(json.dumps(recipe))
    return Path(name)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the three steps have run with --lock."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("locked"))
        for name in ("base", "adapter"):
            shutil.copytree(FIXTURES / "llama" / name, name)
        report = loratool.run(write({"steps": STEPS}), lock=True)
        assert (report.lock, report.locked, report.ok) == ("r.lock.json", False, True)
        return Path.cwd()


@pytest.fixture
def copy(locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which is the working folder."""
    shutil.copytree(locked, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path.cwd()


def test_a_lock_has_the_digests_of_what_was_read_and_written(copy: Path) -> None:
    text = Path("r.lock.json").read_text()
    lock = json.loads(text)
    assert text == json.dumps(lock, indent=2, sort_keys=True) + "\n" and str(copy.parent) not in text
    assert [each["command"] for each in lock["steps"]] == ["resize", "merge", "verify"]
    for step, listed in zip(plan_steps({"steps": STEPS}, dry_run=True), lock["steps"], strict=True):
        for side, paths in (("inputs", step.reads), ("outputs", step.writes)):
            assert {path: each["digest"] for path, each in listed[side].items()} == {
                path: f"sha256:{digest_of_path(path)}" for path in paths
            }
    before = text
    assert run("run", "r.json", "--lock", "--force").exit_code == 0
    assert Path("r.lock.json").read_text() == before
    done = run("run", "r.json", "--locked", "--force")
    assert done.exit_code == 0 and done.stdout.endswith("3 steps done\ninputs and outputs are as in r.lock.json\n")


def changed_alpha() -> None:
    path = Path("adapter", "adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 5}))


def without_shards() -> None:
    loratool.convert_model("base", "one")
    shutil.rmtree("base")
    Path("one").rename("base")


INPUTS: dict[str, tuple[Callable[[], object], str]] = {
    "one bit of the base": (lambda: flip(next(Path("base").glob("*.safetensors"))), "base, input of step 2, merge"),
    "one bit of the adapter": (
        lambda: flip(Path("adapter", "adapter_model.safetensors")),
        "adapter, input of step 1, resize",
    ),
    "the adapter's alpha": (changed_alpha, "sha256 of its config"),
}


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("dry", [False, True])
def test_an_input_that_differs_stops_the_run_before_it_writes(case: str, dry: bool, copy: Path) -> None:
    change, says = INPUTS[case]
    change()
    for out in ("small", "merged"):
        shutil.rmtree(out)
    before = sorted(copy.rglob("*"))
    result = run("run", "r.json", "--locked", *(["--dry-run"] if dry else []))
    assert (result.exit_code, result.stderr, len(result.stdout.splitlines())) == (1, "", 1)
    assert result.stdout.startswith("differs: ") and says in result.stdout and "r.lock.json" in result.stdout
    assert sorted(copy.rglob("*")) == before
    with pytest.raises(CheckError, match=says):
        loratool.run("r.json", locked=True, dry_run=dry)
    printed = json.loads(run("run", "r.json", "--locked", "--json").stdout)
    assert (printed["status"], printed["exit_code"], printed["report"]["steps"]) == ("differs", 1, [])
    Draft202012Validator(schemas.make("run")).validate(printed)


def test_other_shards_of_the_same_model_do_not_differ(copy: Path) -> None:
    without_shards()
    assert run("run", "r.json", "--locked", "--force").exit_code == 0


def test_an_output_that_differs_stops_the_run_after_its_step(copy: Path) -> None:
    lock = json.loads(Path("r.lock.json").read_text())
    lock["steps"][0]["outputs"]["small"]["digest"] = f"sha256:{64 * '0'}"
    Path("r.lock.json").write_text(json.dumps(lock))
    shutil.rmtree("merged")
    result = run("run", "r.json", "--locked", "--force")
    assert result.exit_code == 1 and not Path("merged").exists() and Path("small").exists()
    assert "differs: small, output of step 1, resize," in result.stdout and "000000000000, found" in result.stdout
    lock["steps"][0]["outputs"]["small"]["digest"] = f"sha256:{digest_of_path('small')}"
    lock["steps"][1]["inputs"]["small"]["digest"] = f"sha256:{64 * '0'}"
    Path("r.lock.json").write_text(json.dumps(lock))
    result = run("run", "r.json", "--locked", "--force")
    assert result.exit_code == 1 and "differs: small, input of step 2, merge," in result.stdout
    assert not Path("merged").exists()


GOOD, PATH = f"sha256:{64 * '0'}", ("steps", 0, "inputs", "adapter")
DAMAGED: dict[str, tuple[tuple[Any, ...], Any, str]] = {  # where in the lock, what is put there, what the error says
    "an unknown key": (("date",), "2026", "the lock has no 'date'"),
    "an empty key": (("",), 1, "the lock has no ''"),
    "no steps": (("steps",), None, "steps is not a list of 3"),
    "a step more": (("steps",), [{}, {}, {}, {}], "steps is not a list of 3"),
    "many steps": (("steps",), [0] * 10**6, "steps is not a list of 3"),
    "a step of another kind": (("steps", 0), 7, "step 1 is not a mapping"),
    "another command": (("steps", 0, "command"), "merge", "step 1 is 'merge', not resize"),
    "another version": (("lock",), 2, "is a lock of version 2"),
    "a version that is true": (("lock",), True, "is a lock of version True"),
    "another arithmetic": (("arithmetic",), 999, "was written with arithmetic 999"),
    "arithmetic as a text": (("arithmetic",), "2", "arithmetic is not a number"),
    "a large number": (("arithmetic",), 10**19, f"was written with arithmetic {10**19}"),
    "another recipe": (("recipe",), GOOD, "is the lock of another recipe"),
    "another algorithm": ((*PATH, "digest"), "md5:" + 32 * "0", "'digest' of adapter in inputs of step 1"),
    "a number for a digest": ((*PATH, "digest"), 1e300, "is 1e+300"),
    "a digest in capitals": ((*PATH, "digest"), GOOD.replace("0", "A"), "'digest' of adapter"),
    "two digests": ((*PATH, "file"), GOOD, "has not one digest"),
    "none": (PATH, {}, "is not a mapping of digests"),
    "a revision alone": (PATH, {"revision": 40 * "0"}, "has not one digest"),
    "a revision that leads away": ((*PATH, "revision"), "../../etc", "'revision' of adapter"),
    "a path that the recipe has not": (("steps", 0, "inputs", "../x"), {"digest": GOOD}, "has no '../x'"),
    "a name with a line break": (("steps", 0, "outputs", "a\nerror: b"), {"digest": GOOD}, r"has no 'a\nerror: b'"),
    "a list for inputs": (("steps", 0, "inputs"), [], "inputs of step 1 is not a mapping"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_lock_is_one_error_before_any_work(case: str, copy: Path) -> None:
    keys, value, message = DAMAGED[case]
    lock = inner = json.loads(Path("r.lock.json").read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    Path("r.lock.json").write_text(json.dumps(lock))
    shutil.rmtree("small")
    result = run("run", "r.json", "--locked", "--force")
    assert (result.exit_code, result.stdout) == (3, "") and message in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: r.lock.json: ") and lines[1].startswith("hint: ")
    assert not Path("small").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"lock": ' + 5000 * "9" + "}", "too large a number"),
        ('{"lock": NaN}', "NaN is not a number"),
        ('{"lock": 1, "lock": 1}', "occurs twice"),
        ("[]", "is not a mapping"),
        ("{}", "the lock lacks 'arithmetic'"),
        (None, "no such file or folder"),
    ],
)
def test_a_text_that_is_no_lock(text: str | None, message: str, copy: Path) -> None:
    if text is None:
        Path("r.lock.json").unlink()
    else:
        Path("r.lock.json").write_text(text)
    result = run("run", "r.json", "--locked", "--dry-run")
    assert result.exit_code == 3 and message in result.stderr and "error: r.lock.json: " in result.stderr


def test_a_lock_has_a_limit(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LARGEST", 100)
    result = run("run", "r.json", "--locked", "--dry-run")
    assert result.exit_code == 3 and "is larger than 100 bytes, so it is not a lock" in result.stderr


def test_a_lock_is_of_a_meaning_not_of_a_text(place: Path) -> None:
    merge = {"command": "merge", "base": "base", "adapters": "adapter", "out": "out"}
    same = [{"steps": [merge]}, {**merge, "adapters": [{"path": "adapter", "weight": 1.0}]}, {**merge, "dtype": "keep"}]
    other = [
        {**merge, "out": "out2"},
        {**merge, "adapters": {"path": "adapter", "weight": 2}},
        {**merge, "dtype": "bf16"},
    ]
    meaning = meaning_of(plan_steps(merge))
    assert {meaning_of(plan_steps(each, force)) for each in same for force in (False, True)} == {meaning}
    assert meaning not in {meaning_of(plan_steps(each)) for each in other}


def test_calls_that_contradict_themselves(place: Path) -> None:
    recipe = write(CONVERT)
    for options, message in (
        (("--lock", "--locked"), "exclude each other"),
        (("--lock", "--dry-run"), "a dry run writes no lock"),
    ):
        result = run("run", recipe, *options)
        assert result.exit_code == 2 and message in result.stderr
    with pytest.raises(UsageError, match="exclude each other"):
        loratool.run(recipe, lock=True, locked=True)
    result = run("resize", "adapter", "--rank", 2, "-o", "out", "--lock")
    assert result.exit_code == 2 and "--lock needs --save-recipe" in result.stderr and not Path("out").exists()


def test_what_is_at_the_place_of_a_lock_stays(place: Path) -> None:
    """A lock without --force, and any other file in any case."""
    recipe = write(CONVERT)
    assert run("run", recipe, "--lock").exit_code == 0
    shutil.rmtree("plain")
    result = run("run", recipe, "--lock")
    assert result.exit_code == 4 and "r.lock.json: exists already" in result.stderr and not Path("plain").exists()
    lock_path(recipe).write_text('{"model_type": "llama"}')
    for call in (("run", recipe), ("convert", "adapter", "-o", "plain", "--save-recipe", "r.yaml")):
        result = run(*call, "--lock", "--force")
        assert result.exit_code == 2 and "is not a lock, so it is not replaced" in result.stderr
        assert not Path("plain").exists()


def test_no_lock_of_a_run_that_a_check_or_a_fault_stopped(place: Path) -> None:
    no = {"command": "verify", "base": "base", "adapters": "adapter", "merged": "base"}
    assert run("run", write({"steps": [CONVERT, no]}), "--lock").exit_code == 1
    fault = {"command": "merge", "base": "base", "adapters": "adapter", "out": "out", "target": "nothing_so"}
    assert run("run", write({"steps": [CONVERT, fault]}), "--lock", "--force").exit_code == 3
    assert not Path("r.lock.json").exists()


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_call_saves_its_recipe_and_the_lock_at_once(ending: str, place: Path) -> None:
    call = ("merge", "base", "adapter:0.5", "--no-undo", "-o", "out", "--save-recipe", f"r.{ending}", "--lock")
    assert run(*call).exit_code == 0
    saved = Path("r.lock.json").read_bytes()
    assert run("run", f"r.{ending}", "--locked", "--force").exit_code == 0
    assert run("run", f"r.{ending}", "--lock", "--force").exit_code == 0
    assert Path("r.lock.json").read_bytes() == saved


def test_files_that_are_no_weights_count_by_their_bytes(place: Path) -> None:
    """A tokenizer's folder and an undo file; a config alone has no digest."""
    Path("words").mkdir()
    Path("words", "tokenizer.json").write_text("{}")
    Path("words", "other.txt").write_text("not of a tokenizer")
    merge = {"command": "merge", "base": "base", "adapters": "adapter", "out": "out", "tokenizer": "words"}
    back = {"command": "unmerge", "merged": "out", "adapters": "adapter", "undo": "out/loratool.undo", "out": "back"}
    Path("alone").mkdir()
    shutil.copy("base/config.json", "alone")
    served = {"command": "convert", "source": "adapter", "base": "alone", "to": "gguf", "out": "served.gguf"}
    recipe = write({"steps": [merge, back, served]})
    assert run("run", recipe, "--lock").exit_code == 0
    steps = json.loads(Path("r.lock.json").read_text())["steps"]
    assert [*steps[0]["inputs"]["words"]] == ["files"] and [*steps[1]["inputs"]["out/loratool.undo"]] == ["file"]
    assert [*steps[2]["inputs"]["alone"]] == ["config"]
    assert steps[1]["outputs"]["back"]["digest"] == steps[0]["inputs"]["base"]["digest"]
    Path("words", "other.txt").write_text("changed")
    assert run("run", recipe, "--locked", "--dry-run", "--force").exit_code == 0
    Path("words", "tokenizer.json").write_text('{"a": 1}')
    result = run("run", recipe, "--locked", "--dry-run", "--force")
    assert result.exit_code == 1 and "words, input of step 1, merge," in result.stdout


def test_a_name_on_the_hub_is_pinned_to_its_commit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    own, commits = place / "cache" / "models--org--base", [f"{number}" * 40 for number in (1, 2)]
    for commit in commits:
        shutil.copytree("base", own / "snapshots" / commit)
    (own / "refs").mkdir()
    (own / "refs" / "main").write_text(commits[0])
    recipe = write({"command": "merge", "base": "org/base", "adapters": "adapter", "out": "out"})
    assert run("run", recipe, "--lock").exit_code == 0
    (step,) = json.loads(Path("r.lock.json").read_text())["steps"]
    assert step["inputs"]["org/base"]["revision"] == commits[0] and "revision" not in step["inputs"]["adapter"]
    assert run("run", recipe, "--locked", "--force").exit_code == 0
    (own / "refs" / "main").write_text(commits[1])
    result = run("run", recipe, "--locked", "--force")
    assert result.exit_code == 1 and "commit 111111111111, found 222222222222" in result.stdout
    Path("org").mkdir()
    Path("base").rename("org/base")  # a path of that name, with the same weights
    result = run("run", recipe, "--locked", "--force")
    assert result.exit_code == 1 and "commit 111111111111, found none" in result.stdout


def test_patches_are_locked_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    monkeypatch.chdir(tmp_path)
    steps = [
        {"command": "patch", "base": str(base), "tuned": str(tuned), "out": "tuned.patch"},
        {"command": "apply", "base": str(base), "patches": ["tuned.patch"], "out": "made"},
    ]
    Path("recipe.json").write_text(json.dumps({"steps": steps}))
    assert run("run", "recipe.json", "--lock").exit_code == 0
    assert run("run", "recipe.json", "--locked", "--force").exit_code == 0
    assert run("patch", base, tuned, "-o", "again.patch", "--save-recipe", "again.json").exit_code == 0
    made = Path("again.patch").read_bytes()
    assert run("run", "again.json", "--force").exit_code == 0 and Path("again.patch").read_bytes() == made
    lock = json.loads(Path("recipe.lock.json").read_text())
    assert f"sha256:{hashlib.sha256(made).hexdigest()}" in json.dumps(lock)
