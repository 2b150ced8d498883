"""schemas/: what `--json` prints, held by jsonschema against what `--json-schema` prints."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, run_command, weights, write_model, write_peft
from jsonschema import Draft202012Validator
from lib.files import ggml_blocks, gguf_bytes
from lib.files.signatures import write_signature
from lib.harness.interrupted import interrupted
from lib.harness.page_elements import PageElements
from lib.models.training_runs import write_zero
from safetensors.torch import load_file, save_file

import loratool
from loratool.cli import COMMANDS, schemas
from loratool.cli.as_json import to_json
from loratool.commands.report_files import REPORTS, report_classes
from loratool.errors import InputError, Interrupted, LoratoolError, MachineError, NeedsFlag, UsageError
from loratool.views.page.render import render
from loratool.views.parts.envelope import SCHEMA_VERSION, envelope

Run = Callable[..., Any]

LLAMA, GPT2, SDXL = FIXTURES / "llama", FIXTURES / "gpt2", FIXTURES / "sdxl"
# (arguments with {tmp}, the report's class, exit code); they run in this order in one folder
CALLS = """
merge {llama}/base {llama}/adapter -o {tmp}/merged                                            MergeReport 0
merge {llama}/base {llama}/adapter:0.5 {llama}/adapter:-1 -o {tmp}/two --no-undo --dtype fp32 MergeReport 0
merge {sdxl}/base.safetensors {sdxl}/adapter.safetensors:0.8,te=0.4 -o {tmp}/x.safetensors    MergeReport 0
merge {llama}/base {llama}/adapter -o {tmp}/dry --dry-run                                     MergeReport 0
merge {tmp}/odd {tmp}/kinds -o {tmp}/odd-merged                                               MergeReport 0
merge {llama}/fp8 {llama}/adapter -o {tmp}/mixed                                              MergeReport 0
merge {llama}/fp8 {llama}/adapter -o {tmp}/codes --quantized requantize                       MergeReport 0
merge {llama}/base {llama}/adapter -o {tmp}/like --like {llama}/fp8 --no-undo                 MergeReport 0
verify {llama}/fp8 {llama}/adapter {tmp}/like                                                 VerifyReport 1
merge {tmp}/m.gguf {tmp}/a.gguf -o {tmp}/merged.gguf                                          MergeReport 0
merge {tmp}/m.gguf {tmp}/a.gguf -o {tmp}/same.gguf --quantized requantize                     MergeReport 0
diff {tmp}/m.gguf {tmp}/merged.gguf                                                           CheckpointDiff 0
inspect {tmp}/m.gguf                                                                          CheckpointReport 0
verify {tmp}/m.gguf {tmp}/a.gguf {tmp}/same.gguf                                              VerifyReport 0
unmerge {tmp}/codes {llama}/adapter -o {tmp}/uncoded                                          UnmergeReport 0
diff {llama}/base {llama}/fp8                                                                 CheckpointDiff 0
inspect {llama}/fp8                                                                           CheckpointReport 0
convert {llama}/fp8 --dtype bf16 -o {tmp}/decoded                                             CheckpointConvertReport 0
unmerge {tmp}/merged {llama}/adapter -o {tmp}/unmerged                                        UnmergeReport 0
unmerge {tmp}/two {llama}/adapter:0.5 {llama}/adapter:-1 -o {tmp}/near --approximate          UnmergeReport 0
patch {llama}/base {llama}/tuned -o {tmp}/tuned.patch                                         PatchReport 0
patch {tmp}/codes {tmp}/uncoded -o {tmp}/codes.patch                                          PatchReport 0
patch {llama}/base {llama}/tuned --to skyrl --step 1 -o {tmp}/delta-00000001                  ForeignPatchReport 0
inspect {tmp}/delta-00000001                                                                  DeltaInspection 0
apply {llama}/base {tmp}/delta-00000001 -o {tmp}/tuned-too                                    ApplyReport 0
inspect {tmp}/tuned.patch                                                                     PatchInspection 0
apply {llama}/base {tmp}/tuned.patch -o {tmp}/tuned                                           ApplyReport 0
recover {tmp}/left                                                                            RecoverReport 0
verify {llama}/base {llama}/adapter {tmp}/merged --attest {tmp}/merged.json                   VerifyReport 0
verify --attestation {tmp}/merged.json                                                        AttestationReport 0
verify --attestation {tmp}/merged.json {llama}/base {llama}/adapter {llama}/base              AttestationReport 1
verify {llama}/base {llama}/adapter {llama}/base                                              VerifyReport 1
extract {llama}/base {llama}/tuned -o {tmp}/extracted                                         ExtractReport 0
extract {gpt2}/base {gpt2}/tuned --params 30K --certify --dtype bf16 -o {tmp}/budget          ExtractReport 0
extract {tmp}/zero {tmp}/odd --allow unrelated -o {tmp}/from-zero                             ExtractReport 0
init {llama}/base -o {tmp}/started                                                            InitReport 0
init {llama}/base --method pissa --residual {tmp}/residual --dora -o {tmp}/pissa              InitReport 0
resize {llama}/adapter --rank 4 -o {tmp}/small                                                ResizeReport 0
combine {llama}/adapter:0.7 {llama}/adapter:-0.2 -o {tmp}/sum                                 CombineReport 0
combine {llama}/adapter {llama}/adapter --method ties --rank 4 -o {tmp}/ties                  CombineReport 0
combine {llama}/adapter {gpt2}/adapter --allow unrelated -o {tmp}/unrelated                   CombineReport 0
convert {sdxl}/adapter.safetensors --to diffusers -o {tmp}/diffusers.safetensors              ConvertReport 0
convert {llama}/adapter --to peft --plain -o {tmp}/plain                                      ConvertReport 0
convert {llama}/adapter --to peft --layout fused --base {llama}/base -o {tmp}/fused              ConvertReport 0
convert {llama}/adapter --to loralib -o {tmp}/loralib.safetensors                             ConvertReport 0
convert {sdxl}/adapter.safetensors --set a=b -o {tmp}/set.safetensors                         MetadataReport 0
convert {llama}/base --to torch -o {tmp}/torch                                                CheckpointConvertReport 0
convert {tmp}/torch --dtype fp16 --max-shard-size 100KB -o {tmp}/shards                       CheckpointConvertReport 0
convert {tmp}/zero2 -o {tmp}/whole                                                            CheckpointConvertReport 0
count {llama}/base                                                                            CountReport 0
demo {tmp}/demo                                                                               DemoReport 0
count {gpt2}/base/config.json --params 4K --target c_attn                                     CountReport 0
diff {tmp}/kinds {tmp}/kinds --base {tmp}/odd                                                 AdapterDiff 0
diff {tmp}/kinds {tmp}/other --fail-above 0.1                                                 AdapterDiff 1
diff {tmp}/kinds {tmp}/other {tmp}/kinds --fail-above 0.1                                   AdaptersDiff 1
diff {llama}/base {llama}/base                                                                CheckpointDiff 0
diff {tmp}/odd {tmp}/nan --fail-above 0.1                                                     CheckpointDiff 1
env                                                                                           EnvReport 0
guide                                                                                         GuideReport 0
guide merging                                                                                 GuideReport 0
inspect {llama}/base                                                                          CheckpointReport 0
inspect {tmp}/odd                                                                             CheckpointReport 0
inspect {sdxl}/base.safetensors                                                               CheckpointReport 0
inspect {llama}/adapter --base {llama}/base --strict                                          AdapterInspection 0
inspect {tmp}/kinds --base {tmp}/nan --strict                                                 AdapterInspection 1
inspect {llama}/adapter --digest --files                                                      FilesReport 0
inspect {tmp}/signed --digest --files                                                         FilesReport 1
inspect {llama}/adapter --for vllm --base {llama}/base                                       RuntimeInspection 0
inspect {tmp}/kinds --for sglang                                                              RuntimeInspection 1
convert {llama}/adapter --for sglang --base {llama}/base -o {tmp}/sglang                      ConvertReport 0
inspect {tmp}/psoft                                                                           MethodReport 0
inspect {tmp}/psoft --strict                                                                  MethodReport 1
run {tmp}/wrong.json --dry-run                                                                RunReport 0
run {tmp}/wrong.json                                                                          RunReport 1
resize {tmp}/small --rank 2 -o {tmp}/pinned --save-recipe {tmp}/pinned.json --lock            ResizeReport 0
run {tmp}/pinned.json --locked --force                                                        RunReport 0
resize {llama}/adapter --rank 3 -o {tmp}/small --force                                        ResizeReport 0
run {tmp}/pinned.json --locked --force                                                        RunReport 1
inspect {llama}/base --spectra                                                                SpectraReport 0
inspect {tmp}/kinds --spectra                                                                 SpectraReport 0
inspect {llama}/adapter --spectra --base {llama}/base --top 4 --threshold 0.9                 SpectraReport 0
diff {llama}/base {llama}/tuned --spectra --layers 0                                          SpectraDiff 0
diff {llama}/base {llama}/fp8 --headers                                                       HeadersDiff 0
diff {llama}/base {sdxl}/base.safetensors --headers --fail-above 0                            HeadersDiff 1
"""
# Keys that come from the inputs, which the schemas cannot list
OPEN = {
    "components",
    "metadata",
    "unbound",
    "left_out",
    "fields",
    "ranks_a",
    "ranks_b",
    "ranks",
    "dtypes",
    "sha256",
    "digests",
}


def parse(text: str) -> Any:
    """Strictly: JSON has no NaN and no Infinity, which Python's own parser lets pass."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@cache
