"""Make patches that lie, and apply many of them in one process.

Lies about a table or an index have the index's hash written anew, as a forger would. Names of side files, and what a
patch brings of them, are left alone: no digest covers them, so a forger decides about them as about a model.

A case of `run_batch` takes a tenth of the time of one that has a process of its own. It is held to the same: the
target's bytes, or an error that the patch is to blame for and nothing written; no path outside of the output; memory
that follows from the spans.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import factors, weights, write_model, write_peft
from damages import damaged_bytes
from fuzz_server import watch
from lib.files.patch_bytes import split_patch
from lies import lie
from safetensors.torch import load, load_file

import loratool
from loratool.errors import LoratoolError
from loratool.patches.dialects.compression import zstd_module

BESIDE = ("side", "base_side")  # keys of the index that no digest covers

DELTAS: dict[str, dict[str, Any]] = {
    "disk-delta": {"step": 1},
    "skyrl": {"step": 1},
    "prime-rl": {"step": 1},
    "trl": {"step": 1},
    "arc_v2": {},
}
UNPROVEN = ("trl", "prime-rl")  # whose results nothing proves

MOST_MEMORY = 64 << 20  # bytes that a case may take: the models of a batch have 100 kB at most
CODES = (2, 3, 4)  # of errors: the output's name, the patch, what --allow accepts

Files = Mapping[str, bytes]


def read(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_pair(folder: Path, rows: int, columns: int) -> None:
    """Write a base and two targets of several types, and an adapter of one of their tensors."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    before = {f"{i}.weight": weights(rows, columns, seed=i, dtype=dtype) for i, dtype in enumerate(types)}
    after = {name: (x.float() + 1e-4 * torch.randn(x.shape)).to(x.dtype) for name, x in before.items()}
    codes = torch.arange(96, dtype=torch.uint8).reshape(8, 12)
    write_model(folder / "base", {**before, "codes": codes}, {"model_type": "x"})
    write_model(folder / "tuned", {**after, "codes": codes + 3}, {"model_type": "x"})
    write_model(folder / "renamed", {**after, "other.codes": codes}, {"model_type": "x"})
    write_peft(folder / "adapter", {"0": factors(rows, columns, 2)})


def write_all(folder: Path, rows: int = 24, columns: int = 16) -> None:
    """Write a pair, patches of it, and its deltas in all dialects."""
    write_pair(folder, rows, columns)
    base, tuned = folder / "base", folder / "tuned"
    loratool.patch(base, tuned, folder / "two-way.patch", workers=1)
    loratool.patch(base, tuned, folder / "fast.patch", fast=True, workers=1)
    loratool.patch(base, tuned, folder / "one-way.patch", one_way=True, workers=1)
    loratool.patch(base, folder / "renamed", folder / "renamed.patch", workers=1)
    loratool.patch(base, tuned, folder / "adapter.patch", adapter=folder / "adapter", workers=1)
    for dialect, options in DELTAS.items():
        place = folder / ("trl.safetensors" if dialect == "trl" else dialect)
        if dialect == "trl":  # which has bf16 alone
            write_model(folder / "small", {"0.weight": load_file(base / "model.safetensors")["0.weight"]})
            write_model(folder / "grown", {"0.weight": load_file(tuned / "model.safetensors")["0.weight"]})
        sides = (folder / "small", folder / "grown") if dialect == "trl" else (base, tuned)
        loratool.patch(*sides, place, to=dialect, **options)  # type: ignore[arg-type]


def with_damage(patch: bytes, rng: random.Random) -> bytes:
    return damaged_bytes(rng, patch) if rng.randrange(2) else patch[: rng.randrange(len(patch))]


def with_other_codes(patch: bytes, rng: random.Random) -> bytes:
    """Return a patch whose bodies, or ways back, are others: their coders have to notice, or the hash of the span."""
    parts = split_patch(patch)
    made = bytearray(parts.payload)
    if rng.randrange(3):  # of the same length, so that each body has the bytes that the table says
        for _ in range(rng.choice((1, 1, 2, 8))):
            made[rng.randrange(len(made))] = rng.choice((0, 1, 2, 127, 128, 255, rng.randrange(256)))
        parts.payload = bytes(made)
    else:
        parts.payload = damaged_bytes(rng, parts.payload)
    return parts.joined()


