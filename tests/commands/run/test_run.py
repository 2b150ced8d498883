"""Recipes: what is read, what is refused before the first byte, and that a run makes what the commands make."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FIXTURES
from conftest import run_command as run_in_process
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import loratool
from loratool.cli import COMMANDS as verbs
from loratool.cli.schemas.recipe import make_recipe
from loratool.commands.run.read import read_recipe
from loratool.commands.run.steps import COMMANDS, arguments_by_word, function_for, plan_steps
from loratool.commands.run.write import encode, recipe_of
from loratool.errors import InputError, LoratoolError, MachineError, NeedsFlag, UsageError

BASE, ADAPTER, TUNED = (str(FIXTURES / "llama" / name) for name in ("base", "adapter", "tuned"))
Write = Callable[[object], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe; `{tmp}` in it is the test's folder."""

    def write(recipe: object) -> Path:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(recipe).replace("{tmp}", str(tmp_path)))
        return path

    return write


def run_command(*words: object) -> tuple[int, str, str]:
    result = run_in_process(*words)
    return result.exit_code, result.stdout, result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


MERGE = {"command": "merge", "base": BASE, "adapters": ADAPTER, "out": "{tmp}/out"}


def read(tmp_path: Path, text: str | bytes, ending: str = ".yaml") -> dict[str, Any]:
    path = tmp_path / f"recipe{ending}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path)


@pytest.mark.parametrize("name", verbs)
def test_a_recipe_that_is_saved_can_be_run(name: str) -> None:
    command = getattr(import_module(f"loratool.cli.{name}"), name)
    saves = any("--save-recipe" in each.opts for each in command.params)
    assert name in COMMANDS or not saves, f"{name} has --save-recipe and no row of COMMANDS in commands/run/steps.py"