def schema_of(verb: str) -> dict[str, Any]:
    result = run_command(verb, "--json-schema")
    assert (result.exit_code, result.stderr) == (0, "")
    schema: dict[str, Any] = parse(result.stdout)
    return schema


@cache
def validator_of(verb: str) -> Draft202012Validator:
    return Draft202012Validator(schema_of(verb))


def faults(verb: str, value: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator_of(verb).iter_errors(value)]


def make_inputs(tmp: Path) -> None:
    """Zeros, nan, integers, scalars, and an adapter of every kind of update."""
    odd = {
        "model.layers.0.self_attn.q_proj.weight": weights(8, 6),
        "model.layers.0.mlp.down_proj.weight": weights(6, 8),
        "model.layers.0.norm.weight": weights(6),
        "model.layers.0.norm.bias": weights(6),
        "model.embed_tokens.weight": weights(10, 6),
        "ids": torch.arange(5),
        "scale": torch.tensor(2.0),
    }
    write_model(tmp / "odd", odd, {"model_type": "llama"})
    interrupted(LLAMA / "base", LLAMA / "adapter", tmp / "left")
    write_model(tmp / "zero", {name: torch.zeros_like(x) for name, x in odd.items()}, {"model_type": "llama"})
    holed = {name: x.clone() for name, x in odd.items()}
    holed["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    write_model(tmp / "nan", holed, {"model_type": "llama"})
    modules = {"model.layers.0.self_attn.q_proj": factors(8, 6, 2), "model.layers.0.mlp.down_proj": factors(6, 8, 3)}
    write_peft(tmp / "kinds", modules, rank_pattern={"down_proj": 3}, modules_to_save=["norm"])
    file = tmp / "kinds" / "adapter_model.safetensors"
    saved = {f"base_model.model.model.layers.0.norm.{part}": weights(6, seed=5) for part in ("weight", "bias")}
    save_file({**load_file(file), **saved}, file)
    write_peft(tmp / "other", {"model.layers.0.self_attn.q_proj": factors(8, 6, 4, 1)}, use_rslora=True)
    write_zero(tmp / "zero2", 2, 2, [{"model.norm.weight": weights(6)}])
    fields = {"general.architecture": "llama"}
    coded = gguf_bytes.tensor(8, (4, 64), ggml_blocks.blocks_of("Q8_0", 8).tobytes())
    gguf_bytes.write(tmp / "m.gguf", fields, {"blk.0.attn_q.weight": coded})
    A, B = (x.numpy() for x in factors(4, 64, 2))
    pair = {f"blk.0.attn_q.weight.lora_{end}": gguf_bytes.floats(9 * x) for end, x in (("a", A), ("b", B))}
    own = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    gguf_bytes.write(tmp / "a.gguf", fields | own, pair)
    verify = {"command": "verify", "base": str(LLAMA / "base"), "adapters": [str(LLAMA / "adapter")]}
    (tmp / "wrong.json").write_text(json.dumps({**verify, "merged": str(LLAMA / "base")}))
    shutil.copytree(LLAMA / "adapter", tmp / "signed")
    write_signature(tmp / "signed", "gone")
    (tmp / "psoft").mkdir()
    save_file({"base_model.model.x.psoft_R.weight": weights(2, 1)}, tmp / "psoft" / "adapter_model.safetensors")
    (tmp / "psoft" / "adapter_config.json").write_text('{"peft_type": "PSOFT", "target_modules": ["x"]}')


@dataclass(frozen=True)
class Printed:
    """What a line of CALLS printed.

    Attributes:
        kind, code: the expected class and exit code.
        value: the object.
        report: that it is made of.
    """

    verb: str
    kind: str
    code: int
    value: Any
    report: Any


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[Printed]:
    tmp, found, reports = tmp_path_factory.mktemp("schemas"), [], list[Any]()
    make_inputs(tmp)

    def recorded(verb: str, report: Any = None, **more: Any) -> str:
        reports.append(report)
        return to_json(verb, report, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loratool.cli.as_json.to_json", recorded)
        for line in CALLS.strip().splitlines():
            *argv, kind, code = line.format(tmp=tmp, llama=LLAMA, gpt2=GPT2, sdxl=SDXL).split()
            result = run_command(*argv, "--json")
            value = parse(result.stdout)
            assert result.exit_code == value["exit_code"] == int(code), (line, result.stdout[:300], result.stderr)
            found.append(Printed(argv[0], kind, int(code), value, None if argv[0] == "guide" else reports[-1]))
    return found


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_prints_a_schema(verb: str) -> None:
    schema = schema_of(verb)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert schema["$id"] == f"urn:loratool:{SCHEMA_VERSION}:{verb}"
    named = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)))
    assert named == set(schema["$defs"])


