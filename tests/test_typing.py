"""The types that an editor sees: mypy reads a user's script that calls every command, and finds each wrong call."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import loratool

pytest.importorskip("mypy")

SCRIPT = """
from pathlib import Path
from typing import Literal

import numpy
import torch

import loratool

merged: loratool.MergeReport = loratool.merge("base", ["adapter"], "merged")
print(f"{merged.kept:.1%} of the delta is left after rounding", [row.name for row in merged.tensors])
weights: dict[str, float] = {"style": 0.7, "task": -0.2}
pairs: list[tuple[Path, float]] = [(Path("style"), 0.7)]
adapters: loratool.Adapters = ["style", Path("task"), ("te", 0.5, {"te": 0.4})]
for each in (weights, pairs, adapters, "adapter", ("adapter", 1), iter(pairs)):
    loratool.merge(Path("base"), each, dtype="bf16", max_shard_size=10**9, target=["q_proj"], layers="0-3", undo=False)

def progress(done: int, total: int) -> None: ...

unmerged: loratool.UnmergeReport = loratool.unmerge("merged", "adapter", "again", progress=progress)
print(unmerged.restored + unmerged.nbytes, unmerged.exact_files)
patched = loratool.patch("base", Path("tuned"), "tuned.patch", fast=True)
assert isinstance(patched, loratool.PatchReport)
print(patched.reversible, [row.changed / row.numbers for row in patched.tensors])
made: loratool.ApplyReport = loratool.apply("base", ["tuned.patch", Path("more.patch")], "again", progress=progress)
print(made.digests["again"], loratool.apply("tuned", "tuned.patch", reverse=True).files)
ended: loratool.RecoverReport = loratool.recover("model", back=True, progress=progress)
print(ended.is_new, ended.windows)
verdict: loratool.VerifyReport = loratool.verify("base", weights, "merged", allow=["inconclusive"])
print(verdict.status.upper())
stated: loratool.AttestationReport = loratool.verify_attestation("merged.json", base="base", adapters=["a", "b"])
print(stated.differences[0].name, stated.proof.status if stated.proof is not None else None)
adapter: loratool.ConvertReport = loratool.convert("kohya.safetensors", to="comfy", exclude=["text_encoder*"])
print(adapter.family, [module.alpha for module in adapter.modules])
model: loratool.CheckpointConvertReport = loratool.convert_model("model", dtype=torch.bfloat16, max_shard_size="5GB")
print(model.source_format, loratool.convert_model("model", "old", to="torch").warnings)
chosen: Literal["vllm", "sglang"] = "vllm"
for_one: loratool.ConvertReport = loratool.convert("adapter", runtime=chosen, base=Path("base"))
edited: loratool.MetadataReport = loratool.edit_metadata("a.safetensors", set={"ss_seed": "8"}, unset="ss_tag")
print(edited.kept, loratool.edit_metadata("a.safetensors", unset=["ss_seed"]).changes)
single: loratool.CheckpointConvertReport = loratool.convert_model("model", to="single-file")
sum_: loratool.CombineReport = loratool.combine(weights, "both", method="ties", density=0.3, rank=16)
print(sum_.warnings)
resized: loratool.ResizeReport = loratool.resize("adapter", dtype=numpy.float16, rank_rule=("sv_fro", 0.9), max_rank=8)
print(resized.error * 2)
extracted: loratool.ExtractReport = loratool.extract("base", "tuned", params=10**6, embed="skip")
print(extracted.kept, extracted.nbytes)
started: loratool.InitReport = loratool.init("base", method="pissa", rank_pattern={"down_proj": 16}, residual="left")
print(started.parameters)
difference = loratool.diff("a", "b", base="base")
print((difference.worst or 0) + 1, difference.phi if isinstance(difference, loratool.AdapterDiff) else difference.same)
several = loratool.diff("a", "b", "c", "d", layers=[0, 1])
print(several.shared.cosines if isinstance(several, loratool.AdaptersDiff) and several.shared else several.worst)
found = loratool.inspect("adapter", alpha=16)
if isinstance(found, loratool.AdapterInspection):
    print(found.problems)
