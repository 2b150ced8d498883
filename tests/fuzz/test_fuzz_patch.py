"""Hold `apply` against patches that lie: what it writes is the target, byte for byte, or nothing at all."""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import slow
from fuzzing import MOST_FAILURES, Case, Fuzzer, Ran
from patch_lies import (
    DELTAS,
    FORGERIES,
    KINDS,
    UNPROVEN,
    damaged_delta,
    forge_patch,
    is_other,
    read,
    target_of,
    weights_of,
    write_all,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.fuzz

BATCH = 250  # cases of a process, which take a second or, beside other work, some

SIZES = {
    "tiny": (24, 16),
    "of two lanes": (160, 64),
}  # of the models' matrices: at 8,192 numbers a stream has two states


@cache
def made() -> dict[str, bytes]:
    """Return a working folder: a pair, patches of it, and its deltas in all dialects."""
    with tempfile.TemporaryDirectory() as temporary:
        write_all(Path(temporary))
        return read(Path(temporary))


def make_forged(rng: random.Random) -> Case:
    forged, call = forge_patch(rng.choice([*FORGERIES]), rng, made())
    files = {each: data for each, data in made().items() if each.startswith(("base/", "tuned/", "renamed/"))}
    back = ("--reverse",) * call["reverse"]
    argv = ("apply", call["base"], call["patches"], *back, "-o", "out")
    return Case({**files, **forged}, argv + rng.choice(((), (), ("--json",), ("--dry-run",))), ("out",))


def make_delta(rng: random.Random) -> Case:
    """Damage one file of another program's patch."""
    dialect = rng.choice([*DELTAS])
    start = "trl.safetensors" if dialect == "trl" else f"{dialect}/"
    files = {name: data for name, data in made().items() if name.startswith(start)}
    name = rng.choice([*files])
    files[name] = damaged_delta(rng, files[name])
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
    wanted = read(work / ("base" if "--reverse" in case.argv else target_of(case.argv[2])))
    found = read(work / "out")
    if [*weights_of(wanted).values()] != [*weights_of(found).values()]:  # a forger may give the file another name
        yield "these are not the target's weights"


def has_numbers_of_a_patch(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    """Tell numbers that are neither the target's nor the base's."""
    if ran.code or case.argv[2].startswith(UNPROVEN):
        return
    base, tuned, out = (load_file(work / name / "model.safetensors") for name in ("base", "tuned", "out"))
    yield from (f"{name} is of neither model" for name in out if is_other(name, out, [base, tuned]))


def test_patch_apply(fuzz: Fuzzer) -> None:
    fuzz(make_forged, 4, is_target)


def test_patch_of_another_program(fuzz: Fuzzer) -> None:
    fuzz(make_delta, 4, has_numbers_of_a_patch)


@pytest.mark.parametrize("size", ["tiny", slow("of two lanes")])
@pytest.mark.parametrize("kind", KINDS)
def test_patches_in_one_process(kind: str, size: str, fuzz: Fuzzer, tmp_path: Path) -> None:
    write_all(tmp_path / "made", *SIZES[size])
    until = time.monotonic() + fuzz.seconds
    for first in itertools.count(0, BATCH) if fuzz.seed is None else [fuzz.seed]:
        if (fuzz.seed is None and first and time.monotonic() > until) or len(fuzz.failures) >= MOST_FAILURES:
            break
        count = (BATCH if fuzz.seconds else 20) if fuzz.seed is None else 1
        faults = fuzz.server.call("patch_lies:run_batch", kind, str(tmp_path / "made"), first, count)
        if faults is None:  # it was killed, or took too long
            faults = [(first, f"a batch of {count} from this seed on did not end")]
        fuzz.failures += [f"--fuzz-seed {seed} {kind}: {what}" for seed, what in faults]
        fuzz.ran += count
        for each in tmp_path.iterdir():
            if each.name != "made":
                shutil.rmtree(each)
    fuzz.end()