def test_a_schema_is_asked_for_before_all_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = json.dumps(schema_of("merge"), indent=2) + "\n"
    assert run("merge", "absent", "--dtype", "x", "--json-schema", "--json").stdout == schema
    monkeypatch.setenv("LORATOOL_MERGE_JSON_SCHEMA", "1")
    result = run("merge")
    assert result.exit_code == 2 and "LORATOOL_MERGE_JSON_SCHEMA: sets no option" in result.stderr


def test_the_schema_of_run_takes_recipes_too() -> None:
    recipe = {"command": "merge", "base": "a", "adapters": ["b"], "out": "c"}
    faulty = {**recipe, "adapter": "b"}
    fits = validator_of("run").is_valid
    assert fits(recipe) and fits({"steps": [recipe, recipe]})
    assert not any(map(fits, (faulty, {"steps": [recipe, faulty]}, {**recipe, "schema": 1}, {}, [], None)))
    alone = Draft202012Validator({"$ref": "#/$defs/recipe", "$defs": schema_of("run")["$defs"]})
    assert alone.is_valid(recipe) and not alone.is_valid(faulty)


def test_every_report_of_every_verb_is_printed_here(printed: list[Printed]) -> None:
    assert {(each.verb, each.kind) for each in printed} == {
        (verb, kind.__name__) for verb in REPORTS for kind in report_classes(verb)
    }
    assert {(each.verb, each.value["status"]) for each in printed if each.code} | {
        (verb, "inconclusive") for verb in ("run", "verify")
    } == {(verb, status) for verb, statuses in schemas.STATUSES.items() for status in statuses}