elif isinstance(found, loratool.MethodReport):
    print(found.path)
elif isinstance(found, loratool.DeltaInspection):
    print(found.how, found.base_version)
elif isinstance(found, loratool.PatchInspection):
    print(found.reversible, found.bodies["classes"].patch_nbytes)
else:
    print(found.parameters)
print(loratool.spectra("base", target=("q_proj",)).modules[0].top[0], loratool.count("config.json", rank=8).methods)
new_of: loratool.SpectraDiff = loratool.diff_spectra("base", "tuned", top=10, threshold=0.5)
print(new_of.weights[0].intruders.new, loratool.spectra("adapter", base="base").modules[0].intruders)
compared: loratool.HeadersDiff = loratool.diff_headers("base", Path("tuned"))
print(compared.same, compared.tensors[0].shape_a, compared.only_b)
hashed: loratool.FilesReport = loratool.inspect_files("adapter")
print(hashed.ok, hashed.files[0].sha256)
served: loratool.RuntimeInspection = loratool.inspect_for("adapter", runtime="vllm", base="base")
print(served.runtime)
with loratool.open_adapter("adapter", alpha=16) as opened, loratool.open_checkpoint(Path("base")) as model_:
    print(opened["q"].delta() + opened["q"].A, model_["weight"], opened.format.upper(), model_.specs["weight"].shape)
    factors = {name: (module.A, module.B, module.scale) for name, module in opened.items()}
    print(loratool.save_adapter("again", factors, to="mlx", force=True) + 1)
loratool.save_adapter("one", {"q": (numpy.ones((1, 2)), torch.ones(2, 1), 0.5)}, base=Path("base"))
sizes = loratool.extract("base", "tuned", size="40MB", layers=range(4), target="q_proj,v_proj", exclude=("k_proj",))
loratool.count("base", params="20M", layers=[0, 1])
nbytes: int = loratool.write_report(merged, Path("merge.html"), command="loratool merge base adapter")
again = loratool.read_report("merge.html")
print(again.document().verdict, again.kept if isinstance(again, loratool.MergeReport) else nbytes)
examples: loratool.DemoReport = loratool.demo(Path("demo"), force=True)
print([part.what for part in examples.parts])
here: loratool.EnvReport = loratool.env()
print(here.packages[0].version.upper(), here.cores + 1)
for name_, tensor_ in loratool.iter_merged("base", weights, dtype="bf16"):
    print(name_.upper(), tensor_)
with loratool.live.merged({}, "adapter", target="q_proj", check="sum") as live:
    live.swap(weights)
    print(live.report.kept, live.nbytes + 1, live.is_merged)
loratool.live.merge({}, pairs, tied="share", workers=2).unmerge()
ran: loratool.RunReport = loratool.run("recipe.yaml", dry_run=True)
try:
    loratool.merge("base", "adapter")
except loratool.NeedsFlag as error:
    print(error.remedy, error.culprit, error.exit_code)
