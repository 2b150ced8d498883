"""Hold `apply` against patches that lie: what it writes is the target, byte for byte, or nothing at all.

Lies about a table or an index have the index's hash written anew, as a forger would. Names of side files, and what a
patch brings of them, are left alone: no digest covers them, so a forger decides about them as about a model.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, weights, write_model, write_peft
from damages import damaged_bytes
from fuzzing import Case, Fuzzer, Ran
from lib.files.patch_bytes import split_patch
from lies import lie
from safetensors.torch import load_file

import loratool

pytestmark = pytest.mark.fuzz

BESIDE = ("side", "base_side")  # keys of the index that no digest covers

DELTAS: dict[str, dict[str, Any]] = {
    "disk-delta": {"step": 1},
    "skyrl": {"step": 1},
    "prime-rl": {"step": 1},
    "trl": {"step": 1},
    "arc_v2": {},
}


def read(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_pair(folder: Path) -> None:
    """Write a base and a target of several types, and an adapter of one of their tensors."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    before = {f"{i}.weight": weights(24, 16, seed=i, dtype=dtype) for i, dtype in enumerate(types)}
    after = {name: (x.float() + 1e-4 * torch.randn(x.shape)).to(x.dtype) for name, x in before.items()}
    codes = torch.arange(96, dtype=torch.uint8).reshape(8, 12)
    write_model(folder / "base", {**before, "codes": codes}, {"model_type": "x"})
    write_model(folder / "tuned", {**after, "codes": codes + 3}, {"model_type": "x"})
    write_peft(folder / "adapter", {"0": factors(24, 16, 2)})


@cache
def made() -> dict[str, bytes]:
    """Return a working folder: a pair, patches of it, and its deltas in all dialects."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pair(folder)
        base, tuned = folder / "base", folder / "tuned"
        loratool.patch(base, tuned, folder / "two-way.patch", workers=1)
        loratool.patch(base, tuned, folder / "fast.patch", fast=True, one_way=True, workers=1)
        loratool.patch(base, tuned, folder / "adapter.patch", adapter=folder / "adapter", workers=1)
        for dialect, options in DELTAS.items():
            place = folder / ("trl.safetensors" if dialect == "trl" else dialect)
            if dialect == "trl":  # which has bf16 alone
                write_model(folder / "small", {"0.weight": load_file(base / "model.safetensors")["0.weight"]})
                write_model(folder / "grown", {"0.weight": load_file(tuned / "model.safetensors")["0.weight"]})
            sides = (folder / "small", folder / "grown") if dialect == "trl" else (base, tuned)
            loratool.patch(*sides, place, to=dialect, **options)  # type: ignore[arg-type]
        return read(folder)


def forged(patch: bytes, rng: random.Random) -> bytes:
    """Return a patch that lies."""
    match rng.randrange(5):
        case 0:
            return damaged_bytes(rng, patch)
        case 1:
            return patch[: rng.randrange(len(patch))]
        case 2:
            parts = split_patch(patch)
            parts.payload = damaged_bytes(rng, parts.payload)
            return parts.joined()
        case 3:
            parts = split_patch(patch)
            at, field = rng.randrange(len(parts.rows)), rng.randrange(5)
            row: list[Any] = list(parts.rows[at])
            if field < 3:
                row[field] = rng.choice(
                    (0, 1, min(row[field] + 1, (1 << 64) - 1), 1 << 20, 1 << 40, 1 << 63, (1 << 64) - 1)
                )
            else:
                row[field] = rng.choice((bytes(32), rng.randbytes(32), parts.rows[0][field]))
            parts.rows[at] = (row[0], row[1], row[2], row[3], row[4])
            return parts.joined()
        case _:
            parts = split_patch(patch)
            kept = {key: parts.index.pop(key) for key in BESIDE}
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                parts.index = lie(parts.index, rng)
            parts.index |= kept
            try:
                return parts.joined()
            except (TypeError, KeyError, AttributeError, ValueError, IndexError):  # no file has such an index
                return patch[:-1]


def make_forged(rng: random.Random) -> Case:
    name = rng.choice(("two-way.patch", "fast.patch", "adapter.patch"))
    files = {each: data for each, data in made().items() if each.startswith(("base/", "tuned/"))}
    files[name] = forged(made()[name], rng)
    back = name == "two-way.patch" and rng.randrange(3) == 0
    argv = ("apply", "tuned", name, "--reverse", "-o", "out") if back else ("apply", "base", name, "-o", "out")
    return Case(files, argv + rng.choice(((), (), ("--json",), ("--dry-run",))), ("out",))


def make_delta(rng: random.Random) -> Case:
    """Damage one file of another program's patch."""
    dialect = rng.choice([*DELTAS])
    start = "trl.safetensors" if dialect == "trl" else f"{dialect}/"
    files = {name: data for name, data in made().items() if name.startswith(start)}
    name = rng.choice([*files])
    files[name] = rng.choice((damaged_bytes(rng, files[name]), files[name][: rng.randrange(len(files[name]) + 1)]))
    base = "small" if dialect == "trl" else "base"
    files |= {each: data for each, data in made().items() if each.startswith((f"{base}/", "tuned/", "grown/"))}
    argv = ("apply", base, start.rstrip("/"), "-o", "out")
    return Case(files, (*argv, *(("--allow", "unverified") if dialect == "trl" else ())), ("out",))


def is_target(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    """Tell what else than the target, or of a way back the base, was written."""
    if ran.code:
        return
    if "--dry-run" in case.argv:
        if (work / "out").exists():
            yield "a dry run wrote"
        return
    wanted, found = read(work / ("base" if "--reverse" in case.argv else "tuned")), read(work / "out")
    weights_of = [{n: data for n, data in each.items() if n.endswith(".safetensors")} for each in (wanted, found)]
    if weights_of[0] != weights_of[1]:
        yield "these are not the target's weights"


def has_numbers_of_a_patch(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    """Tell numbers that are neither the target's nor the base's; of TRL and prime-rl nothing proves the result."""
    if ran.code or case.argv[2].startswith(("trl", "prime-rl")):
        return
    base, tuned, out = (load_file(work / name / "model.safetensors") for name in ("base", "tuned", "out"))
    for name, x in out.items():
        if not any(torch.equal(x.view(torch.uint8), each[name].view(torch.uint8)) for each in (base, tuned)):
            yield f"{name} is of neither model"


def test_patch_apply(fuzz: Fuzzer) -> None:
    fuzz(make_forged, 4, is_target)


def test_patch_of_another_program(fuzz: Fuzzer) -> None:
    fuzz(make_delta, 4, has_numbers_of_a_patch)