def test_what_is_printed_fits_its_schema(printed: list[Printed]) -> None:
    for each in printed:
        assert faults(each.verb, each.value) == [], each.verb
        report = Draft202012Validator({"$ref": f"#/$defs/{each.kind}", "$defs": schema_of(each.verb)["$defs"]})
        assert report.is_valid(each.value["report"]), f"{each.verb}: this is no {each.kind}"


def typed(value: Any) -> Any:
    """The value with the type of each part: 1, 1.0 and True are equal, and so are a mapping's."""
    if is_dataclass(value):
        return type(value), [(field.name, typed(getattr(value, field.name))) for field in fields(value)]
    if isinstance(value, dict):
        return dict, [(key, typed(each)) for key, each in value.items()]
    if isinstance(value, tuple | list):
        return type(value), [typed(each) for each in value]
    plain = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), type(None))  # numpy's too
    return plain, value


def test_what_is_printed_is_read_back_and_so_is_its_page(printed: list[Printed], tmp_path: Path) -> None:
    file, page, shown = tmp_path / "report.json", tmp_path / "report.html", set[tuple[str, int]]()
    for each in printed:
        file.write_text(json.dumps(each.value))
        if each.verb == "guide":
            with pytest.raises(InputError, match="is a guide, not a report"):
                loratool.read_report(file)
            continue
        places = [file]
        if (each.kind, each.code) not in shown:  # a page takes longer
            shown.add((each.kind, each.code))
            loratool.write_report(each.report, page, status=each.value.get("status"))
            places.append(page)
        for found in map(loratool.read_report, places):
            assert found == each.report and repr(found) == repr(each.report), each.kind
            assert typed(found) == typed(each.report), each.kind


