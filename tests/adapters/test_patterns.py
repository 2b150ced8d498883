"""Hold patterns to what PEFT and `re` match, in a time that no pattern can make endless."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import FIXTURES

import loratool
from loratool.adapters.config import AdapterConfig
from loratool.adapters.expressions import Expressions, parse
from loratool.adapters.patterns import Patterns, Targets
from loratool.errors import InputError

WORDS = "layers.0. layers.1. model. self_attn. q_proj k_proj . 0 10 a b".split()
LITERALS = ["layers.0.q_proj", r"layers\.0\.q_proj", "q_proj", "^a.b", r"^a\.b$", "a.b", "", ".", "^", "..", "0", "a-b"]
EXPRESSIONS = [
    r".*\.0\..*(q|k)_proj", r"(?!.*layers\.1).*q_proj", "a|b", r"layers\.\d+\.(?:self_attn\.)?[qk]_proj",
    "(?i:A)", r"(?<!layers\.)0", r"(?<=a)b", "[^.]*", r"\w+", "a{1,3}", "(a|b)+?", "(?:[a-z0-9_.]+)+!", "x*",
]  # fmt: skip
CATASTROPHES = [
    "(?:[a-z0-9_.]+)+!", "(a|a)*!", "(a|aa)+!", ".*.*.*.*.*.*!", ".*a.*a.*a.*a.*a!", "((a*)*)*!", "(?:a?){60}a{60}!",
    "(?=(?:a+)+!).*", "(?!(a|aa)+!)(a|aa)+!", r"(?:\w+\.?)+!", "(?:(?:a{1,10}){1,10}){1,9}!", "(?:a|b)*a(?:a|b){150}!",
    "(?:(?=a*)a)*!", "(?:a*?)*?!",
]  # fmt: skip
REFUSED = {
    "a)|(b": "is not a regular expression",
    "(": "is not a regular expression",
    "(?<=a*)b": "is not a regular expression",
    r"(a)\1": "groupref",
    "(a)?(?(1)b|c)": "groupref exists",
    "(?:a{1,1000}){1,1000}": "more than",
    "(?:(?:){9999}){9999}": "more than",
    "a{99999999}": "more than",
    "[ab]" * 600: "characters",
}


def peft_value(patterns: dict[str, int], module: str) -> int | None:
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(patterns.keys(), module))


def test_the_first_that_matches_is_peft_s() -> None:
    rng = random.Random(0)
    for _ in range(400):
        patterns = {key: i for i, key in enumerate(rng.sample(LITERALS + EXPRESSIONS[:-2], rng.randrange(1, 6)))}
        module = "".join(rng.choice(WORDS) for _ in range(rng.randrange(6))) or "ab"
        if module not in patterns:  # which PEFT takes for a match of itself
            assert Patterns(patterns).value(module, None) == peft_value(patterns, module), (patterns, module)
            assert Targets(["q_proj", "0.k_proj"]).has(module) == bool(re.fullmatch(r"(.*\.)?(q|0\.k)_proj", module))


def expression(rng: random.Random, depth: int = 4) -> str:
    """Draw an expression of few characters, so that there is much that matches in several ways."""
    kind = rng.random()
    atoms = [
        "a",
        "b",
        r"\.",
        ".",
        "[ab]",
        "[^a]",
        r"\d",
        r"\w",
        "^",
        "$",
        r"\b",
        r"\B",
        "A",
        "(?i:ab)",
        "(?s:.)",
        r"\Z",
    ]
    atoms += ["(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "(?!.*b)", "(?!)", "", "ab", "0"]
    if depth == 0 or kind < 0.35:
        return rng.choice(atoms)
    if kind < 0.6:
        return expression(rng, depth - 1) + expression(rng, depth - 1)
    if kind < 0.75:
        return f"({expression(rng, depth - 1)}|{expression(rng, depth - 1)})"
    if kind < 0.9:
        repeats = ["*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{0,2}", "{2,}"]
        return f"(?:{expression(rng, depth - 1)}){rng.choice(repeats)}"
    return rng.choice(["(?=", "(?!", "(?:", "("]) + expression(rng, depth - 1) + ")"


@pytest.mark.parametrize("count", [150, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_expression_matches_what_re_matches_and_ends(count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        text = expression(rng)
        prefix, inner = rng.choice(["", "(?i)", "(?x)"]), rf"(.*\.)?({text})$"
        found = Expressions([parse(inner, text)], [text])
        whole = Expressions([parse(prefix + text, text)], [text], to_end=True)
        for _ in range(5):
            name = "".join(rng.choice(["a", "b", ".", "ab", "0", "A", "\n", "c"]) for _ in range(rng.randrange(7)))
            assert bool(found.matching(name)) == bool(re.match(inner, name)), (text, name)
            assert bool(whole.matching(name)) == bool(re.fullmatch(prefix + text, name)), (prefix, text, name)
        started = time.perf_counter()
        for name in ("a" * 200, "ab." * 66, "a0." * 50 + "b" * 50):
            found.matching(name)
        assert time.perf_counter() - started < 5


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_no_pattern_is_endless(pattern: str) -> None:
    started = time.perf_counter()
    for name in ("a" * 200, "ab." * 66 + "ab", "model.layers.0.self_attn.q_proj"):
        assert Patterns({pattern: 1}).value(name, 0) == 0
        assert not Targets(pattern).has(name)
    assert time.perf_counter() - started < 5  # a tenth of that in truth, and without it the age of the universe


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_cannot_be_matched_is_named(pattern: str) -> None:
    for ask in (Patterns({pattern: 1}).value, lambda module, _: Targets(pattern).has(module)):
        with pytest.raises(InputError, match=REFUSED[pattern]) as error:
            ask("model.a", 0)
        assert error.value.culprit and error.value.culprit.removesuffix("...") in pattern


def test_a_budget_ends_what_is_only_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.adapters.expressions.MAX_WORK", 100_000)
    found = Patterns({f"(?:{'|'.join('abcdefgh')}|.)*{letter}.{{900}}": 1 for letter in "abcdefgh"})
    rng = random.Random(0)
    with pytest.raises(InputError, match="too long to match"):
        for _ in range(9000):
            found.value("".join(rng.choices("abcdefgh", k=900)), 0)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_an_adapter_with_an_endless_expression_is_read(tmp_path: Path, field: str) -> None:
    """It matches nothing; and `target_modules` is not asked where the tensors say which modules there are."""
    shutil.copytree(FIXTURES / "llama" / "adapter", tmp_path / "adapter")
    place = tmp_path / "adapter" / "adapter_config.json"
    endless = "(?:[a-z0-9_.]+)+!"
    config = {**json.loads(place.read_text()), field: endless if field == "target_modules" else {endless: 4}}
    place.write_text(json.dumps(config))
    loratool.inspect(tmp_path / "adapter")
    loratool.merge(FIXTURES / "llama" / "base", tmp_path / "adapter", tmp_path / "out", dry_run=True)


def test_paths_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern for every module needs no expression, and each costs the same as one alone."""
    monkeypatch.setattr("loratool.adapters.patterns.Expressions", None)
    modules = [f"model.layers.{i}.mlp.experts.{e}.{p}" for i in range(20) for e in range(40) for p in ("w1", "w2")]
    spelled = [modules, [f"^{re.escape(module)}" for module in modules], [m.removeprefix("model.") for m in modules]]
    started = time.perf_counter()
    for patterns in spelled:
        config = AdapterConfig(rank=1, rank_pattern={p: i for i, p in enumerate(patterns)})
        assert [config.rank_of(module) for module in modules] == list(range(len(modules)))
    assert time.perf_counter() - started < 5


def test_an_expression_a_layer() -> None:
    values = {rf"layers\.{i}\.mlp\.(up|down)_proj": i for i in range(200)}
    asked = Patterns(values)
    for i in range(200):
        assert asked.value(f"model.layers.{i}.mlp.up_proj", None) == i
        assert asked.value(f"model.layers.{i}.mlp.gate_proj", None) is None


def test_re_itself_is_as_slow_as_we_say() -> None:
    """Eight characters more are 256 times the time: this is why."""
    started = time.perf_counter()
    re.match("(?:[a-z]+)+!", "a" * 14)
    first = time.perf_counter()
    re.match("(?:[a-z]+)+!", "a" * 22)
    assert time.perf_counter() - first > 10 * (first - started)