def with_other_rows(patch: bytes, rng: random.Random) -> bytes:
    parts = split_patch(patch)
    at, field = rng.randrange(len(parts.rows)), rng.randrange(6)
    row: list[Any] = list(parts.rows[at])
    if field < 3:
        row[field] = rng.choice((0, 1, min(row[field] + 1, (1 << 64) - 1), 1 << 20, 1 << 40, 1 << 63, (1 << 64) - 1))
    elif field < 5:
        row[field] = rng.choice((bytes(32), rng.randbytes(32), parts.rows[0][field]))
    else:
        row = [*rng.choice(parts.rows)]
    parts.rows[at] = (row[0], row[1], row[2], row[3], row[4])
    if not rng.randrange(8):
        parts.rows = rng.choice((parts.rows[1:], parts.rows * 2, parts.rows[::-1]))
    return parts.joined()


def with_other_index(patch: bytes, rng: random.Random) -> bytes:
    parts = split_patch(patch)
    kept = {key: parts.index.pop(key) for key in BESIDE}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        parts.index = lie(parts.index, rng)
    parts.index |= kept
    try:
        return parts.joined()
    except (TypeError, KeyError, AttributeError, ValueError, IndexError):  # no file has such an index
        return patch[:-1]


FORGERIES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "file": with_damage,
    "coder": with_other_codes,
    "table": with_other_rows,
    "index": with_other_index,
}


def damaged_delta(rng: random.Random, data: bytes) -> bytes:
    """Damage a file of another program's patch: its bytes, the JSON that it is or begins with, or a tensor."""
    kind = rng.randrange(4)
    if kind == 0:
        return damaged_bytes(rng, data)
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    length = int.from_bytes(data[:8], "little")
    is_json = length > len(data)
    try:
        if is_json:
            return json.dumps(lie(json.loads(data), rng)).encode()
        header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
        if kind == 2:
            return _joined(lie(header, rng), tensors)
        name = rng.choice([name for name in header if name != "__metadata__"])
        first, last = header[name]["data_offsets"]
        found = tensors[first:last]
        if found.startswith(b"\x28\xb5\x2f\xfd"):
            found = zstd_module().compress(damaged_bytes(rng, zstd_module().decompress(found)), 1)
        else:
            found = damaged_bytes(rng, found)
        return _with_tensor(header, tensors, name, found)
    except (TypeError, ValueError, KeyError, IndexError):  # no file has such a header
        return data[:-1]


def _with_tensor(header: dict[str, Any], tensors: bytes, name: str, data: bytes) -> bytes:
    """Return a safetensors file, one of whose tensors is other bytes."""
    first, last = header[name]["data_offsets"]
    more = len(data) - (last - first)
    for entry in (entry for each, entry in header.items() if each != "__metadata__"):
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [begin + more * (begin >= last and begin > first), end + more * (end >= last)]
    if header[name]["shape"] == [last - first]:
        header[name]["shape"] = [len(data)]
    return _joined(header, tensors[:first] + data + tensors[last:])


def _joined(header: Any, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def weights_of(files: Files) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def is_other(name: str, tensors: Mapping[str, torch.Tensor], models: list[dict[str, torch.Tensor]]) -> bool:
    """Return whether a tensor is that of no model."""
    x = tensors[name].view(torch.uint8)
    return not any(torch.equal(x, each[name].view(torch.uint8)) for each in models)


def target_of(patch: str) -> str:
    return "renamed" if patch == "renamed.patch" else "tuned"


def forge_patch(kind: str, rng: random.Random, files: Files) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return files of a patch that lies, and the arguments of `apply`."""
    name = rng.choice(("two-way.patch", "fast.patch", "renamed.patch", "one-way.patch", "adapter.patch"))
    back = name not in ("one-way.patch", "adapter.patch") and rng.randrange(3) == 0
    call = {"base": target_of(name) if back else "base", "patches": name, "reverse": back}
    return {name: FORGERIES[kind](files[name], rng)}, {**call, "dry_run": rng.randrange(4) == 0}


def forge_delta(dialect: str, rng: random.Random, files: Files) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return files of another program's patch, one of which is damaged, and the arguments of `apply`."""
    start = "trl.safetensors" if dialect == "trl" else f"{dialect}/"
    made = {name: data for name, data in files.items() if name.startswith(start)}
    name = rng.choice([*made])
    made[name] = damaged_delta(rng, made[name])
    allow = ("unverified",) if dialect == "trl" else ()
    return made, {"base": "small" if dialect == "trl" else "base", "patches": start.rstrip("/"), "allow": allow}


def faults_of_patch(out: Files, files: Files, call: Mapping[str, Any]) -> Iterator[str]:
    """Tell what else than the target was written; a forger may name the file, as it may name one of a model."""
    wanted = "base" if call["reverse"] else target_of(call["patches"])
    if [*weights_of(out).values()] != [files[f"{wanted}/model.safetensors"]]:
        yield "these are not the target's weights"


def faults_of_delta(out: Files, files: Files, call: Mapping[str, Any]) -> Iterator[str]:
    if call["patches"].startswith(UNPROVEN):
        return
    models = [load(files[f"{each}/model.safetensors"]) for each in ("base", "tuned")]
    made = load(out["model.safetensors"])
    yield from (f"{name} is of neither model" for name in made if is_other(name, made, models))


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Iterator[str]]]] = {
    **{kind: (partial(forge_patch, kind), faults_of_patch) for kind in FORGERIES},
    **{dialect: (partial(forge_delta, dialect), faults_of_delta) for dialect in DELTAS},
}


