"""Hold `run` against recipes that lie, in JSON and YAML: nothing in them is run, and only what they name is made."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from damages import damaged_bytes
from fuzzing import Case, Fuzzer
from lies import lie
from valid_files import adapter, model

pytestmark = pytest.mark.fuzz

STEPS: tuple[dict[str, Any], ...] = (
    {"command": "merge", "base": "base", "adapters": ["adapter"], "out": "out/a"},
    {"command": "merge", "base": "base", "adapters": [{"path": "adapter", "weight": 0.5}], "out": "out/b.safetensors"},
    {"command": "unmerge", "merged": "out/a", "adapters": "adapter", "out": "out/c"},
    {"command": "resize", "adapter": "adapter", "rank": 1, "out": "out/d"},
    {"command": "combine", "adapters": ["adapter", "adapter"], "out": "out/e"},
    {"command": "convert", "source": "adapter", "to": "peft", "out": "out/f"},
    {"command": "extract", "base": "base", "tuned": "out/a", "rank": 1, "out": "out/g"},
    {"command": "verify", "base": "base", "adapters": ["adapter"], "merged": "out/a"},
    {"command": "init", "base": "base", "rank": 1, "residual": "out/i", "out": "out/h"},
)
# Values of any option; a path among them that is written stands in the case's own folder
WRONG: tuple[Any, ...] = (
    *(None, "", 0, 1, -1, 0.5, 1e308, 10**30, True, False, [], {}, [[]], "base", "adapter", "out/a", "out", "base/x"),
    *("a\0b", "\x1b[31m", "\u202e", "x" * 300, "x" * 5000, "{}", "--force", "-o", "~", "$HOME", "`id`", "merge", "CON"),
    *"base/../out/x out/../base ./base/ org/name https://example.com/x nan 1e999 5GB".split(),
    ["adapter"] * 60,
)
WORDS = (*"force dry-run workers progress undo no-undo exclude alpha tied drop Merge x".split(), "")
YAML = (
    "!!python/object/apply:os.system ['touch hacked']",
    "!!python/name:os.system",
    "!!python/object/new:os.system [touch hacked]",
    "!!binary aGk=",
    "!x y",
    "&a [*a]",
    "&a {<<: *a}",
    "*missing",
    "[" * 2000,
    "{a: " * 500,
    "? [a]\n: b",
    "? {a: b}\n: c",
    ".inf",
    ".nan",
    "1e999",
    "0x1F",
    "0o17",
    "1_000",
    "1:30",
    "2020-01-01",
    "~",
    "yes",
    "|\n  text\n  more",
    "> \n",
    '"\\u0000"',
    '"\\ud800"',
    "'\t'",
    "%YAML 9.9\n---\na",
    "a\n---\nb",
    "\ufeff",
    "9" * 6000,
)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


def as_yaml(value: Any, rng: random.Random) -> str:
    """Return steps as YAML, with some of its own constructs in the place of values."""
    lines = ["steps:"]
    for step in value["steps"] if isinstance(value, dict) and isinstance(value.get("steps"), list) else [value]:
        pairs = step.items() if isinstance(step, dict) else [("command", step)]
        for number, (word, inner) in enumerate(pairs):
            text = rng.choice(YAML) if rng.random() < 0.15 else json.dumps(inner)
            lines.append(f"{'  ' if number else '- '}{json.dumps(word) if rng.random() < 0.2 else word}: {text}")
            if rng.random() < 0.03:
                lines.append(lines[-1].replace("- ", "  ", 1))  # twice
    return "\n".join(lines) + "\n"


def texts_in(value: Any) -> list[str]:
    """Return all texts in a value, each of which a recipe may name as an output."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for each in inner for text in texts_in(each)]


def make(rng: random.Random) -> Case:
    steps = [dict(each) for each in rng.sample(STEPS, rng.choice((1, 1, 2, 3)))]
    recipe: Any = {"steps": steps} if len(steps) > 1 or rng.random() < 0.5 else steps[0]
    if rng.random() < 0.3:
        steps[0][rng.choice(WORDS)] = rng.choice(WRONG)
    for _ in range(rng.choice((0, 1, 1, 2))):
        recipe = lie(recipe, rng, WRONG) or recipe
    ending = rng.choice(("json", "yaml"))
    text = (json.dumps(recipe) if ending == "json" else as_yaml(recipe, rng)).encode("utf-8", "surrogatepass")
    match rng.randrange(12):
        case 0:
            text = damaged_bytes(rng, text)
        case 1 if ending == "yaml":
            text = BOMB.encode() + rng.choice((b"command: *a9\n", b"steps: *a9\n", b"", text))
        case 2:
            text = text.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-8-sig", "latin-1")), "replace")
        case 3:
            many = [{"command": "resize", "adapter": "adapter", "rank": 1, "out": f"out/{i}"} for i in range(500)]
            many[-1]["rank"] = "x"  # found before the first is run
            text, ending = json.dumps({"steps": many}).encode(), "json"
        case 4 if ending == "json":
            text = text.replace(b"0.5", b"1e999").replace(b'"rank": 1', b'"rank": ' + b"9" * 6000)
        case 5:
            text = text.replace(b'"command"', b'"command": "verify", "command"', 1)
        case 6:
            text = (b"[" * 100_000, b'{"a":' * 100_000, b"- " * 50_000, b"x: &x " * 5_000)[rng.randrange(4)]
    more = ((), (), ("--json",), ("--force",)) if len(steps) == 1 else ()  # what earlier steps wrote stays
    argv = ("run", f"r.{ending}", *(rng.choice(more) if more else ("--dry-run",)))
    named = [
        name
        for name in (*texts_in(recipe), *(each.strip("'") for each in YAML))
        if 0 < len(name) < 100 and not name.startswith(("base", "adapter", ".", "/", "r."))
    ]
    return Case({f"r.{ending}": text, **model("base"), **adapter("adapter"), "out/x": b""}, argv, ("out", *named))


def test_recipes(fuzz: Fuzzer) -> None:
    fuzz(make, 6)
