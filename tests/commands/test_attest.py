"""Write statements about outputs, and hold them against the files: what they name, and who is believed."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, run_command, weights, write_model, write_peft
from lib.files.signatures import in_envelope, sha256_of

import loratool
from loratool.errors import InputError, NeedsFlag, UsageError

Statement = dict[str, Any]

MODULES = {f"model.layers.{i}.self_attn.{name}_proj": (8, 6) for i in range(2) for name in "qk"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two shards, two adapters, and a merge with its statement."""
    folder = tmp_path_factory.mktemp("attest")
    tensors = {
        f"{name}.weight": weights(*MODULES[name], seed=i, dtype=torch.bfloat16) for i, name in enumerate(MODULES)
    }
    write_model(folder / "base", tensors, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, shards=2)
    for i, name in enumerate(("style", "task")):
        write_peft(folder / name, {module: factors(8, 6, 2, seed=i + 9) for module in MODULES})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        merge("merged", attest="m.json")
    return folder


def merge(out: str, **options: Any) -> Any:
    return loratool.merge("base", [("style", 0.7), "task"], out, dtype="fp32", exclude="k_proj", undo=False, **options)


@pytest.fixture
def here(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stage as working folder."""
    shutil.copytree(stage, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def read(path: str | Path) -> Statement:
    value: Statement = json.loads(Path(path).read_text())
    return value


def subjects(statement: Statement) -> dict[str, str]:
    return {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}


def contents(folder: Path) -> dict[str, str]:
    return {each.relative_to(folder).as_posix(): sha256_of(each) for each in folder.rglob("*") if each.is_file()}


def digest(path: str) -> str:
    (found,) = [loratool.inspect(path, digest=True).digest]  # type: ignore[union-attr]
    assert found
    return found


def test_a_statement_names_the_files_the_inputs_and_the_call(here: Path) -> None:
    statement = read("m.json")
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert subjects(statement) == contents(here / "merged") and "README.md" in subjects(statement)
    build, run = (statement["predicate"][key] for key in ("buildDefinition", "runDetails"))
    assert build["externalParameters"] == {
        "command": "merge",
        "base": "base",
        "adapters": [{"path": "style", "weight": 0.7}, "task"],
        "out": "merged",
        "dtype": "fp32",
        "exclude": ["k_proj"],
        "no-undo": True,
    }
    base, *adapters = build["resolvedDependencies"]
    assert base == {"name": "base", "uri": "base", "digest": {"loratoolModel": digest("base")}}
    for name, entry in zip(("style", "task"), adapters, strict=True):
        file = sha256_of(here / name / "adapter_model.safetensors")
        assert entry == {
            "name": "adapter",
            "uri": name,
            "digest": {
                "sha256": file,
                "loratoolModel": digest(name),
                "loratoolConfig": sha256_of(here / name / "adapter_config.json"),
            },
        }
    assert build["internalParameters"]["arithmetic"] and run["builder"]["id"] == "urn:loratool"


def test_it_has_nothing_of_the_machine_or_the_day(here: Path) -> None:
    before = Path("m.json").read_bytes()
    for at in (1, 2):
        os.utime("base/config.json", (at, at))
        merge("merged", attest="m.json", force=True, device="cpu", workers=at)
        assert Path("m.json").read_bytes() == before
    merge("elsewhere", attest="other.json")
    assert subjects(read("other.json")) == subjects(read("m.json"))


CALLS = {
    "unmerge": ("unmerge whole task -o out", {"merged": "whole", "adapter": "task", "undo": "whole/loratool.undo"}),
    "extract": ("extract base merged --rank 2 -o out", {"base": "base", "tuned": "merged"}),
    "convert": ("convert task --to peft --dtype fp16 -o out.safetensors", {"source": "task"}),
    "convert for": ("convert task --to mlx --base config -o out", {"source": "task", "base": "config"}),
    "convert model": ("convert base --to torch -o out", {"source": "base"}),
    "convert metadata": ("convert task --set a=b -o out.safetensors", {"source": "task"}),
    "merge to a file": ("merge b.safetensors task -o out.safetensors", {"base": "b.safetensors", "adapter": "task"}),
    "verify": ("verify base task whole", {"base": "base", "adapter": "task"}),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_every_command_states_its_inputs_and_outputs(call: str, here: Path) -> None:
    argv, inputs = CALLS[call]
    loratool.merge("base", "task", "whole")
    loratool.convert_model("base", "b.safetensors")
    Path("config").mkdir()
    shutil.copy("base/config.json", "config")
    done = run_command(*argv.split(), "--attest", "s.intoto.json", "-q")
    assert done.exit_code == 0, done.stderr
    statement = read("s.intoto.json")
    build = statement["predicate"]["buildDefinition"]
    assert build["externalParameters"]["command"] == argv.split()[0]
    assert {each["name"]: each["uri"] for each in build["resolvedDependencies"]} == inputs
    assert all(each["digest"] for each in build["resolvedDependencies"])
    out = argv.split()[-1]
    if call == "verify":  # which proves weights alone
        assert subjects(statement) == {n: sha for n, sha in contents(here / out).items() if n.endswith(".safetensors")}
    elif Path(out).is_dir():
        assert subjects(statement) == contents(here / out)
    else:
        files = [each for each in (out, "out.undo") if Path(each).exists()]
        assert subjects(statement) == {name: sha256_of(here / name) for name in files}
        assert len(files) == 1 + (call == "merge to a file")


@pytest.mark.parametrize(
    ("place", "options", "error", "says"),
    [
        ("s.txt", {}, UsageError, "ends in .json"),
        ("no/s.json", {}, UsageError, "no such folder"),
        ("s.json", {"dry_run": True}, UsageError, "a dry run writes no statement"),
        ("m.json", {}, NeedsFlag, "exists already"),
        ("base/config.json", {"force": True}, UsageError, "is not a statement, so it is not replaced"),
        ("out/s.json", {}, UsageError, "no such folder"),
        ("merged/s.json", {"out": "merged", "force": True}, UsageError, "is in the output merged"),
    ],
)
def test_a_place_for_a_statement_is_checked_first(
    place: str, options: dict[str, Any], error: type[Exception], says: str, here: Path
) -> None:
    before = contents(here)
    with pytest.raises(error, match=says):
        loratool.merge("base", "task", **{"out": "out", **options}, attest=place)
    assert contents(here) == before


def test_a_recipe_and_a_statement_are_two_files(here: Path) -> None:
    call = "merge base task -o out --attest s.json --save-recipe ./s.json"
    no = run_command(*call.split())
    assert no.exit_code == 2 and "is the path of the recipe too" in no.stderr and not Path("out").exists()


def test_a_no_states_nothing(here: Path) -> None:
    wrong = run_command("verify", "base", "style", "merged", "--attest", "v.json")
    assert wrong.exit_code == 1 and not Path("v.json").exists()
    with pytest.raises(InputError):
        loratool.merge("base", "absent", "out", attest="v.json")
    assert not Path("v.json").exists()


def test_a_recipe_can_have_one(here: Path) -> None:
    Path("r.json").write_text(
        '{"command": "merge", "base": "base", "adapters": "task", "out": "o", "attest": "s.json"}'
    )
    assert loratool.run("r.json", dry_run=True).steps[0].state == "planned"
    assert not Path("s.json").exists()
    loratool.run("r.json")
    first = Path("s.json").read_bytes()
    with pytest.raises(NeedsFlag):
        loratool.run("r.json")
    loratool.run("r.json", force=True)
    assert Path("s.json").read_bytes() == first


def verified(*argv: object) -> Any:
    return run_command("verify", "--attestation", *argv)


def test_a_statement_is_proven_here_and_elsewhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = verified("m.json")
    assert done.exit_code == 0 and "as stated: 5 files and 3 inputs" in done.stdout and "proven: " in done.stdout
    assert "base + style:0.7 + task = merged" in done.stdout
    loratool.verify("base", [("style", 0.7), "task"], "merged", exclude="k_proj", attest="v.json").check()
    loratool.verify_attestation("v.json").check()
    for path in ("base", "style", "task", "merged"):
        Path(path).rename(f"{path}-moved")
    moved = [f"{path}-moved" for path in ("base", "style", "task", "merged")]
    gone = verified("m.json")
    assert gone.exit_code == 3 and "names 'base' as base: no such file or folder" in gone.stderr
    monkeypatch.chdir(here.parent)
    assert verified("here/m.json", *(here / each for each in moved)).exit_code == 0
    report = loratool.verify_attestation(
        here / "m.json", base=here / moved[0], adapters=[here / moved[1], here / moved[2]], merged=here / moved[3]
    )
    assert report.ok and report.proof is not None and report.proof.status == "proven" and not report.differences


def test_an_expression_of_a_statement_is_taken(here: Path) -> None:
    options = {"target": [r"re:layers\.\d+\..*q_proj$"], "undo": False}
    loratool.merge("base", ("task", 1.0, {r"re:layers\.1\..*": 0.5}), "out", attest="s.json", **options)
    assert loratool.verify_attestation("s.json").ok


def test_an_initial_adapter_is_an_input(here: Path) -> None:
    loratool.merge("base", "task", "out", initial="style", attest="s.json", undo=False)
    assert loratool.verify_attestation("s.json").ok
    Path("style").rename("moved")
    assert verified("s.json").exit_code == 3
    assert verified("s.json", "--initial", "moved").exit_code == 0
    edit("moved/adapter_model.safetensors")
    no = verified("s.json", "--initial", "moved")
    assert no.exit_code == 1 and "initial moved has sha256" in no.stdout


def test_a_tokenizer_is_not_needed(here: Path) -> None:
    Path("tokenizer").mkdir()
    Path("tokenizer/tokenizer.json").write_text("{}")
    loratool.merge("base", "task", "out", tokenizer="tokenizer", attest="s.json", undo=False)
    shutil.rmtree("tokenizer")
    assert loratool.verify_attestation("s.json").inputs == 2


def test_a_signed_envelope_holds_a_statement(here: Path) -> None:
    bundle = in_envelope(read("m.json"))
    for each in (bundle, bundle["dsseEnvelope"]):
        Path("bundle.json").write_text(json.dumps(each))
        assert loratool.verify_attestation("bundle.json").ok


def edit(path: str, offset: int = -1) -> None:
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= 1
    Path(path).write_bytes(data)


SHARD = "model-00001-of-00002.safetensors"

EDITS: dict[str, tuple[Callable[[], object], str]] = {
    "a weight": (lambda: edit(f"merged/{SHARD}"), f"{SHARD} has sha256"),
    "a config": (lambda: edit("merged/config.json", 2), "config.json has sha256"),
    "a config that is none": (lambda: Path("merged/config.json").write_text("{"), "config.json has sha256"),
    "a file is gone": (lambda: Path("merged/README.md").unlink(), "README.md is missing"),
    "weights beside": (lambda: shutil.copy("merged/config.json", "merged/pytorch_model.bin"), "model.bin is of"),
    "an adapter beside": (lambda: shutil.copy("task/adapter_config.json", "merged"), "adapter_config.json is of"),
    "the base": (lambda: edit(f"base/{SHARD}"), "base base has sha256"),
    "an adapter": (lambda: edit("task/adapter_model.safetensors"), "adapter task has sha256"),
    "adapters in another order": (lambda: swap("style", "task"), "adapter style has sha256"),
    "an adapter's config": (
        lambda: Path("task/adapter_config.json").write_text(
            Path("task/adapter_config.json").read_text().replace('"lora_alpha": 2', '"lora_alpha": 4')
        ),
        "config of adapter task has sha256",
    ),
    "an adapter's config is gone": (lambda: Path("task/adapter_config.json").unlink(), "config of adapter task has no"),
}  # fmt: skip


def swap(a: str, b: str) -> None:
    Path(a).rename("c")
    Path(b).rename(a)
    Path("c").rename(b)


@pytest.mark.parametrize("what", EDITS)
def test_what_was_edited_is_named(what: str, here: Path) -> None:
    change, says = EDITS[what]
    change()
    before = contents(here)
    no = verified("m.json")
    assert no.exit_code == 1 and says in no.stdout, no.stdout + no.stderr
    assert no.stdout.splitlines()[-1].startswith("not as stated: ") and contents(here) == before
    assert json.loads(verified("m.json", "--json").stdout)["ok"] is False


def of(*keys: Any) -> Callable[[Statement, Any], None]:
    """A function that sets a value in a statement."""

    def put(statement: Statement, value: Any) -> None:
        place: Any = statement
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return put


BUILD = ("predicate", "buildDefinition")
RECIPE = (*BUILD, "externalParameters")
DEPENDENCY = (*BUILD, "resolvedDependencies", 0)

# what a lie in a recipe leads to: a merge that is none
LIES = {
    "a weight": (of(*RECIPE, "adapters"), [{"path": "style", "weight": 0.5}, "task"], "wrong: "),
    "another scope": (of(*RECIPE, "exclude"), ["q_proj"], "wrong: "),
    "a dtype": (of(*RECIPE, "dtype"), "bf16", "q_proj.weight is F32, and BF16 is stated"),
    "a file less": (
        lambda s, n: s["subject"].pop(n),
        2,
        "is of weights or an adapter, and the statement does not name it",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(lie: str, here: Path) -> None:
    put, value, says = LIES[lie]
    statement = read("m.json")
    put(statement, value)
    Path("m.json").write_text(json.dumps(statement))
    no = verified("m.json")
    assert no.exit_code == 1 and says in no.stdout, no.stdout + no.stderr


SUBJECT = of("subject", 0, "name")
FORGED: dict[str, tuple[Callable[[Statement, Any], None], Any]] = {
    **{
        f"a name {name!r}": (SUBJECT, name)
        for name in (
            *("../base/config.json", "/etc/hostname", "a/../../base/config.json", "a\0b", "a//b", "./config.json", ""),
            *("a\\b", "line\nbreak", "x/", ".", "..", "\x1b[31m", "README.md/..", 7, None, {}),
        )
    },
    "a name of another": (SUBJECT, "config.json"),
    "no subject": (of("subject"), []),
    "subjects as text": (of("subject"), "README.md"),
    "another algorithm": (of("subject", 0, "digest"), {"sha512": "0" * 128}),
    "no digest": (of("subject", 0, "digest"), {}),
    "a short digest": (of("subject", 0, "digest"), {"sha256": "0" * 63}),
    "a digest in capitals": (of("subject", 0, "digest"), {"sha256": "A" * 64}),
    "a number as digest": (of("subject", 0, "digest"), {"sha256": 10**70}),
    "another type": (of("_type"), "https://in-toto.io/Statement/v0.1"),
    "another predicate": (of("predicateType"), "https://slsa.dev/provenance/v0.2"),
    "no predicate": (of("predicate"), None),
    "another build": (of(*BUILD, "buildType"), "https://example.com/build"),
    "no build": (of(*BUILD), 3),
    "another arithmetic": (of(*BUILD, "internalParameters", "arithmetic"), 1),
    "arithmetic as text": (of(*BUILD, "internalParameters"), {"arithmetic": True}),
    "no recipe": (of(*RECIPE), []),
    "another command": (of(*RECIPE, "command"), "extract"),
    "an unknown word": (of(*RECIPE, "shell"), "rm -rf /"),
    "a word of the machine": (of(*RECIPE, "force"), True),
    "an output as adapter": (of(*RECIPE, "adapters"), {"path": 3}),
    "a huge weight": (of(*RECIPE, "adapters"), [{"path": "style", "weight": 10**400}, "task"]),
    "a huge alpha": (of(*RECIPE, "alpha"), 10**400),
    "a base that is nowhere": (of(*RECIPE, "base"), "org/absent"),
    "a base with NUL": (of(*RECIPE, "base"), "a\0b"),
    "a pipe as base": (of(*RECIPE, "base"), "/dev/null"),
    "an expression without end": (of(*RECIPE, "target"), ["re:(q+)+!"]),
    "one of many repeats": (of(*RECIPE, "target"), ["re:" + 9 * "q*" + "!"]),
    "one that refers back": (of(*RECIPE, "target"), [r"re:(q)\1"]),
    "no expression": (of(*RECIPE, "exclude"), ["re:("]),
    "no dependencies": (of(*BUILD, "resolvedDependencies"), []),
    "dependencies of others": (of(*DEPENDENCY, "name"), "tuned"),
    "another dependency's digest": (of(*DEPENDENCY, "digest"), {"gitCommit": "0" * 40}),
    "a dependency's short digest": (of(*DEPENDENCY, "digest"), {"loratoolModel": "00"}),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_statement_is_refused_in_a_line(what: str, here: Path) -> None:
    put, value = FORGED[what]
    statement = copy.deepcopy(read("m.json"))
    put(statement, value)
    Path("m.json").write_text(json.dumps(statement))
    refused(here)


def refused(here: Path) -> str:
    before = contents(here)
    no = verified("m.json")
    assert no.exit_code == 3, no.stdout + no.stderr
    first, *others = no.stderr.splitlines()
    assert first.startswith("error: ") and len(first) < 400 and all(each.startswith("hint: ") for each in others)
    assert not no.stdout and contents(here) == before
    return first


RAW: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b'{"a":' * 100_000,
    "not finite": b'{"_type": 1e999}',
    "a long number": b'{"_type": ' + b"9" * 100_000 + b"}",
    "a key twice": b'{"_type": 1, "_type": 2}',
    "half a character": b'{"_type": "\\ud800"}',
    "an envelope of nothing": b'{"payloadType": "application/vnd.in-toto+json", "payload": "!"}',
    "an envelope of another": b'{"payloadType": "text/plain", "payload": "e30="}',
    "a bundle as text": b'{"dsseEnvelope": "x"}',
}


@pytest.mark.parametrize("what", RAW)
def test_a_damaged_statement_is_refused_in_a_line(what: str, here: Path) -> None:
    Path("m.json").write_bytes(RAW[what])
    refused(here)


def test_a_million_subjects_are_not_read(here: Path) -> None:
    statement = read("m.json")
    more = [{"name": f"{i}", "digest": {"sha256": "0" * 64}} for i in range(20_000)]
    Path("m.json").write_text(json.dumps({**statement, "subject": more}))
    assert "names 20,000 files; at most 10,000 are read" in refused(here)
    with open("m.json", "r+b") as file:
        file.truncate(100_000_000)
    assert "is 100 MB; a statement has at most 8.39 MB" in run_command("verify", "--attestation", "m.json").stderr


@pytest.mark.parametrize("name", ["README.md", "inner/README.md"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, here: Path) -> None:
    Path("secret").mkdir()
    shutil.move("merged/README.md", "secret/README.md")
    if name == "README.md":
        Path("merged/README.md").symlink_to("../secret/README.md")
    else:
        Path("merged/inner").symlink_to("../secret")
        statement = read("m.json")
        statement["subject"][0]["name"] = name
        Path("m.json").write_text(json.dumps(statement))
    assert "which is a link out of merged" in refused(here)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("merged", "needs BASE, ADAPTER and MERGED, or none of them"),
        ("base style:0.7 task merged", "has a weight, which is the statement's"),
        ("base style merged", "is about 2 adapters, and 1 are given"),
        ("--target q_proj", "--target does not go with --attestation"),
        ("--initial task", "--initial: the statement has no initial adapter"),
        ("--residual-base", "--residual-base does not go with --attestation"),
        ("--attest x.json", "--attest does not go with --attestation"),
    ],
)
def test_a_call_that_contradicts_the_statement(argv: str, says: str, here: Path) -> None:
    no = verified("m.json", *argv.split())
    assert no.exit_code == 2 and says in no.stderr


def put_into_cache(folder: Path, name: str, source: str) -> None:
    repository = folder / f"models--org--{name}"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot = repository / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    for file in Path(source).iterdir():
        blob = repository / "blobs" / sha256_of(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")


def test_names_of_the_hub_are_pinned_and_not_fetched(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "hub"))
    for name, source in (("base", "base"), ("style", "task")):
        put_into_cache(here / "hub", name, source)
    loratool.merge("org/base", "hf://org/style@main", "out", attest="s.json")
    base, adapter = read("s.json")["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert (base["uri"], adapter["uri"]) == (f"hf://org/base@{'1' * 40}", f"hf://org/style@{'1' * 40}")
    assert base["annotations"] == {"hubCommit": "1" * 40}
    assert adapter["annotations"] == {"hubCommit": "1" * 40, "hubRevision": "main"}
    report = loratool.verify_attestation("s.json")
    assert report.ok and report.base.endswith(f"models--org--base/snapshots/{'1' * 40}")
    loratool.verify("org/base", "org/style", "out", attest="v.json", target="q_proj,k_proj").check()
    put_into_cache(here / "hub", "merged", "out")
    loratool.verify("org/base", "org/style", "org/merged", attest="v.json", force=True).check()
    assert loratool.verify_attestation("v.json").ok  # whose files are links into the cache
    shutil.rmtree(here / "hub" / "models--org--base")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # were it asked, this would be exit code 5
    no = verified("s.json")
    assert no.exit_code == 3 and "names 'org/base' as base: no such file or folder" in no.stderr
