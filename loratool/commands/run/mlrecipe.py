"""Read a recipe of mlrecipe (github.com/shiahonb777/mlrecipe, `src/mlrecipe/recipe.py`, version 0.1) as steps.

It names a base by its repo id and commit on the hub, and adapters by the sha256 of a safetensors file, which is below
`artifacts/` beside the recipe. Each adapter is a merge of its own, in order, rounded to the base's dtype. The merged
model is `merged` in the working folder, as the recipe names no place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.formats import open_adapter
from ...architectures.conv1d import stores_transposed
from ...architectures.fused_rows import nested_configs
from ...durable.fileio import sha256_file
from ...errors import InputError, UsageError, brief
from ...files.checkpoint import find_weights, read_config
from ...files.hub.cache import NO_SUCH, resolve
from ...files.hub.names import HubName, parse_hub_name
from .lock import differing

VERSION = "0.1"

OUT = "merged"

# table -> its keys; what else a recipe has is refused, but for `training`, which says how adapters were made
KEYS = {
    "recipe": ("version", "name"),
    "base": ("ref", "revision", "sha256"),
    "adapters": (
        *("type", "artifact", "target_modules", "rank", "alpha", "fan_in_fan_out"),
        *("bias", "modules_to_save", "lora_dropout"),
    ),
    "parents": ("parent",),
}

SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


@dataclass(frozen=True)
class Pin:
    """A file that a recipe names by its sha256."""

    path: Path
    sha256: str
    of: str  # the field, and the recipe
    place: Path


def unlike_pin(pin: Pin) -> str | None:
    """Return the message on a file that is not as pinned; None if it is."""
    found = sha256_file(pin.path)
    return None if found == pin.sha256 else differing(str(pin.path), pin.of, pin.place, "sha256", pin.sha256, found)


def from_mlrecipe(content: Mapping[str, Any], place: Path) -> tuple[dict[str, Any], tuple[Pin, ...]]:
    """Return a recipe of mlrecipe as one of ours, and the files that it pins.

    Raises:
        UsageError: it has the words of our recipes.
        InputError: it is not valid, an adapter is not there, or a field asks for what a merge does not do. It is named.
    """
    if not content.keys().isdisjoint({"command", "steps"}):
        remedy = "write your own steps in JSON or YAML"
        raise UsageError("a recipe in TOML is one of mlrecipe", culprit=str(place), remedy=remedy)
    for name in content:
        if name not in (*KEYS, "training"):
            raise _refused(name, "is not known")
    version = _table(content, "recipe").get("version", VERSION)
    if version != VERSION:
        raise _refused("recipe.version", f"is {brief(version)}, and this loratool reads {VERSION}")
    if "parent" in _table(content, "parents"):
        raise _refused("parents.parent", "is a recipe to run first", "run that, then merge the adapters into its model")
    base, pins = _base(_table(content, "base"), place)
    adapters = content.get("adapters")
    if not isinstance(adapters, list) or not adapters:
        raise _refused("adapters", "is not a list of adapters")
    steps: list[dict[str, Any]] = []
    for number, values in enumerate(adapters):
        words, pin = _adapter(_checked(values, "adapters", f"adapters.{number}"), f"adapters.{number}", base, place)
        source, left = steps[-1]["out"] if steps else base, len(adapters) - 1 - number
        steps.append({"command": "merge", "base": source, **words, "out": f"{OUT}-{number + 1}" if left else OUT})
        pins.append(pin)
    return {"steps": steps}, tuple(pins)


def _refused(field: str, why: str, remedy: str | None = None) -> InputError:
    return InputError(why, culprit=field, remedy=remedy)


def _table(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _checked(content.get(name, {}), name, name)


def _checked(values: Any, name: str, where: str) -> Mapping[str, Any]:
    """Return a table whose keys are known. Raise InputError for any other value."""
    if not isinstance(values, dict):
        raise _refused(where, "is not a table")
    for key in values:
        if key not in KEYS[name]:
            raise _refused(f"{where}.{key}", "is not known")
    return values


def _base(values: Mapping[str, Any], place: Path) -> tuple[str, list[Pin]]:
    """Return the base as a name on the hub, and the pin of its file."""
    ref, revision = values.get("ref"), values.get("revision")
    name = None
    with suppress(InputError):
        name = parse_hub_name(f"hf://{ref}")
    if name is None or name.repo != ref:
        raise _refused("base.ref", f"{brief(ref)} is not a repo id on the hub")
    if revision is not None and not (isinstance(revision, str) and parse_hub_name(f"{name.repo}@{revision}")):
        raise _refused("base.revision", f"{brief(revision)} is not a revision")
    base = f"hf://{str(HubName(name.repo, revision, '', True)).removeprefix('hf://')}"
    if "sha256" not in values:
        return base, []
    digest, weights = _hash(values["sha256"], "base.sha256"), find_weights(resolve(base))
    if weights.suffix != ".safetensors":
        raise _refused("base.sha256", "says nothing of a model that is not one safetensors file", "remove it")
    return base, [Pin(weights, digest, "base.sha256", place)]


def _hash(value: Any, field: str) -> str:
    match = SHA256.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _refused(field, f"{brief(value)} is not like sha256:0123...")
    return match[1]


def _adapter(values: Mapping[str, Any], where: str, base: str, place: Path) -> tuple[dict[str, Any], Pin]:
    """Return an adapter and its scale in the words of merge, and its pin."""
    if values.get("type") != "lora":
        raise _refused(f"{where}.type", f"is {brief(values.get('type'))}, not 'lora'")
    for key, default in (("bias", "none"), ("modules_to_save", [])):
        if values.get(key, default) != default:
            raise _refused(f"{where}.{key}", "asks for more than LoRA, which mlrecipe does not apply either")
    digest = _hash(values.get("artifact"), f"{where}.artifact")
    path = place.parent / "artifacts" / digest[:2] / digest
    if not path.is_file():
        raise InputError(NO_SUCH, culprit=f"{where}.artifact: {path}")
    rank, alpha = (values.get(key) for key in ("rank", "alpha"))
    for key, value in (("rank", rank), ("alpha", alpha)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6):
            raise _refused(f"{where}.{key}", f"{brief(value)} is not a number above 0")
    targets = _targets(values.get("target_modules", []), f"{where}.target_modules")
    pin = Pin(path, digest, f"{where}.artifact", place)
    words: dict[str, Any] = {"adapters": str(path), "alpha": alpha or rank or 1}
    if unlike_pin(pin):  # the run ends before it opens the file
        return words, pin
    adapter = open_adapter(path, alpha=1, lenient=True)
    adapter.file.close()
    ends = {module: module.rpartition(".")[2] for module in adapter.updates}
    updates = {module: spec for module, spec in adapter.updates.items() if not targets or ends[module] in targets}
    if not updates:
        raise _refused(f"{where}.target_modules", "names no module of the adapter")
    if others := sorted({spec.kind for spec in updates.values()} - {"lora"}):
        raise _refused(f"{where}.type", f"is 'lora', and the file has {', '.join(others)}")
    ranks = {spec.rank for spec in updates.values()}
    if len(ranks) > 1 or (rank is not None and {rank} != ranks):
        found = ", ".join(map(str, sorted(ranks)))
        raise _refused(f"{where}.rank", f"is {rank}, and the adapter's ranks are {found}")
    _require_layout(values.get("fan_in_fan_out", False), updates, base, f"{where}.fan_in_fan_out")
    words |= {} if len(updates) == len(ends) else {"target": sorted({ends[module] for module in updates})}
    return {**words, "alpha": alpha or min(ranks)}, pin


def _targets(value: Any, field: str) -> list[str]:
    """Return the last parts of the paths of modules that an adapter changes; all if there are none."""
    words = value if isinstance(value, list) else [value]
    for word in words:
        if not isinstance(word, str) or not re.fullmatch(r"\w+", word):
            raise _refused(field, f"{brief(word)} is not the last part of a module's path")
    return words


def _require_layout(value: Any, modules: Iterable[str], base: str, field: str) -> None:
    """Raise InputError unless fan_in_fan_out is true exactly where the base's class stores weights as (in, out)."""
    if not isinstance(value, bool):
        raise _refused(field, f"{brief(value)} is not true or false")
    model_types = tuple(nested_configs(read_config(base)))
    if wrong := [module for module in modules if stores_transposed(model_types, module) not in (value, None)]:
        how = "(in, out)" if not value else "(out, in)"
        raise _refused(field, f"is {str(value).lower()}, and {base} stores {wrong[0]} as {how}")
