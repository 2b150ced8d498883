"""Run `verify --attestation`: hold a statement of `write` against the files, and compute the merge that it states.

First the statement's form, then the sha256 of the model's files and the digests of the inputs. Only if all are as
stated the merge is computed again, with the options that the statement has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.expressions import parse as parse_expression
from ...adapters.expressions import repeats
from ...errors import LoratoolError, UsageError, brief
from ...files.checkpoint import open_checkpoint
from ...files.dtypes import MERGE_DTYPES, TORCH_FLOATS
from ...files.folder.side_files import AN_ADAPTER, OTHER_WEIGHTS, side_row
from ...files.hub.cache import NO_SUCH, place_named, resolve
from ...files.hub.names import parse_hub_name
from ...files.hub.snapshots import look_up
from ...files.weights_file import paths_of
from ...numerics.merge import ARITHMETIC_VERSION
from ...streaming.parallel import map_in_order, worker_count
from ...views.attestation import AttestationReport, Deviation
from ...views.verify import VerifyReport
from ..adapter_requests import AdapterRequest, parse_adapters
from ..digests import opened_files
from ..run.steps import Step, read_step
from ..statements import (
    BUILD_TYPE,
    CONFIG_DIGEST,
    MODEL_DIGEST,
    PROVENANCE,
    Statement,
    hash_of,
    place_of,
    read_statement,
    require_sha256,
)
from ..verify.call import Verify, VerifyAttestation
from ..verify.command import run_verify
from .write import OF_THE_MACHINE, digests_of, inputs_of, names_of_weights

OF_MERGES = ("merge", "verify")  # commands whose output is a merged model

SHARED = ("target", "exclude", "layers", "drop", "alpha", "tied", "initial", "residual_base")  # with `verify`

RECOMPUTED = ("base", "adapter", "initial")  # inputs that `verify` reads

MOST_REPEATS = 3  # of an expression, one after the other

LOADED = (OTHER_WEIGHTS, AN_ADAPTER)  # files that programs load by their names

NAME_THEM = "name them: loratool verify --attestation FILE BASE ADAPTER... MERGED"


@dataclass(frozen=True)
class _Input:
    """An input of the stated call: `base`, `adapter` or another, as the statement names it."""

    name: str
    path: str  # in the recipe
    uri: str
    digests: Mapping[str, str]


@dataclass(frozen=True)
class _Stated:
    """A statement about a merge, with its call parsed."""

    statement: Statement
    step: Step
    inputs: tuple[_Input, ...]


def run_verify_attestation(call: VerifyAttestation) -> AttestationReport:
    """Hold a statement against the files, and compute its merge again."""
    stated = _read(place_named(call.attestation))
    paths, merged = _named(call, stated)
    workers = call.workers or worker_count()
    files, differences = _hold_files(stated, merged, workers)
    differences += _hold_inputs(stated, paths)
    proof = None
    if not differences:
        proof = run_verify(_verification(call, stated, paths, merged))
        differences += _hold_dtypes(stated.step, proof, paths[0], merged)
    return AttestationReport(
        attestation=os.fspath(call.attestation),
        base=paths[0],
        adapters=tuple(path for each, path in zip(stated.inputs, paths, strict=True) if each.name == "adapter"),
        merged=merged,
        files=files,
        inputs=len(stated.inputs),
        differences=tuple(differences),
        proof=proof,
    )


def _read(path: Path) -> _Stated:
    """Read a statement about a merge. Raise InputError for any other."""
    statement = read_statement(path)
    if statement.predicate_type != PROVENANCE:
        raise statement.refuse(f"has a predicate of type {brief(statement.predicate_type)}, not {PROVENANCE}")
    build = statement.predicate.get("buildDefinition")
    build = build if isinstance(build, dict) else {}
    if build.get("buildType") != BUILD_TYPE:
        raise statement.refuse(f"has the build type {brief(build.get('buildType'))}, not {BUILD_TYPE}")
    internal = build.get("internalParameters")
    arithmetic = internal.get("arithmetic") if isinstance(internal, dict) else None
    if type(arithmetic) is not int or arithmetic != ARITHMETIC_VERSION:
        theirs = f"was made with version {brief(arithmetic)} of the arithmetic"
        raise statement.refuse(f"{theirs}, and this loratool computes version {ARITHMETIC_VERSION}")
    recipe = build.get("externalParameters")
    if not isinstance(recipe, dict):
        raise statement.refuse("has no recipe")
    if recipe.get("command") not in OF_MERGES:
        raise statement.refuse(f"is about {brief(recipe.get('command'))}, and only a merge is computed again")
    if words := [word for word in OF_THE_MACHINE if word in recipe]:
        raise statement.refuse(f"has {words[0]} in its recipe, which states nothing about the output")
    try:
        step, needed = read_step(1, recipe), [*inputs_of(recipe)]
    except LoratoolError as error:
        raise statement.refuse(f"has a recipe that cannot be read: {'; '.join(error.what)}") from error
    _refuse_costly(statement, step)
    inputs = _with_digests(statement, build.get("resolvedDependencies"), needed)
    return _Stated(statement, step, tuple(each for each in inputs if each.name in RECOMPUTED))


def _refuse_costly(statement: Statement, step: Step) -> None:
    """Raise InputError for a regular expression that can take very long: nobody here has written it."""
    patterns = [*step.arguments.get("target", ()), *step.arguments.get("exclude", ())]
    patterns += [part for each in parse_adapters(step.arguments["adapters"]) for part in each.module_weights]
    for expression in (each.removeprefix("re:") for each in patterns if each.startswith("re:")):
        if repeats(parse_expression(expression, str(statement.path))) > MOST_REPEATS:
            raise statement.refuse(f"has the expression {brief(expression)}, which can take very long to match")


def _with_digests(statement: Statement, listed: Any, needed: list[tuple[str, str]]) -> Iterator[_Input]:
    """Yield the inputs of the stated call, each with its digests. Their order is that of the call."""
    entries = listed if isinstance(listed, list) else []
    found = [each for each in entries if isinstance(each, dict)]
    if len(found) != len(needed) or [each.get("name") for each in found] != [name for name, _ in needed]:
        raise statement.refuse("has other inputs in its digests than in its recipe")
    for entry, (name, path) in zip(found, needed, strict=True):
        digests, uri = entry.get("digest"), entry.get("uri")
        digests = digests if isinstance(digests, dict) else {}
        known = {key: digests[key] for key in ("sha256", MODEL_DIGEST, CONFIG_DIGEST) if key in digests}
        if known.keys() <= {CONFIG_DIGEST} and name in RECOMPUTED:
            raise statement.refuse(f"has no digest of {name} {brief(path)} that is known here")
        for digest in known.values():
            require_sha256(digest, f"{name} {brief(path)}", statement.path)
        yield _Input(name, path, uri if isinstance(uri, str) else "", known)


def _named(call: VerifyAttestation, stated: _Stated) -> tuple[list[str], str]:
    """Return the path of each input, and of the merged model: those of the call, else those of the statement."""
    given = [each is not None for each in (call.base, call.adapters, call.merged)]
    if any(given) and not all(given):
        raise UsageError("needs BASE, ADAPTER and MERGED, or none of them", culprit="--attestation")
    if call.initial is not None and all(each.name != "initial" for each in stated.inputs):
        raise UsageError("the statement has no initial adapter", culprit="--initial")
    adapters = _given_adapters(call, stated) if call.adapters is not None else []
    theirs = [each for each in stated.inputs if each.name == "adapter"]
    named = {id(each): adapter.path for each, adapter in zip(theirs, adapters, strict=False)}
    paths = []
    for each in stated.inputs:
        if each.name == "base" and call.base is not None:
            paths.append(os.fspath(call.base))
        elif each.name == "initial" and call.initial is not None:
            paths.append(os.fspath(call.initial))
        else:
            paths.append(named.get(id(each)) or _here(stated.statement, each.name, each.path, each.uri))
    if call.merged is not None:
        return paths, os.fspath(call.merged)
    word = "out" if stated.step.command == "merge" else "merged"
    return paths, _here(stated.statement, "the merged model", str(stated.step.arguments[word]), "")


def _given_adapters(call: VerifyAttestation, stated: _Stated) -> list[AdapterRequest]:
    requests = parse_adapters(call.adapters or ())
    count = len(parse_adapters(stated.step.arguments["adapters"]))
    for each in requests:
        if each.weight != 1 or each.module_weights:
            raise UsageError("has a weight, which is the statement's", culprit=each.path, remedy="give the path alone")
    if len(requests) != count:
        raise UsageError(f"is about {count} adapters, and {len(requests)} are given", culprit=str(call.attestation))
    return requests


def _here(statement: Statement, name: str, path: str, uri: str) -> str:
    """Return a path that only the statement names, if it exists here or is in the hub's cache; nothing is downloaded.

    A model of the hub is that of the statement's commit, which `uri` has.
    """
    if os.path.exists(path):
        return path
    try:
        hub = parse_hub_name(uri) or parse_hub_name(path)
        cached = look_up(hub) if hub else None
    except (LoratoolError, OSError, ValueError) as error:
        raise statement.refuse(f"names {brief(path)} as {name}, which is not here", NAME_THEM) from error
    if not hub or not cached or not cached.snapshot or not cached.is_complete:
        raise statement.refuse(f"names {brief(path)} as {name}: {NO_SUCH}", NAME_THEM)
    return str(cached.snapshot / hub.path)


def _hold_files(stated: _Stated, merged: str, workers: int) -> tuple[int, list[Deviation]]:
    """Hold the subjects against the model's files. Return how many there are, and the differences.

    All weights that the model is read from must be among them. Those of a merge are a whole folder, so there it may
    have no other weights either, which another program could load.
    """
    statement = stated.statement
    found_at = resolve(merged)
    folder = found_at if found_at.is_dir() else found_at.parent
    places = {name: place_of(statement, name, folder) for name in statement.subjects}
    differences = list[Deviation]()
    with closing(map_in_order(hash_of, places.values(), workers)) as hashes:
        for (name, digest), found in zip(statement.subjects.items(), hashes, strict=True):
            if found != digest:
                differences.append(Deviation("file", name, digest, found))
    if not differences:  # else it may be damaged
        with closing(open_checkpoint(merged)) as model:
            names = {*names_of_weights(folder, paths_of(model.shards))}
        if stated.step.command == "merge" and found_at.is_dir():
            names |= {name for name in _names_in(folder) if (row := side_row(name)) and row.left in LOADED}
        differences = [Deviation("file", name, None, None) for name in sorted(names) if name not in places]
    return len(places), differences


def _names_in(folder: Path) -> Iterator[str]:
    """Yield all files in a folder and below it, by their names relative to it."""
    for inner, _, names in os.walk(folder):
        yield from (Path(os.path.relpath(os.path.join(inner, name), folder)).as_posix() for name in names)


def _hold_inputs(stated: _Stated, paths: list[str]) -> list[Deviation]:
    differences = []
    for each, path in zip(stated.inputs, paths, strict=True):
        found = digests_of(each.name, resolve(path))
        if not found:
            with opened_files(path):  # which says why it has none
                pass
        held = [key for key in each.digests if key in found or key == CONFIG_DIGEST]
        wrong = next((key for key in held if found.get(key) != each.digests[key]), None)
        if wrong or not {*held} - {CONFIG_DIGEST}:
            key = wrong or next(iter(each.digests))
            what = f"config of {each.name}" if key == CONFIG_DIGEST else each.name
            differences.append(Deviation(what, path, each.digests[key], found.get(key)))
    return differences


def _verification(call: VerifyAttestation, stated: _Stated, paths: list[str], merged: str) -> Verify:
    """Return the call of `verify` with the options of the statement."""
    arguments = {name: stated.step.arguments[name] for name in SHARED if name in stated.step.arguments}
    by_name = [(each.name, path) for each, path in zip(stated.inputs, paths, strict=True)]
    requests = parse_adapters(stated.step.arguments["adapters"])
    adapters = [path for name, path in by_name if name == "adapter"]
    arguments |= {name: path for name, path in by_name if name == "initial"}
    (base,) = (path for name, path in by_name if name == "base")
    return Verify(
        base,
        [(path, each.weight, each.module_weights) for path, each in zip(adapters, requests, strict=True)],
        merged,
        allow=call.allow,
        exhaustive=call.exhaustive,
        progress=call.progress,
        workers=call.workers,
        **arguments,
    )


def _hold_dtypes(step: Step, proof: VerifyReport, base: str, merged: str) -> list[Deviation]:
    """Hold the dtypes of the weights that changed against the stated dtype: `verify` takes a merge in each of them."""
    if step.command != "merge" or step.arguments.get("like"):
        return []
    wanted = MERGE_DTYPES[step.arguments.get("dtype", "keep")]
    with closing(open_checkpoint(base)) as before, closing(open_checkpoint(merged)) as after:
        for each in proof.tensors:
            source, found = before.stored.get(each.name), after.stored.get(each.name)
            if source and found and {source.dtype, found.dtype} <= set(TORCH_FLOATS):
                stated = wanted or source.dtype
                if found.dtype != stated and each.name not in before.weights:
                    return [Deviation("dtype", each.name, stated, found.dtype)]
    return []