def test_yaml_is_read_as_version_1_2(tmp_path: Path) -> None:
    text = "a: no\nb: 1e-3\nc: 0-15\nd: 2024-01-01\ne: 010\nf: ~\ng:\nh: true\ni: 1:30\nj: -.5\n"
    text += "k: 1_0\nl: &x {m: on}\nn: *x\n"
    assert read(tmp_path, "\ufeff" + text) == {
        **{
            "a": "no",
            "b": 0.001,
            "c": "0-15",
            "d": "2024-01-01",
            "e": 10,
            "f": None,
            "g": None,
            "h": True,
            "i": "1:30",
        },
        **{"j": -0.5, "k": "1_0", "l": {"m": "on"}, "n": {"m": "on"}},
    }


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(10 * [f'*{a}'])}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "ending", "message"),
    [
        ("a: 1\na: 2\n", ".yaml", "the key 'a' occurs twice"),
        ("1: 2\n", ".yaml", "the key 1 is not a string"),
        ("? [a]\n: 1\n", ".yaml", "is not a string"),
        ("a: &x [*x]\n", ".yaml", "an alias contains itself"),
        (BOMB, ".yaml", "more than 10,000 values"),
        ("[" + "x," * 500_000 + "]", ".yaml", "more than 10,000 values"),
        ("[" * 5000, ".yaml", "nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]\n", ".yaml", "is not supported in a recipe"),
        ("a: !!binary aGk=\n", ".yaml", "is not supported in a recipe"),
        ("a: 1\n---\nb: 1\n", ".yaml", "single document"),
        ("a: [\n", ".yml", "cannot be read"),
        ("a: \0\n", ".yaml", "cannot be read"),
        ("- 1\n", ".yaml", "is not a mapping"),
        ("", ".yaml", "is not a mapping"),
        (b"\xff", ".yaml", "cannot be read"),
        ("a: " + 30 * "9", ".yaml", "too large a number"),
        ('{"a": NaN}', ".json", "NaN is not a number"),
        ('{"a": 1, "a": 2}', ".json", "the key 'a' occurs twice"),
        ('{"a": ' + 5000 * "9" + "}", ".json", "too large a number"),
        ("[" * 100_000, ".json", "nested too deeply"),
        ("[1]", ".json", "is not a mapping"),
        (b" " * ((1 << 20) + 1), ".json", "bytes, so it is not a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str | bytes, ending: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, text, ending)
    assert message in str(error.value) and "recipe" in str(error.value.culprit)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ends in .yaml or .json"):
        read(tmp_path, "", ".txt")


def test_without_pyyaml_json_is_read_and_yaml_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert read(tmp_path, '{"a": 1}', ".json") == {"a": 1}
    for call in (lambda: read(tmp_path, "a: 1"), lambda: encode(tmp_path / "a.yaml", {})):
        with pytest.raises(MachineError, match="PyYAML") as error:
            call()
        assert error.value.remedy == "pip install '.[recipes]' in a clone of loratool"


@pytest.mark.parametrize("ending", [".yaml", ".json"])
def test_a_path_that_is_no_utf_8_is_written(ending: str, tmp_path: Path) -> None:
    path, recipe = tmp_path / f"recipe{ending}", {"base": "b\udcff", "out": "\N{SNOWMAN}"}
    path.write_bytes(encode(path, recipe))
    assert read_recipe(path) == recipe


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(recipe=st.dictionaries(st.text(), VALUES, max_size=4))
@pytest.mark.parametrize("ending", [".yaml", ".json"])
def test_what_is_written_is_read_as_it_was(
    ending: str, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"round{ending}"
    path.write_bytes(encode(path, recipe))
    assert read_recipe(path) == recipe
    if ending == ".yaml":  # what others read in it is the same, where YAML 1.1 has no meaning of its own for a text
        assert yaml.safe_load(path.read_text()).keys() == recipe.keys()


@pytest.mark.parametrize(
    ("recipe", "message", "remedy"),
    [
        ({}, "needs a command", None),
        ({"command": "merg"}, "merg: is not a command", "did you mean merge?"),
        ({"command": ["merge"]}, "is not a command", None),
        ({**MERGE, "max_shard_size": "5GB"}, "max_shard_size: is not a key of merge", "did you mean max-shard-size?"),
        ({**MERGE, "undo": False}, "undo: is not a key of merge", "did you mean no-undo?"),
        ({**MERGE, "dry-run": True}, "dry-run: is not a key of merge", None),
        ({**MERGE, "max-shard-size": "5XB"}, "max-shard-size: '5XB' is not a size", None),
        ({**MERGE, "no-undo": "yes"}, "no-undo: 'yes' is not true or false", None),
        ({**MERGE, "dtype": "fp7"}, "dtype: 'fp7' is none of keep", None),
        ({**MERGE, "tied": "maybe"}, "tied: 'maybe' is none of untie", None),
        ({**MERGE, "drop": ["extras", "x"]}, "drop: 'x' is none of", None),
        ({**MERGE, "layers": 3.5}, "layers: 3.5 is not", None),
        ({**MERGE, "adapters": []}, "no adapter given", None),
        (
            {**MERGE, "adapters": {"path": ADAPTER, "wight": 1}},
            "wight: is not a key of an adapter",
            "did you mean weight?",
        ),
        ({**MERGE, "adapters": {"weight": 1}}, "adapters: an adapter needs a path", None),
        ({**MERGE, "adapters": {"path": ADAPTER, "weight": "1"}}, "the weight '1' is not a number", None),
        ({**MERGE, "adapters": {"path": ADAPTER, "weights": 3}}, "is not an adapter", None),
        ({"command": "merge", "base": BASE, "out": "x"}, "needs adapters", None),
        ({**MERGE, "out": None}, "needs an output", "add out: PATH"),
        ({**MERGE, "out": None, "in-place": True}, "no step of a recipe", "write out: PATH"),
        ({"command": "merge", "base": BASE, "adapters": ADAPTER}, "needs an output", "add out: PATH"),
        ({"steps": []}, "steps: is not a list of steps", None),
        ({"steps": [1]}, "is not a mapping", None),
        ({"steps": [MERGE], "out": "x"}, "out: is beside steps", None),
        ({"steps": [MERGE, MERGE]}, "is already the output of step 1", None),
        (
            {**MERGE, "out": "{tmp}/no/out"},
            "there is no such folder",
            "make it first, or choose another output with out: PATH",
        ),
        ({**MERGE, "out": "."}, "names no file or folder of its own", "choose another output with out: PATH"),
        ({**MERGE, "out": BASE}, "is an input of this step, and would be overwritten", None),
        ({"c" * 5000: 1, **MERGE}, f"{60 * 'c'}: is not a key of merge", None),
        ({**MERGE, "adapters": {"path": ADAPTER, "weight": "1" * 5000}}, "the weight '111111111111...11", None),
        (
            {"steps": [{**MERGE, "base": "{tmp}/later"}, {"command": "convert", "source": BASE, "out": "{tmp}/later"}]},
            "is written by step 2, which runs later",
            None,
        ),
    ],
)
def test_a_wrong_recipe_is_refused(recipe: object, message: str, remedy: str | None, write: Write) -> None:
    path = write(recipe)
    with pytest.raises(UsageError) as error:
        loratool.run(path)
    assert message in str(error.value) and str(error.value.culprit).startswith(str(path))
    assert remedy is None or error.value.remedy == remedy
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_second_step_is_checked_before_the_first_writes(write: Write, tmp_path: Path) -> None:
    first = {"command": "convert", "source": BASE, "out": "{tmp}/first"}
    second = {**MERGE, "base": "{tmp}/first", "tied": "maybe"}
    with pytest.raises(UsageError, match="step 2, tied: 'maybe'"):
        loratool.run(write({"steps": [first, second]}))
    with pytest.raises(InputError, match="step 2, .*nowhere"):
        loratool.run(write({"steps": [first, {**MERGE, "adapters": "{tmp}/nowhere"}]}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(NeedsFlag, match="step 2, .*out: exists already") as error:
        loratool.run(write({"steps": [first, {**MERGE, "base": "{tmp}/first"}]}))
    assert "--force" in str(error.value.remedy)
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_no_step_overwrites_what_another_reads_or_writes(write: Write, tmp_path: Path, linked: bool) -> None:
    """With --force too: the recipe could not be run a second time, and the input is lost. A link is no other place."""
    (tmp_path / "link").symlink_to(tmp_path)
    there = tmp_path / "link" if linked else tmp_path
    loratool.resize(ADAPTER, tmp_path / "own", rank=4)
    before = contents(tmp_path / "own")
    first = {"command": "resize", "adapter": str(tmp_path / "own"), "rank": 2, "out": "{tmp}/first"}
    for out, message in (("own", "is an input of step 1"), ("first", "is already the output of step 1")):
        second = {"command": "resize", "adapter": ADAPTER, "rank": 2, "out": str(there / out)}
        with pytest.raises(UsageError, match=f"step 2, .*{out}: {message}"):
            loratool.run(write({"steps": [first, second]}), force=True)
    assert contents(tmp_path / "own") == before and not (tmp_path / "first").exists()
    second = {"command": "resize", "adapter": str(there / "first"), "rank": 1, "out": "{tmp}/second"}
    assert loratool.run(write({"steps": [first, second]})).steps[1].waits_for == (1,)


STEPS = [
    {"command": "resize", "adapter": ADAPTER, "rank": 4, "out": "{tmp}/small"},
    {
        "command": "merge",
        "base": BASE,
        "adapters": [{"path": "{tmp}/small", "weight": 0.5, "weights": {"mlp": 0}}, ADAPTER],
        "out": "{tmp}/out",
        "no-undo": True,
    },
    {
        "command": "verify",
        "base": BASE,
        "adapters": [{"path": "{tmp}/small", "weight": 0.5, "weights": {"mlp": 0}}, ADAPTER],
        "merged": "{tmp}/out",
    },
]


def test_steps_feed_each_other(write: Write, tmp_path: Path) -> None:
    recipe = write({"steps": STEPS})
    planned = loratool.run(recipe, dry_run=True)
    assert [step.state for step in planned.steps] == ["planned", "waits", "waits"]
    assert planned.steps[1].waits_for == (1,) and planned.steps[2].waits_for == (1, 2)
    assert not (tmp_path / "small").exists()
    report = loratool.run(recipe)
    assert [step.state for step in report.steps] == 3 * ["done"]
    again = loratool.run(recipe, dry_run=True)
    assert again.steps[0].report.exists and again.steps[1].exists and not again.steps[2].exists
    with pytest.raises(NeedsFlag, match="step 1, .*small: exists already"):
        loratool.run(recipe)
    assert report.steps[2].report.status == report.status.replace("done", "proven") == "proven"
    loratool.resize(ADAPTER, tmp_path / "by-hand", rank=4)
    assert contents(tmp_path / "by-hand") == contents(tmp_path / "small")
    adapters = [(tmp_path / "small", 0.5, {"mlp": 0}), ADAPTER]
    loratool.merge(BASE, adapters, tmp_path / "merged", undo=False)
    assert contents(tmp_path / "merged") == contents(tmp_path / "out")


def test_a_failure_says_what_is_kept_and_a_no_stops_the_run(write: Write, tmp_path: Path) -> None:
    wrong = {"command": "merge", "base": BASE, "adapters": "{tmp}/small", "out": "{tmp}/out", "target": "nothing_so"}
    with pytest.raises(LoratoolError, match=r"in step 2 of 2, merge; the outputs of earlier steps stay: .*small"):
        loratool.run(write({"steps": [STEPS[0], wrong]}))
    assert (tmp_path / "small").exists() and not (tmp_path / "out").exists()
    no = {"command": "verify", "base": BASE, "adapters": ADAPTER, "merged": BASE}
    report = loratool.run(write({"steps": [no, {**STEPS[0], "out": "{tmp}/never"}]}))
    assert report.status == "wrong" and len(report.steps) == 1 and report.total == 2
    assert not (tmp_path / "never").exists()
    code, out, _ = run_command("run", tmp_path / "recipe.json")
    assert code == 1 and out.rstrip().endswith("step 1 of 2, verify: wrong; 1 step not run")


CALLS = {
    "merge": f"{BASE} {ADAPTER}:0.5,mlp=0.25 {ADAPTER} --no-undo --target q_proj,v_proj --layers 0-1",
    "extract": f"{BASE} {TUNED} --rank 2 --embed skip --no-bias",
    "init": f"{BASE} --rank 2 --rank-pattern down_proj=4 --target q_proj,down_proj --seed 3",
    "resize": f"{ADAPTER} --rank-rule sv_fro=0.9 --max-rank 6 --dtype bf16",
    "combine": f"{ADAPTER}:0.5 {ADAPTER}:-1e-3 --method ties --density 0.5 --rank 4 --drop extras",
    "convert": f"{ADAPTER} --to peft --plain --exclude k_proj --rename q_proj=query",
}


@pytest.mark.parametrize("ending", ["yaml", "json"])
@pytest.mark.parametrize("command", CALLS)
def test_a_saved_recipe_makes_the_same_bytes(command: str, ending: str, tmp_path: Path) -> None:
    recipe = tmp_path / f"recipe.{ending}"
    code, _, err = run_command(command, *CALLS[command].split(), "-o", tmp_path / "out", "--save-recipe", recipe)
    assert code == 0, err
    saved = contents(tmp_path / "out")
    assert not list(Draft202012Validator(make_recipe()).iter_errors(read_recipe(recipe)))
    assert {} not in read_recipe(recipe).values()  # what was not given
    assert run_command("run", recipe)[0] == 4
    code, _, err = run_command("run", recipe, "--force", "--quiet")
    assert code == 0, err
    assert contents(tmp_path / "out") == saved


# as version 0.2.0 saved them, when one function of the library converted adapters, models and metadata
OF_ONE_FUNCTION = {
    "an adapter": ({"source": ADAPTER, "to": "peft", "plain": True}, loratool.ConvertReport),
    "for a runtime": ({"source": ADAPTER, "base": BASE, "for": "vllm"}, loratool.ConvertReport),
    "a model": ({"source": BASE, "dtype": "fp16", "max-shard-size": 100000}, loratool.CheckpointConvertReport),
    "metadata": (
        {"source": f"{ADAPTER}/adapter_model.safetensors", "set": {"modelspec.title": "Ink"}},
        loratool.MetadataReport,
    ),
}


@pytest.mark.parametrize("kind", OF_ONE_FUNCTION)
def test_a_recipe_of_one_convert_still_runs(kind: str, write: Write, tmp_path: Path) -> None:
    words, report = OF_ONE_FUNCTION[kind]
    out = "{tmp}/out.safetensors" if kind == "metadata" else "{tmp}/out"
    ran = loratool.run(write({"command": "convert", **words, "out": out}))
    assert isinstance(ran.steps[0].report, report) and ran.status == "done"
    assert Path(out.replace("{tmp}", str(tmp_path))).exists()


def test_a_saved_recipe_of_unmerge(tmp_path: Path) -> None:
    loratool.merge(BASE, ADAPTER, tmp_path / "merged")
    call = ("unmerge", tmp_path / "merged", ADAPTER, "-o", tmp_path / "out", "--save-recipe", tmp_path / "r.json")
    assert run_command(*call)[0] == 0
    wanted = {
        "command": "unmerge",
        "merged": str(tmp_path / "merged"),
        "adapters": [ADAPTER],
        "out": str(tmp_path / "out"),
    }
    assert json.loads((tmp_path / "r.json").read_text()) == wanted


def test_a_saved_recipe_has_no_token() -> None:
    link = "https://hf.co/org/{}?token=hf_secret"
    adapters = [(link.format("a"), 0.5), link.format("b")]
    recipe = recipe_of(loratool.merge, {"base": link.format("base"), "adapters": adapters}, "merged")
    assert recipe == {
        "command": "merge",
        "base": "hf://org/base",
        "adapters": [{"path": "hf://org/a", "weight": 0.5}, "hf://org/b"],
        "out": "merged",
    }


@pytest.mark.parametrize(
    ("name", "options", "code", "message"),
    [
        ("r.txt", (), 2, "ends in .yaml or .json"),
        ("no/r.yaml", (), 2, "there is no such folder"),
        ("r.yaml", ("--dry-run",), 2, "a dry run writes no recipe"),
        ("there.yaml", (), 4, "exists already"),
        ("config.json", ("--force",), 2, "is not a recipe, so it is not replaced"),
        (".", (), 2, "ends in .yaml or .json"),
    ],
)
def test_a_place_for_a_recipe_is_checked_first(
    name: str, options: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "there.yaml").write_text("command: resize")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    call = ("resize", ADAPTER, "--rank", "2", "-o", tmp_path / "out", "--save-recipe", tmp_path / name, *options)
    found, _, err = run_command(*call)
    assert (found, message in err) == (code, True), err
    assert not (tmp_path / "out").exists() and "llama" in (tmp_path / "config.json").read_text()


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    assert run_command("run", tmp_path / "r.json")[::2] == (3, f"error: {tmp_path}/r.json: no such file or folder\n")


def test_the_schema_takes_the_words_that_a_recipe_has(write: Write) -> None:
    schema = make_recipe()
    Draft202012Validator.check_schema(schema)
    for command in COMMANDS:
        words = arguments_by_word(function_for(command)).keys()
        assert schema["$defs"][command]["properties"].keys() - {"command"} == words
    valid = Draft202012Validator(schema)
    assert valid.is_valid(json.loads(write({"steps": STEPS}).read_text())) and valid.is_valid(MERGE)
    for wrong in (
        {"steps": []},
        {**MERGE, "x": 1},
        {**MERGE, "tied": "maybe"},
        {"command": "merge"},
        {"command": "count"},
    ):
        assert not valid.is_valid(wrong)


def test_json_has_the_report_of_every_step(write: Write) -> None:
    code, out, _ = run_command("run", write({"steps": STEPS}), "--json")
    value = json.loads(out)
    assert code == 0 and value["verb"] == "run"
    assert [step["command"] for step in value["report"]["steps"]] == ["resize", "merge", "verify"]
    assert value["report"]["steps"][2]["report"]["status"] == "proven"


ODD: list[Any] = [
    *(None, True, 0, -1, 3.5, 10**18, "", "x", "0-3", "re:(", "\0", "\ud800", 5000 * "a", ".", "/dev/null", "-"),
    *(
        [],
        [1],
        [None],
        [[]],
        {},
        {"a": 1},
        {"path": None},
        [{"path": "x", "weight": True}],
        [{"path": "x", "weights": 1}],
    ),
]


def test_only_errors_of_ours_leave_a_recipe(tmp_path: Path) -> None:
    choose, refused = random.Random(25), 0
    right = {"base": BASE, "tuned": TUNED, "merged": BASE, "source": BASE, "adapter": ADAPTER, "adapters": ADAPTER}
    right["out"] = str(tmp_path / "out")
    for _ in range(500):
        command = choose.choice([*COMMANDS])
        words = arguments_by_word(function_for(command))
        step: dict[str, Any] = {"command": command, **{word: right[word] for word in words if word in right}}
        step |= {choose.choice([*words, "zzz"]): choose.choice(ODD) for _ in range(2)}
        try:
            plan_steps({"steps": [step, choose.choice(ODD)]} if choose.random() < 0.3 else step)
        except LoratoolError:
            refused += 1
    assert refused > 300 and not [*tmp_path.iterdir()]
