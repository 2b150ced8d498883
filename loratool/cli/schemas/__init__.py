"""JSON Schemas of each command's `--json`, which `--json-schema` prints. `recipe` has that of recipes.

A schema is built from the fields of the report and from the tables that define its words, so that it always agrees with
the report. It is closed: an extra key, a missing key or another type does not fit. Programs can rely on all of it as
long as the number `schema` is the same. A report's docstring is its description, and so lists its fields.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from ... import errors
from ...adapters.formats import FORMATS, written_formats
from ...adapters.formats.other_methods import OUTCOMES
from ...adapters.updates import UPDATES
from ...adapters.updates.update import Unpaired
from ...adapters.weight_kinds import WEIGHT_KINDS
from ...architectures.runtimes import runtime as runtimes
from ...architectures.runtimes.table import PROGRAMS
from ...binding.merge.choices import WAYS
from ...commands import choices, namings
from ...commands.convert import checkpoint as convert_checkpoint
from ...commands.count import formulas as counting
from ...commands.report_files import report_classes
from ...commands.run.steps import COMMANDS
from ...files.codecs import CODECS
from ...files.codecs.codec import CodeFormat
from ...files.containers.file_kinds import NPZ
from ...files.dtypes import BLOCK_TYPES, DTYPES
from ...files.output.output import CONTAINERS
from ...files.states.training_states import STATES
from ...patches.bodies.table import BODIES
from ...transform.runtime_limits import FINDINGS
from ...views.diff_shared import MEANINGS
from ...views.merge import TensorReport
from ...views.parts.envelope import SCHEMA_VERSION
from ...views.run import StepReport
from .recipe import make_recipe

# command -> its `status` where the exit code is 1
STATUSES = {
    "diff": ("different",),
    "inspect": ("problems", "other method", "not applied", "differs"),
    "run": ("wrong", "inconclusive", "differs"),
    "verify": ("wrong", "inconclusive", "not as stated"),
}

CHANGED_BY = (*UPDATES, "untied", "added")  # of merge: one, or several with a plus between

STORED = (*DTYPES, *BLOCK_TYPES)  # types of tensors in files

# field of a report, or of one class -> the words that it can be; of a mapping, its keys
WORDS: dict[str, Sequence[str]] = {
    "dtype": STORED,
    "dtype_a": STORED,
    "dtype_b": STORED,
    "dtypes": STORED,
    "format": tuple(FORMATS),
    "source_format": tuple(FORMATS),
    "outcome": tuple(OUTCOMES),
    "runtime": tuple(PROGRAMS),
    "Finding.outcome": tuple(runtimes.OUTCOMES),
    "Finding.what": tuple(FINDINGS),
    "RuntimeInspection.checked": ("run", "read"),
    "role": ("linear", "embedding", "head", "experts", "conv", ""),
    "to": tuple(written_formats()),
    "CheckpointConvertReport.to": (*convert_checkpoint.WRITTEN, *namings.MODEL_NAMINGS),
    "CheckpointConvertReport.source_format": (*CONTAINERS, NPZ, *(each.file_format for each in STATES.values())),
    "CombineReport.method": tuple(choices.COMBINE_METHODS),
    "InitReport.method": tuple(choices.INIT_CHOICES),
    "MethodCount.method": tuple(counting.FORMULAS),
    "MethodCount.measure": tuple(dict.fromkeys(method.size for method in counting.FORMULAS.values())),
    "CountReport.source": ("config", "checkpoint"),
    "SpectraReport.what": ("adapter", "checkpoint"),
    "ModuleConvert.how": ("exact", "split", "fused", "swapped", "folded", "expanded", "rounded", "truncated"),
    "TensorReport.dtype": (*STORED, *(key for key, codec in CODECS.items() if isinstance(codec, CodeFormat))),
    "PatchRow.was": (*STORED, ""),
    "PatchedTensor.was": (*STORED, ""),
    "PatchInspection.bodies": tuple(BODIES),
    "ForeignPatchReport.dialect": tuple(choices.PATCH_DIALECTS),
    "DeltaInspection.dialect": tuple(choices.PATCH_DIALECTS),
    "PatchReport.bodies": tuple(BODIES),
    "MergeReport.quantized": (*WAYS, "like"),
    "MergeReport.sizes": tuple(WAYS),
    "ModuleExtract.how": ("exact", "certified", "estimate"),
    "ModuleExtract.kind": tuple(WEIGHT_KINDS),
    "ModuleInit.kind": tuple(WEIGHT_KINDS),
    "Spectrum.kind": (*WEIGHT_KINDS, *UPDATES),
    "ModuleDiff.kind": tuple(UPDATES),
    "ModuleSpread.kind": tuple(UPDATES),
    "ValueDiff.kind": tuple(UPDATES),
    "ValueSpread.kind": tuple(UPDATES),
    "relation": tuple(MEANINGS),
    "ModuleReport.kind": (*UPDATES, Unpaired.kind),
    "AdapterGroup.kind": (*UPDATES, Unpaired.kind),
    "TensorVerdict.verdict": ("exact", "rounding", "requantized", "wrong"),
    "StepReport.command": (*COMMANDS,),
    "StepReport.state": ("done", "planned", "waits"),
    "VerifyReport.status": ("proven", "wrong", "inconclusive"),
    "FileHash.signature": ("same", "differs"),
    "FileHash.hub": ("same", "differs"),
}

# class -> its exit codes
ERRORS: dict[type[errors.LoratoolError], list[int]] = {
    errors.UsageError: [2],
    errors.InputError: [3],
    errors.NeedsFlag: [4],
    errors.MachineError: [5],
    errors.LoratoolError: [70],
    errors.Interrupted: [129, 130, 143],  # 128 + SIGHUP, SIGINT, SIGTERM
}

PLAIN: dict[object, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number"},
    type(None): {"type": "null"},
    Any: {},
}


def make(command: str) -> dict[str, Any]:
    """Return the schema of the output of `loratool COMMAND --json`, for every exit code. For `run` add its recipes.

    Every printed object has a key `schema` and no recipe has it, so that one schema serves for both.
    """
    definitions: dict[str, Any] = {}
    reports = [_refer(kind, definitions) for kind in report_classes(command)]
    report = reports[0] if len(reports) == 1 else {"oneOf": reports}
    ends = {"done": _object({**_head(command, True), "exit_code": {"const": 0}, "report": report})}
    if command in STATUSES:
        no = {"exit_code": {"const": 1}, "status": {"enum": list(STATUSES[command])}}
        ends["no"] = _object({**_head(command, False), **no, "report": report})
    ends["error"] = _error(command)
    printed = {"oneOf": [{"$ref": f"#/$defs/{end}"} for end in ends]}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:loratool:{SCHEMA_VERSION}:{command}",
        "title": f"loratool {command}",
        "description": f"What `loratool {command} --json` prints.",
    }
    if command != "run":
        return {**schema, **printed, "$defs": {**ends, **definitions}}
    recipe = make_recipe()
    steps = recipe.pop("$defs")
    return {
        **schema,
        "description": "The output of `loratool run --json`, and the recipes that it reads (JSON or YAML).",
        "if": {"required": ["schema"]},
        "then": printed,
        "else": {"$ref": "#/$defs/recipe"},
        "$defs": {**ends, "recipe": recipe, **steps, **definitions},
    }


def _head(command: str, ok: bool) -> dict[str, Any]:
    return {"schema": {"const": SCHEMA_VERSION}, "verb": {"const": command}, "ok": {"const": ok}}


def _error(command: str) -> dict[str, Any]:
    """Return the schema of an error. Each kind has its exit code, and `needs-flag` has the flag.

    `verb` is null if the call has no valid command.
    """
    text, nullable = PLAIN[str], {"type": ["string", "null"]}
    error = _object({"kind": {}, "message": text, "tensor": nullable, "remedy": nullable})
    kinds = []
    for kind, codes in ERRORS.items():
        fixed = {"kind": {"const": kind.kind}, **({"remedy": text} if kind is errors.NeedsFlag else {})}
        kinds.append({"properties": {"exit_code": {"enum": codes}, "error": {"properties": fixed}}})
    return {
        **_object({**_head("", False), "verb": {"enum": [command, None]}, "exit_code": {}, "error": error}),
        "oneOf": kinds,
    }


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a closed object with exactly these keys."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _refer(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a reference to a dataclass of a report, and add its definition."""
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # its place, before those of what it holds
        hints = get_type_hints(kind)
        properties = {field.name: _field(kind, field, hints[field.name], definitions) for field in fields(kind)}
        definitions[kind.__name__] = {"description": inspect.getdoc(kind), **_object(properties)}
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _field(owner: type, field: Field[Any], hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    words = WORDS.get(f"{owner.__name__}.{field.name}", WORDS.get(field.name))
    if owner is TensorReport and field.name == "update":
        updates = "|".join(CHANGED_BY)
        return {"type": "string", "pattern": rf"^({updates})(\+({updates}))*$"}
    if owner is StepReport and field.name == "report":
        reports = [_refer(kind, definitions) for command in COMMANDS for kind in report_classes(command)]
        return {"anyOf": [*reports, PLAIN[type(None)]]}
    if field.name == "kind" and field.default is not MISSING:  # what tells a command's reports apart
        return {"const": field.default}
    return _hinted(hint, words, definitions)


def _hinted(hint: Any, words: Sequence[str] | None, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type. `words` are the values of a str, of a sequence of str, or of a mapping's keys."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is str and words:
        return {"enum": list(words)}
    if hint in PLAIN:
        return PLAIN[hint]
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _refer(hint, definitions)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_hinted(part, words, definitions) for part in parts]}
    if origin is tuple and parts[1:] == (...,):
        return {"type": "array", "items": _hinted(parts[0], words, definitions)}
    if origin is tuple:
        items = [_hinted(part, words, definitions) for part in parts]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    assert inspect.isclass(origin) and issubclass(origin, Mapping), f"{hint} has no schema"
    keys = {"enum": list(words)} if words else {"pattern": "^[0-9]+$"} if parts[0] is int else PLAIN[parts[0]]
    values = _hinted(parts[1], None, definitions)
    return {"type": "object", "propertyNames": keys, "additionalProperties": values}