"""
WRONG = {
    'loratool.merge("base")': "call-arg",
    'loratool.merge("base", 3)': "arg-type",
    'loratool.merge("base", {"adapter": "much"})': "arg-type",
    'loratool.merge("base", "adapter", shards=2)': "call-arg",
    'loratool.merge("base", "adapter").keeps': "attr-defined",
    'loratool.convert("a", to="peft", max_shard=5)': "call-arg",
    'loratool.convert("a", to="peft").source_container': "attr-defined",
    'loratool.resize("adapter", rank="8")': "arg-type",
    'loratool.merge("base", "adapter", dtype="fp8")': "arg-type",
    'loratool.merge("base", "adapter", tied="no")': "arg-type",
    'loratool.unmerge("merged", "adapter", drop=["te", "tea"])': "list-item",
    'loratool.convert("a", runtime=input())': "arg-type",
    'loratool.combine("a", rank_rule=("noise", 1.0))': "arg-type",
    'loratool.write_report("merge.html", merged)': "arg-type",
    'loratool.save_adapter("a", {"q": (numpy.ones((1, 2)), 1.0)})': "dict-item",
    'loratool.live.merge({}, "adapter", check="crc")': "arg-type",
    'loratool.mrege("base", "adapter")': "attr-defined",
}


def check(script: Path, kind: str = "error") -> list[str]:
    """Return mypy's errors in a script, or its notes.

    torch is not read: it takes half a minute, and no signature of ours has it.
    """
    config = script.with_suffix(".ini")
    config.write_text(
        "[mypy]\nstrict = true\nfollow_imports = silent\n[mypy-torch.*,numpy.*,safetensors.*,rich.*]\n"
        "follow_imports = skip\nfollow_imports_for_stubs = true\n"
    )
    argv = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", script.parent / "cache", script]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if f": {kind}: " in line]


def test_a_users_script_is_typed_and_a_wrong_call_is_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    functions = {name for name in loratool.__all__ if name.islower() and name != "live"}
    assert functions == set(re.findall(r"loratool\.([a-z_]+)\(", SCRIPT))
    script.write_text(SCRIPT)
    assert check(script) == []
    lines = SCRIPT.count("\n")
    script.write_text(SCRIPT + "".join(f"{call}\n" for call in WRONG))
    errors = check(script)
    found = {int(line.split(":")[1]) - lines - 1: line for line in errors}
    for number, (call, code) in enumerate(WRONG.items()):
        assert number in found and found[number].endswith(f"[{code}]"), (call, found.get(number))
    assert len(found) == len(WRONG)


@pytest.mark.slow
def test_every_argument_has_a_type(tmp_path: Path) -> None:
    """As a type checker sees the functions that are made of calls: all names, and no Any."""
    functions = [name for name in loratool.__all__ if name.islower() and name != "live"]
    script = tmp_path / "script.py"
    script.write_text("import loratool\n" + "".join(f"reveal_type(loratool.{name})\n" for name in functions))
    shown = re.findall(r'Revealed type is "def \((.*)\) -> (.*)"', "\n".join(check(script, "note")))
    assert len(shown) == len(functions)
    for name, (arguments, report) in zip(functions, shown, strict=True):
        names = re.findall(r"(?:^|, )\*?(\w+): ", arguments)
        assert names == [*inspect.signature(getattr(loratool, name)).parameters], name
        assert "Any" not in arguments and ("Any" not in report or name == "iter_merged")  # torch's tensors


@pytest.mark.slow
def test_pyright_sees_what_mypy_sees(tmp_path: Path) -> None:
    """It is what many editors run: no error in the script, one in each wrong call, and no argument without a type."""
    pytest.importorskip("basedpyright")
    functions = [name for name in loratool.__all__ if name.islower() and name != "live"]
    revealed = "".join(f"reveal_type(loratool.{name})\n" for name in functions)
    (tmp_path / "script.py").write_text(SCRIPT + revealed + "".join(f"{call}\n" for call in WRONG))
    settings = {"include": ["script.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    argv = [sys.executable, "-m", "basedpyright", "-p", tmp_path, "--pythonpath", sys.executable, "--outputjson"]
    found = json.loads(subprocess.run(argv, capture_output=True, text=True).stdout)["generalDiagnostics"]
    errors = {each["range"]["start"]["line"] for each in found if each["severity"] == "error"}
    first = SCRIPT.count("\n") + len(functions)
    assert errors == {*range(first, first + len(WRONG))}, found
    shown = [each["message"] for each in found if each["severity"] == "information"]
    assert len(shown) == len(functions) and not [text for text in shown if re.search(r"\b(Any|Unknown)\b", text)]


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "loratool" / "py.typed").is_file()
    assert '\nloratool = ["py.typed"]\n' in (ROOT / "pyproject.toml").read_text()