HOSTILE = "\"'><script>alert(1)</script><!--</title>&lt;{{7*7}}\0\x1b[31m\u202e\u2028\ud800\U0001f600"


def named(value: Any, more: str) -> Any:
    """A report with something behind each text that is no word of a table."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {name for name in vars(value) if name in TABLES or f"{type(value).__name__}.{name}" in schemas.WORDS}
        return replace(value, **{name: named(each, more) for name, each in vars(value).items() if name not in own})
    if isinstance(value, dict):
        return {named(key, more): named(each, more) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(named(each, more) for each in value)
    return value + more if value and isinstance(value, str) else value


TABLES = {*schemas.WORDS, "kind", "update", "family"}


def test_no_text_of_a_report_is_markup(printed: list[Printed]) -> None:
    """The page has the elements of one with harmless names, and the JSON in it is the report's."""
    for each in {(one.kind, one.code): one for one in printed if one.report is not None}.values():
        found = []
        for more in (HOSTILE, "x" * len(HOSTILE)):
            report = named(each.report, more)
            value = envelope(each.verb, asdict(report), status=each.value.get("status"))
            found.append(PageElements(render(report, value, f"loratool {more}")))
            (held,) = [text for place, text in found[-1].texts if ("id", "report") in place]
            assert json.loads(held) == json.loads(json.dumps(value)), each.kind
        assert found[0].elements == found[1].elements, each.kind


def test_the_reports_of_a_verb_have_other_names_of_fields() -> None:
    """By which the reader tells them apart."""
    for verb in REPORTS:
        names = [frozenset(field.name for field in fields(kind)) for kind in report_classes(verb)]
        assert len(set(names)) == len(names), verb


WRONG: dict[type, list[Any]] = {
    str: [7, []],
    bool: ["x", 7],
    int: ["x", -1, 0.5],
    float: ["x", True],
    dict: ["x", []],
    list: ["x", {}],
    type(None): [{}],
}


