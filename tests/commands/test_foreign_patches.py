"""Hold patches of other programs, written and applied by the commands, to the bytes of the model that they make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, bits, load_model, weights, write_model

import loratool
from loratool.commands.choices import PATCH_DIALECTS
from loratool.patches.dialects.table import DIALECTS

BASE, TUNED = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
Run = Callable[..., Any]

WRITTEN: dict[str, dict[str, Any]] = {
    "disk-delta": {"step": 1},
    "disk-delta overwrite": {"step": 1, "encoding": "overwrite", "checksum": "adler32"},
    "disk-delta blake3": {"step": 1, "checksum": "blake3"},
    "skyrl": {"step": 1},
    "prime-rl": {"step": 1},
    "trl": {"step": 1},
    "trl raw": {"step": 1, "encoding": "raw"},
    "arc_v2": {},
}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("how", WRITTEN)
def test_what_is_written_is_applied(how: str, tmp_path: Path) -> None:
    """The headers are the base's: a dialect says tensors alone."""
    dialect, out = how.split()[0], tmp_path / ("p.safetensors" if how.startswith("trl") else "p")
    report = loratool.patch(BASE, TUNED, out, to=dialect, **WRITTEN[how])  # type: ignore[arg-type]
    assert len(report.changed) + report.unchanged == len(load_model(BASE))  # type: ignore[union-attr]
    allow = ("unverified",) if dialect == "trl" else ()
    made = loratool.apply(BASE, out, tmp_path / "made", allow=allow)  # type: ignore[arg-type]
    made_bits, bits_of_tuned = (
        {n: bits(x) for n, x in load_model(each).items()} for each in (tmp_path / "made", TUNED)
    )
    assert made_bits.keys() == bits_of_tuned.keys()
    assert all(torch.equal(made_bits[name], bits_of_tuned[name]) for name in made_bits)
    assert (tmp_path / "made" / "config.json").read_bytes() == (BASE / "config.json").read_bytes()
    assert bool(made.checked) is (dialect not in ("trl", "prime-rl"))  # which say nothing of the result
    loratool.apply(BASE, out, tmp_path / "dry", dry_run=True, allow=allow)  # type: ignore[arg-type]
    assert not (tmp_path / "dry").exists()


def versions(folder: Path) -> list[Path]:
    """Write four models, each a step from the one before."""
    W, models = weights(64, 48, dtype=torch.bfloat16), list[Path]()
    for step in range(4):
        models.append(write_model(folder / f"v{step}", {"x.weight": W, "same": torch.ones(5)}, {"model_type": "x"}))
        W = (W.float() + 1e-5 * torch.randn(64, 48)).bfloat16()
    return models


def test_a_chain_in_a_folder_of_versions(tmp_path: Path, run: Run) -> None:
    models, shared = versions(tmp_path), tmp_path / "shared"
    shared.mkdir()
    for step in range(1, 4):
        loratool.patch(models[step - 1], models[step], shared / f"weight_v{step:06d}", to="disk-delta")
    for step in (1, 2, 3):
        loratool.apply(models[0], shared, tmp_path / f"made{step}", step=step)
        assert weights_of(tmp_path / f"made{step}") == weights_of(models[step])
    patches = [shared / f"weight_v{step:06d}" for step in range(1, 4)]
    loratool.apply(models[0], patches, tmp_path / "by-name")
    assert weights_of(tmp_path / "by-name") == weights_of(models[3])
    result = run("apply", models[0], patches[0], patches[2], "-o", tmp_path / "gap")
    assert result.exit_code == 3 and "is of version 2, and" in result.stderr
    shutil.rmtree(patches[1])
    shutil.copytree(models[2], patches[1])  # a full version
    loratool.apply(models[0], shared, tmp_path / "from-full", step=3)
    assert weights_of(tmp_path / "from-full") == weights_of(models[3])


def test_what_is_refused(tmp_path: Path, run: Run) -> None:
    models, delta = versions(tmp_path), tmp_path / "weight_v000001"
    loratool.patch(models[0], models[1], delta, to="disk-delta")
    calls = {
        ("apply", models[2], delta): (3, "another base, or a damaged patch"),
        ("apply", models[0], delta, "--reverse"): (2, "lead one way"),
        ("apply", models[0], models[1]): (3, "is a folder, and no patch"),
        ("merge", delta, FIXTURES / "llama" / "adapter"): (3, "loratool apply BASE IT -o OUT"),
    }
    for call, (code, words) in calls.items():
        result = run(*call, "-o", tmp_path / "out")
        assert (result.exit_code, words in result.stderr) == (code, True), (call, result.stderr)
        assert not (tmp_path / "out").exists()
    for options, words in {
        ("--to", "arc_v2", "--checksum", "adler32"): "--checksum: arc_v2 has no such option",
        ("--to", "skyrl", "--fast"): "is for patches of loratool",
        ("--step", "3"): "is for patches of other programs",
    }.items():
        result = run("patch", *models[:2], *options, "-o", tmp_path / "out")
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert not (tmp_path / "out").exists()


def test_a_patch_without_a_check_needs_a_word(tmp_path: Path, run: Run) -> None:
    models, delta = versions(tmp_path), tmp_path / "p.safetensors"
    loratool.patch(models[0], models[1], delta, to="trl", step=1)
    result = run("apply", models[0], delta, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 4 and "--allow unverified" in json.dumps(json.loads(result.stdout)["error"])
    assert not (tmp_path / "out").exists()


def test_the_dialects_that_are_named_are_those_that_are_written() -> None:
    written = {key for key, row in DIALECTS.items() if row.write}
    assert {*PATCH_DIALECTS} == written == {each.split()[0] for each in WRITTEN}


def test_a_run_goes_on_with_the_same_patch_alone(tmp_path: Path) -> None:
    """Else an output would have tensors of two versions."""
    models, delta = versions(tmp_path), tmp_path / "weight_v000001"
    loratool.patch(models[0], models[1], delta, to="disk-delta")

    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        loratool.apply(models[0], delta, tmp_path / "out", workers=1, progress=full)
    assert (tmp_path / "out.loratool-journal").is_dir()
    shutil.rmtree(delta)
    loratool.patch(models[0], models[2], delta, to="disk-delta")
    with pytest.raises(loratool.UsageError, match="is of a run with other"):
        loratool.apply(models[0], delta, tmp_path / "out", resume=True)
    loratool.apply(models[0], delta, tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(models[2])


def test_a_manifest_that_is_no_deltas_is_the_users(tmp_path: Path, run: Run) -> None:
    models, out = versions(tmp_path), tmp_path / "out"
    call = ("patch", *models[:2], "--to", "skyrl", "--step", "1", "-o", out)
    assert run(*call).exit_code == 0 and run(*call, "--force").exit_code == 0
    shutil.rmtree(out)
    shutil.copytree(models[0], out)
    (out / "manifest.json").write_text('{"name": "mine"}')
    for command in (call, ("apply", models[0], models[1], "-o", out), ("convert", models[0], "-o", out)):
        result = run(*command, "--force")
        assert result.exit_code in (2, 3) and (out / "manifest.json").read_text() == '{"name": "mine"}', result.stderr
