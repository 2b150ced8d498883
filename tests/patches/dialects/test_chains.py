"""Find the way to a version in a folder, and refuse one with a gap, a circle or names that do not match."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model
from dialect_models import cut, models, spec_of, without_nan
from lib.harness.s3_server import serve_s3
from lib.harness.stores import s3_at
from lib.oracles import naive_dialects as naive
from lib.oracles.naive_dialects import Model, like, load_file, raw, same

import loratool
from loratool.errors import InputError
from loratool.patches.dialects.chains import find_chain

VERSIONS = [model for seed in range(3) for model in without_nan(models(seed=seed))]  # 0 to 5

DIALECTS: dict[str, tuple[Callable[..., Path], str, str, str]] = {
    "disk delta": (naive.write_disk_delta, "weight_v{:06d}", "model.safetensors.index.json", "base_version"),
    "SkyRL": (naive.write_skyrl, "delta-{:08d}", "manifest.json", "base_version"),
    "prime-rl": (naive.write_prime_rl, "step_{}", "sparse_update_manifest.json", "base_step"),
}
CASES = [(name, fulls) for name in DIALECTS for fulls in ((), (3,), (2, 4), (5,))]


def write(folder: Path, name: str, fulls: tuple[int, ...] = ()) -> Path:
    make, form, _, _ = DIALECTS[name]
    for version in range(1, 6):
        at = folder / form.format(version)
        if version in fulls:
            write_model(at, VERSIONS[version])
        else:
            make(at, VERSIONS[version - 1], VERSIONS[version], version)
    return folder


def reached(folder: Path, step: int) -> tuple[Model, int]:
    """Return the model at a step, and how many patches were applied."""
    with closing(find_chain(folder, step)) as chain:
        model = dict(VERSIONS[0])
        if chain.full:
            files = [chain.full] if chain.full.is_file() else chain.full.glob("*.safetensors")
            model = {name: x for file in files for name, x in load_file(file).items()}
        specs = {name: spec_of(x) for name, x in model.items()}
        for patch in chain.patches:
            for name, change in patch.require(specs, ["unverified"]).items():
                pieces = change.verified(cut(raw(model[name]), 100), specs[name])
                model[name] = like(b"".join(bytes(piece) for piece in pieces), model[name])
        return model, len(chain.patches)


@pytest.mark.parametrize(("name", "fulls"), CASES)
def test_each_version_is_reached(name: str, fulls: tuple[int, ...], tmp_path: Path) -> None:
    write(tmp_path, name, fulls)
    (tmp_path / "latest").write_text("weight_v000005")
    for step in range(1, 6):
        model, count = reached(tmp_path, step)
        assert same(model, VERSIONS[step])
        assert count == step - max((full for full in fulls if full <= step), default=0)


@pytest.mark.parametrize("name", DIALECTS)
def test_only_the_versions_on_the_way_are_opened(name: str, tmp_path: Path) -> None:
    """In a store each costs requests: those before the full version and those after the step take none."""
    bucket, requests = tmp_path / "s3" / "bucket", []
    write_model(bucket / "base", VERSIONS[0])
    write(bucket / "deltas", name, fulls=(3,))
    with serve_s3(tmp_path / "s3") as server, s3_at(server.endpoint):
        for out in ("all", "few"):
            server.requests.clear()
            options: Any = {"step": 4, "allow": "unverified"}
            report = loratool.apply("s3://bucket/base", "s3://bucket/deltas", tmp_path / out, **options)
            requests.append(server.requests["GET"])
            for version in (1, 2, 5):
                shutil.rmtree(bucket / "deltas" / DIALECTS[name][1].format(version), ignore_errors=True)
    assert requests[0] == requests[1] > 0 and same(load_file(tmp_path / "all" / "model.safetensors"), VERSIONS[4])
    assert report.base == f"s3://bucket/deltas/{DIALECTS[name][1].format(3)}"
    assert report.patches == (f"s3://bucket/deltas/{DIALECTS[name][1].format(4)}",)


def test_a_bucket_of_trl(tmp_path: Path) -> None:
    for version in range(1, 6):
        both = VERSIONS[version - 1 : version + 1]
        naive.write_trl(tmp_path / "deltas" / f"step_{version:06d}.safetensors", *both, version)
    for step in range(1, 6):
        assert same(reached(tmp_path, step)[0], VERSIONS[step])
    anchor = write_model(tmp_path / "a", VERSIONS[3]) / "model.safetensors"
    (tmp_path / "anchors").mkdir()
    shutil.move(anchor, tmp_path / "anchors" / "step_000003.safetensors")
    for step in range(1, 6):
        model, count = reached(tmp_path, step)
        assert same(model, VERSIONS[step]) and count == (step if step < 3 else step - 3)
    (tmp_path / "deltas" / "step_000004.safetensors").unlink()
    with pytest.raises(InputError, match="has no version 4, on which step_000005.safetensors builds"):
        find_chain(tmp_path, 5)


def edited(folder: Path, name: str, version: int, **fields: Any) -> None:
    _, form, manifest, _ = DIALECTS[name]
    path = folder / form.format(version) / manifest
    content = json.loads(path.read_text())
    content.get("metadata", content).update(fields)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", DIALECTS)
def test_what_no_chain_is(name: str, tmp_path: Path) -> None:
    _, form, _, field = DIALECTS[name]
    write(tmp_path, name)
    number = (lambda n: f"{n:06d}") if name == "disk delta" else int
    with pytest.raises(InputError, match="has no version 9; it has 1 to 5"):
        find_chain(tmp_path, 9)
    edited(tmp_path, name, 3, **{field: number(3)})
    with pytest.raises(InputError, match="is version 3, and names 3 as the one before"):
        find_chain(tmp_path, 5)
    edited(tmp_path, name, 3, **{field: number(5)})
    with pytest.raises(InputError, match="is version 3, and names 5 as the one before"):
        find_chain(tmp_path, 5)
    edited(tmp_path, name, 3, **{field: number(1)})
    if name == "prime-rl":  # steps need not be one apart: the base is the trainer's last update
        with closing(find_chain(tmp_path, 5)) as chain:
            assert [patch.version for patch in chain.patches] == [1, 3, 4, 5]
    else:
        with pytest.raises(InputError, match="is version 3, and names 1 as the one before"):
            find_chain(tmp_path, 5)
    edited(tmp_path, name, 3, **{field: number(2)})
    shutil.rmtree(tmp_path / form.format(2))
    with pytest.raises(InputError, match=f"has no version 2, on which {form.format(3)} builds") as error:
        find_chain(tmp_path, 5)
    assert "loratool apply BASE P1 P2" in str(error.value.remedy)
    (tmp_path / form.format(5)).rename(tmp_path / form.format(2))
    with pytest.raises(InputError, match="is named as version 2, and is version 5"):
        find_chain(tmp_path, 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no version 1"):
        find_chain(tmp_path / "empty", 1)


def test_two_places_of_one_version(tmp_path: Path) -> None:
    write(tmp_path, "disk delta")
    shutil.copytree(tmp_path / "weight_v000002", tmp_path / "weight_v0000002")
    with pytest.raises(InputError, match="as one version"):
        find_chain(tmp_path, 3)