def damaged(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The object with one thing wrong, in every way: a key less, a key more, another type. Of a list its first item."""
    if isinstance(value, dict) and key != "fields":  # whose values are anything
        for name in value:
            if key not in {*OPEN, "bodies"}:  # which has only the ways that a tensor took
                yield f"without {key}.{name}", {k: v for k, v in value.items() if k != name}
            for what, other in damaged(value[name], name):
                yield what, {**value, name: other}
        if key not in OPEN:
            yield f"more in {key}", {**value, "more": 1}
    elif isinstance(value, list) and value:
        for what, other in damaged(value[0], key):
            yield what, [other, *value[1:]]
    for other in WRONG[float if key == "alpha" else type(value)]:  # which may be whole, as in its config
        yield f"{key} as {other!r}", other


def short(value: Any) -> Any:
    """The object with two items of each list."""
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    return [short(each) for each in value[:2]] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def first(printed: list[Printed]) -> dict[tuple[str, int], tuple[str, Any]]:
    """Class and exit code -> the verb and the first object of them, shortened."""
    return {(each.kind, each.code): (each.verb, short(each.value)) for each in reversed(printed)}


def sampled(value: Any, most: int) -> list[tuple[str, Any]]:
    """So many ways of `damaged`, or all."""
    every = [*damaged(value)]
    return random.Random(29).sample(every, min(most, len(every)))


@pytest.mark.parametrize("most", [30, pytest.param(10**6, marks=pytest.mark.slow)])
def test_nothing_that_is_wrong_fits(most: int, first: dict[tuple[str, int], tuple[str, Any]]) -> None:
    for (kind, _), (verb, value) in first.items():
        fits = validator_of(verb).is_valid
        assert fits(value) and [what for what, other in sampled(value, most) if fits(other)] == [], kind


@pytest.mark.parametrize("most", [5, pytest.param(10**6, marks=pytest.mark.slow)])
def test_nothing_that_is_wrong_is_read(
    most: int, first: dict[tuple[str, int], tuple[str, Any]], tmp_path: Path
) -> None:
    """But for other keys of mappings, and for other words."""
    file = tmp_path / "report.json"
    for (kind, _), (_, value) in first.items():
        for what, other in sampled(value, most) if kind != "GuideReport" else ():
            if what in ("more in sizes", "more in bodies"):
                continue
            file.write_text(json.dumps(other))
            with pytest.raises(InputError) as error:
                loratool.read_report(file)
                pytest.fail(f"{kind}: {what} is read")
            assert str(error.value.culprit).startswith(str(file)), (kind, what)


# what the library raises -> its kind and exit code
RAISED: list[tuple[BaseException, str, int]] = [
    (UsageError("x"), "usage", 2),
    (InputError("x", culprit="y"), "input", 3),
    (NeedsFlag("x", remedy="add --force"), "needs-flag", 4),
    (MachineError("x"), "machine", 5),
    (OSError(28, "No space left on device", "y"), "machine", 5),
    (MemoryError(), "machine", 5),
    (LoratoolError("x"), "internal", 70),
    (ZeroDivisionError("x"), "internal", 70),
    *((Interrupted(number), "interrupted", 128 + number) for number in (1, 2, 15)),
]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_error_of_every_verb_fits(verb: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    two = dict.fromkeys(("apply", "diff", "extract", "merge", "patch", "unmerge"), "a b")
    inputs = {
        **two,
        "verify": "a b c",
        "convert": "a --to peft",
        "resize": "a --rank 4",
        "run": "a.json",
        "demo": "a/b",
        "env": "",
    }
    argv = [verb, *inputs.get(verb, "a").split(), "--json"]
    for error, kind, code in RAISED:

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        called = {
            "convert": "convert.command._function_for",  # which picks one of three functions
            "guide": "guide.guide",
            "run": "run.command.OpenRecipe",  # the command line shows each step as it is done
        }
        monkeypatch.setattr(f"loratool.commands.{called.get(verb, f'{verb}.command.run_{verb}')}", fail)
        check_error(run(*argv), verb, kind, code)
    monkeypatch.undo()
    if verb != "env":  # which has no input that could be wrong
        check_error(run(*argv), verb, *(("usage", 2) if verb in ("guide", "demo") else ("input", 3)))
    check_error(run(*argv, "--absent"), verb, "usage", 2)


def check_error(result: Any, verb: str | None, kind: str, code: int) -> None:
    value = parse(result.stdout)
    assert (result.exit_code, value["exit_code"], value["error"]["kind"], value["verb"]) == (code, code, kind, verb)
    assert [each for each in ([verb] if verb else COMMANDS) if faults(each, value)] == []


@pytest.mark.parametrize("argv", [["explode", "--json"], ["--json"], ["--absent", "merge", "--json"]])
def test_a_call_without_a_verb(run: Run, argv: list[str]) -> None:
    check_error(run(*argv), None, "usage", 2)


def test_an_error_that_is_wrong_does_not_fit(run: Run) -> None:
    value = parse(run("inspect", "absent", "--json").stdout)
    fits = validator_of("inspect").is_valid
    assert fits(value) and [what for what, other in damaged(value) if fits(other)] == []
    for changed in ({"exit_code": 5}, {"exit_code": 4}, {"verb": "merge"}, {"schema": 1}, {"ok": True}):
        assert not fits({**value, **changed})
    flag = {**value, "exit_code": 4, "error": {**value["error"], "kind": "needs-flag", "remedy": None}}
    assert not fits(flag) and fits({**flag, "error": {**flag["error"], "remedy": "add --force"}})


def test_every_word_is_of_a_field() -> None:
    def names(verb: str) -> set[str]:
        return {
            f"{cls}.{name}" for cls, each in schema_of(verb)["$defs"].items() for name in each.get("properties", ())
        }

    every = {name for verb in COMMANDS for name in names(verb)}
    assert {word for word in schemas.WORDS if word not in every | {name.split(".")[1] for name in every}} == set()
