"""Recipes of mlrecipe: merged as it says, or refused by the field that a merge cannot honour; its pins are held."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES
from conftest import run_command as run
from safetensors.numpy import load_file, save

import loratool
from loratool.errors import CheckError, InputError, MachineError

COMMIT = "11c5a3d5811f50298f278a704980280950aedb10"
MODULES = ("attn.c_attn", "mlp.c_proj")


def factors(seed: int) -> dict[str, np.ndarray]:
    """Return an adapter as `from-peft` stores it: PEFT's names in a safetensors file without metadata."""
    base, rng, found = load_file(FIXTURES / "gpt2" / "base" / "model.safetensors"), np.random.default_rng(seed), {}
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            rows, columns = weight.shape  # (in, out)
            found[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((4, rows)).astype("f")
            found[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((columns, 4)).astype("f") / 8
    return found


def toml(recipe: dict[str, Any]) -> str:
    """Return tables, and lists of tables, as tomli_w writes them."""
    lines = []
    for name, value in recipe.items():
        for table in value if isinstance(value, list) else [value]:
            lines.append(f"[[{name}]]" if isinstance(value, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(each)}" for key, each in table.items()]
    return "\n".join(lines) + "\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe of two adapters in the working folder, and its base in the hub's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(FIXTURES / "gpt2" / "base", Path("cache", "models--gpt2", "snapshots", COMMIT))
    adapters = []
    for seed, alpha in ((1, 8.0), (2, 2.0)):
        data = save(factors(seed))
        digest = hashlib.sha256(data).hexdigest()
        place = Path(".recipe", "artifacts", digest[:2], digest)
        place.parent.mkdir(parents=True)
        place.write_bytes(data)
        words = {"type": "lora", "artifact": f"sha256:{digest}", "target_modules": ["c_attn", "c_proj"], "rank": 4}
        adapters.append({**words, "alpha": alpha, "fan_in_fan_out": True, "bias": "none", "lora_dropout": 0.05})
    return {
        "recipe": {"version": "0.1", "name": "tiny"},
        "base": {"ref": "gpt2", "revision": COMMIT},
        "training": {"method": "lora", "seed": 42, "anything": "else"},
        "adapters": adapters,
    }


def write(recipe: dict[str, Any]) -> Path:
    path = Path(".recipe", "recipe.toml")
    path.write_text(toml(recipe))
    return path


def test_the_merge_is_the_one_that_mlrecipe_describes(recipe: dict[str, Any]) -> None:
    """One adapter after the other, W + alpha / rank * (B A)^T, to within one step of float32."""
    report = loratool.run(write(recipe))
    assert [step.out for step in report.steps] == ["merged-1", "merged"]
    found = load_file("merged/model.safetensors")
    for name, weight in load_file(FIXTURES / "gpt2" / "base" / "model.safetensors").items():
        for seed, scale in ((1, 2.0), (2, 0.5)):
            A, B = (
                factors(seed).get(f"base_model.model.{name.removesuffix('.weight')}.lora_{each}.weight")
                for each in "AB"
            )
            if A is not None and B is not None:
                weight = (weight + scale * (B.astype("d") @ A.astype("d")).T).astype("f")
        assert np.array_equal(weight, found[name])


def test_a_file_that_is_not_as_pinned(recipe: dict[str, Any]) -> None:
    path = write(recipe)
    artifact = next(Path(".recipe", "artifacts").glob("*/*"))
    for data in (artifact.read_bytes()[:-1] + b"\x01", b"", artifact.read_bytes() + b"x"):
        artifact.write_bytes(data)
        result = run("run", path)
        assert (result.exit_code, result.stderr, len(result.stdout.splitlines())) == (1, "", 1)
        assert f"differs: {artifact}, adapters." in result.stdout and not Path("merged").exists()
        with pytest.raises(CheckError, match=r"recipe.toml records: sha256"):
            loratool.run(path)
    artifact.unlink()
    with pytest.raises(InputError, match="artifact.*no such file"):
        loratool.run(path)


def test_the_base_is_pinned_by_commit_and_file(recipe: dict[str, Any]) -> None:
    weights = next(Path("cache").rglob("model.safetensors"))
    recipe["base"]["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert run("run", write(recipe)).exit_code == 0
    recipe["base"]["sha256"] = 64 * "0"
    result = run("run", write(recipe), "--force")
    assert result.exit_code == 1 and "model.safetensors, base.sha256, is not what" in result.stdout
    recipe["base"] = {"ref": "gpt2", "revision": 40 * "0"}
    result = run("run", write(recipe), "--force")
    assert result.exit_code != 0 and 40 * "0" in result.stderr


def test_it_can_be_locked_too(recipe: dict[str, Any]) -> None:
    path = write(recipe)
    assert run("run", path, "--lock").exit_code == 0
    lock = json.loads(Path(".recipe", "recipe.lock.json").read_text())
    assert lock["steps"][0]["inputs"][f"hf://gpt2@{COMMIT}"]["revision"] == COMMIT
    assert run("run", path, "--locked", "--force").exit_code == 0


REFUSED: dict[str, tuple[str, Any]] = {  # field -> what it is set to
    "recipe.version": ("recipe.version", "0.2"),
    "recipe.extra": ("recipe.extra", 1),
    "parents.parent": ("parents", {"parent": "user/repo@v1"}),
    "other": ("other", {"a": 1}),
    "base.ref: 'a/b/c'": ("base.ref", "a/b/c"),
    "base.ref: 7": ("base.ref", 7),
    "base.ref: '../../etc'": ("base.ref", "../../etc"),
    "base.revision": ("base.revision", "../x"),
    "base.sha256": ("base.sha256", "md5:abc"),
    "adapters: is not": ("adapters", {"type": "lora"}),
    "adapters.0.type": ("adapters.0.type", "ia3"),
    "adapters.0.artifact: '../x'": ("adapters.0.artifact", "../x"),
    "adapters.0.artifact: 'sha1": ("adapters.0.artifact", "sha1:" + 40 * "0"),
    "adapters.0.rank: is 8": ("adapters.0.rank", 8),
    "adapters.0.rank: True": ("adapters.0.rank", True),
    "adapters.0.alpha": ("adapters.0.alpha", -1),
    "adapters.0.fan_in_fan_out: is false": ("adapters.0.fan_in_fan_out", False),
    "adapters.0.fan_in_fan_out: 1": ("adapters.0.fan_in_fan_out", 1),
    "adapters.0.bias": ("adapters.0.bias", "all"),
    "adapters.0.modules_to_save": ("adapters.0.modules_to_save", ["lm_head"]),
    "adapters.0.target_modules: names no": ("adapters.0.target_modules", ["q_proj"]),
    "adapters.0.target_modules": ("adapters.0.target_modules", ["re:.*"]),
    "adapters.0.use_dora: is not known": ("adapters.0.use_dora", True),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_field_that_is_not_honoured_is_named(case: str, recipe: dict[str, Any]) -> None:
    field, value = REFUSED[case]
    *path, last = field.split(".")
    inner: Any = recipe
    for key in path:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    result = run("run", write(recipe))
    assert result.exit_code == 3 and f"recipe.toml: {case}" in result.stderr and not Path("merged").exists()


def test_modules_that_are_no_target_stay(recipe: dict[str, Any]) -> None:
    del recipe["adapters"][1]
    recipe["adapters"][0]["target_modules"] = ["c_proj", "not_there"]
    loratool.run(write(recipe))
    base, found = load_file(FIXTURES / "gpt2" / "base" / "model.safetensors"), load_file("merged/model.safetensors")
    changed = {name.rpartition("h.")[2][2:] for name in base if not np.array_equal(base[name], found[name])}
    assert changed == {"mlp.c_proj.weight"}


def test_what_is_more_than_lora_in_a_file_is_refused(recipe: dict[str, Any]) -> None:
    """Of a DoRA, mlrecipe would leave out the magnitudes."""
    more = {
        name.replace("lora_A.weight", "lora_magnitude_vector.weight"): np.ones(len(B), "f")
        for name, B in ((name, factors(1)[name.replace("lora_A", "lora_B")]) for name in factors(1) if "lora_A" in name)
    }
    data = save({**factors(1), **more})
    digest = hashlib.sha256(data).hexdigest()
    place = Path(".recipe", "artifacts", digest[:2], digest)
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(data)
    recipe["adapters"][0]["artifact"] = digest
    result = run("run", write(recipe))
    assert result.exit_code == 3 and "adapters.0.type: is 'lora', and the file has dora" in result.stderr


def test_an_adapter_without_rank_and_alpha_counts_fully(recipe: dict[str, Any]) -> None:
    """The scale of mlrecipe is 1 then."""
    del recipe["adapters"][1], recipe["adapters"][0]["rank"], recipe["adapters"][0]["alpha"]
    loratool.run(write(recipe))
    Path("merged").rename("alone")
    recipe["adapters"][0] |= {"rank": 4, "alpha": 4}
    loratool.run(write(recipe))
    assert Path("alone", "model.safetensors").read_bytes() == Path("merged", "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [", "cannot be read"),
        ("a = " + "[" * 10_000, "is nested too deeply"),
        ("a" + ".a" * 30_000 + " = 1", "100 dots in a line"),
        ("a = " + 5000 * "9", "cannot be read"),
        ("a = 1\na = 2", "cannot be read"),
        ("x" * (1 << 17), "characters"),
        ("", "base.ref: None"),
        ('command = "merge"', "is one of mlrecipe"),
    ],
)
def test_a_text_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    result = run("run", tmp_path / "recipe.toml")
    assert result.exit_code in (2, 3) and message in result.stderr and len(result.stderr.splitlines()) <= 2


def test_python_without_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text("")
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MachineError, match="TOML needs Python 3.11, or tomli") as error:
        loratool.run(tmp_path / "recipe.toml")
    assert "[recipes]" in str(error.value.remedy)