def run_batch(kind: str, folder: str, first: int, count: int) -> list[tuple[int, str]]:
    """Run cases in a folder of `write_all`, and return the seed and the fault of those that broke a promise.

    The process is to end afterwards, as it goes on to watch what is changed.
    """
    make, judge = KINDS[kind]
    files, place = read(Path(folder)), Path(tempfile.mkdtemp(dir=Path(folder).parent))
    work, changed, programs = place / "work", list[str](), list[str]()
    (place / "tmp").mkdir()
    tempfile.tempdir = str(place / "tmp")
    write(work, files)
    os.chdir(work)
    before = _listed(work)
    peak = Peak()
    sys.addaudithook(watch(str(place.resolve()), changed, programs))
    wrong = []
    for seed in range(first, first + count):
        made, call = make(random.Random(f"{kind}:{seed}"), files)
        write(work, made)
        peak.reset()
        faults = [*_applied(call, work, files, judge)]
        if peak.taken() > MOST_MEMORY:
            faults.append(f"took {peak.taken() >> 20} MB")
        shutil.rmtree(work / "out", ignore_errors=True)
        write(work, {name: files[name] for name in made})
        faults += [f"changed or ran {each}" for each in (*changed, *programs)]
        changed.clear()
        programs.clear()
        if _listed(work) != before or os.listdir(place / "tmp"):
            faults.append(f"left {sorted(_listed(work) ^ before)} and {os.listdir(place / 'tmp')}")
        wrong += [(seed, each) for each in faults[:1]]
    return wrong


class Peak:
    """The most memory that this process took since a moment."""

    def __init__(self) -> None:
        self._mark, self._status = open("/proc/self/clear_refs", "wb", 0), open("/proc/self/status", "rb", 0)  # noqa: SIM115
        self._used = 0

    def reset(self) -> None:
        self._mark.write(b"5")
        self._used = self._read(b"VmRSS:")

    def taken(self) -> int:
        """Return the bytes at the peak, less those at the reset."""
        return self._read(b"VmHWM:") - self._used

    def _read(self, key: bytes) -> int:
        text = os.pread(self._status.fileno(), 4096, 0)
        return 1024 * int(text[text.index(key) :].split(None, 2)[1])


def _listed(folder: Path) -> set[str]:
    return {os.path.join(root, name) for root, folders, names in os.walk(folder) for name in folders + names}


def _applied(call: Mapping[str, Any], work: Path, files: Files, judge: Callable[..., Iterator[str]]) -> Iterator[str]:
    """Apply what a case is, and tell what is wrong with how that ended."""
    try:
        loratool.apply(out="out", workers=1, **call)
    except LoratoolError as error:
        if error.exit_code not in CODES:
            yield f"exit code {error.exit_code}: {error}"
        if (work / "out").exists():
            yield f"left an output after {error}"
    except Exception as error:
        yield f"raised {type(error).__name__}: {error}"
    else:
        if (work / "out").exists() is call.get("dry_run", False):
            yield "no output, or that of a dry run"
        elif (work / "out").exists():
            yield from judge(read(work / "out"), files, call)
