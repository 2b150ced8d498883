"""Call every function of the library with what it does not take: a line says what it takes, and nothing is written."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from lib.harness.interrupted import interrupted

import loratool
from loratool.commands.arguments import arguments_of, parse_count, parse_size
from loratool.errors import LoratoolError, UsageError

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
FUNCTIONS = [name for name in loratool.__all__ if name.islower() and name != "live"]


class Bytes:
    """A path of bytes, which no function takes."""

    def __fspath__(self) -> bytes:
        return b"model"


class Raising:
    """An object whose every answer is an error."""

    def __fspath__(self) -> str:
        raise ValueError("no path")

    def __repr__(self) -> str:
        raise ValueError("no text")


# what some argument takes is among these, for others it is wrong
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**63, 10**400, -(10**5000), 0.5, 8.0, -0.0, 1e300, math.nan, math.inf, 1j),
    *("", "a", "8", "0-3", "5GB", "q_proj", "re:(", "\0", "\ud800", "x" * 5000, "re:", ","),
    *(b"", b"model", bytearray(b"a"), memoryview(b"a"), Path("absent"), PurePosixPath("a"), Bytes(), Raising()),
    *(
        [],
        (),
        {},
        set(),
        [None],
        [1],
        [10**5000],
        ["a"],
        [["a", 1]],
        ("a", 1),
        ("a", "b", "c"),
        {"a": 1},
        {1: "a"},
        {"a": None},
    ),
    *(range(3), range(-1, 3), range(10**9), {"q_proj"}, [b"a"], [True], [0.5], [[]], ("energy", 0.9), ("energy", "a")),
    *(
        object(),
        object,
        int,
        dict,
        len,
        print,
        lambda: None,
        Ellipsis,
        NotImplemented,
        Decimal(1),
        Fraction(1, 2),
        ValueError(),
    ),
    *(np.int64(4), np.float32(0.5), np.bool_(True), np.array([1, 2]), np.array("a"), np.str_("q_proj"), np.int8(-1)),
    *(torch.tensor(1), torch.zeros(2), torch.float32, torch.device("cpu"), np.float64("nan"), np.datetime64(0, "s")),
]
ITERATORS: list[Callable[[], Iterator[Any]]] = [lambda: iter(["a"]), lambda: (n for n in range(3)), lambda: iter([])]


def right_arguments(merged: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Arguments of each function with which it writes nothing."""
    writing = {"out": out, "dry_run": True}
    return {
        "merge": {"base": BASE, "adapters": ADAPTER, **writing},
        "unmerge": {"merged": merged, "adapters": ADAPTER, **writing},
        "patch": {"base": BASE, "tuned": merged, **writing},
        "apply": {"base": BASE, "patches": merged.with_name("merged.patch"), **writing},
        "verify": {"base": BASE, "adapters": ADAPTER, "merged": merged},
        "recover": {"model": merged.with_name("left"), "dry_run": True},
        "verify_attestation": {"attestation": out.parent.parent / "merged.json"},
        "extract": {"base": BASE, "tuned": merged, **writing},
        "init": {"base": BASE, **writing},
        "resize": {"adapter": ADAPTER, "rank": 2, **writing},
        "combine": {"adapters": [ADAPTER, ADAPTER], **writing},
        "convert": {"source": ADAPTER, "to": "peft", **writing},
        "convert_model": {"source": BASE, **writing},
        "edit_metadata": {"source": ADAPTER, "set": {"a": "b"}, "out": f"{out}.safetensors", "dry_run": True},
        "count": {"path": BASE},
        "demo": {"folder": out, "dry_run": True},
        "env": {},
        "diff": {"a": ADAPTER, "b": ADAPTER},
        "diff_spectra": {"a": BASE, "b": merged, "layers": [0]},
        "diff_headers": {"a": ADAPTER, "b": ADAPTER},
        "inspect": {"path": ADAPTER},
        "inspect_files": {"path": ADAPTER},
        "inspect_for": {"path": ADAPTER, "runtime": "vllm"},
        "spectra": {"path": ADAPTER},
        "run": {"recipe": out.parent.parent / "recipe.json", "dry_run": True},
        "open_adapter": {"path": ADAPTER},
        "open_checkpoint": {"path": BASE},
        "save_adapter": {"path": out, "modules": {"q": (torch.ones(1, 2), torch.ones(2, 1), 1)}, "to": "kohya"},
        "iter_merged": {"base": BASE, "adapters": ADAPTER},
        "write_report": {"report": loratool.count(BASE), "path": out},  # no name of a page
        "read_report": {"path": out.parent.parent / "report.html"},
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_only_errors_of_ours_leave_and_nothing_is_written(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = random.Random(seed)
    merged, empty = tmp_path / "merged", tmp_path / "empty"
    loratool.merge(BASE, ADAPTER, merged, attest=tmp_path / "merged.json")
    loratool.patch(BASE, merged, tmp_path / "merged.patch")
    interrupted(BASE, ADAPTER, tmp_path / "left")
    empty.mkdir()
    loratool.write_report(loratool.count(BASE), tmp_path / "report.html")
    (tmp_path / "recipe.json").write_text(f'{{"command": "resize", "adapter": "{ADAPTER}", "rank": 2, "out": "r"}}')
    monkeypatch.chdir(empty)
    right = right_arguments(merged, empty / "out")
    raw, refused = [], 0
    for _ in range(2500):
        name = choose.choice(FUNCTIONS)
        function = getattr(loratool, name)
        parameters = [each for each in inspect.signature(function).parameters if each != "dry_run"]
        values = [*VALUES, *(make() for make in ITERATORS)]
        wrong = {
            each: choose.choice(values)
            for each in choose.sample(parameters, min(len(parameters), choose.randint(1, 2)))
        }
        try:
            function(**{**right[name], **wrong})
        except LoratoolError:
            refused += 1
        except Exception as error:
            raw.append(f"{name} {list(wrong)}: {error!r}")
    assert not raw and refused > 2000  # some are right for what they are given to
    assert not [*empty.iterdir()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_that_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    function, right = getattr(loratool, name), right_arguments(tmp_path, tmp_path)[name]
    parameters = inspect.signature(function).parameters
    first, last = next(iter(parameters)), next(reversed(parameters))
    assert parameters.keys() == arguments_of(function).keys()
    with pytest.raises(UsageError, match=f"^{name}: takes no argument '{last}s'\ndid you mean {last}\\?$"):
        function(**right, **{f"{last}s": 1})
    with pytest.raises(UsageError, match=f"^{name}: takes no argument 'zzzz'\nits arguments are {first}"):
        function(**right, zzzz=1)
    with pytest.raises(UsageError, match=f"^{name}: needs {first}"):
        function()
    takes_any = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    told = f"{first}: 1 is not" if takes_any else rf"{name}: takes \d arguments? \({first}.*\) by position, not 4$"
    with pytest.raises(UsageError, match=f"^{told}"):
        function(1, 2, 3, 4)
    with pytest.raises(UsageError, match=f"^{name}: the argument '{first}' is given twice$"):
        function(right[first], **right)
    for bad in (b"x", 3, "", None):
        with pytest.raises(UsageError, match=f"^{first}: .* (is not a (path|report)|is not an adapter|is none of)"):
            function(**{**right, first: bad})


@pytest.mark.parametrize(
    ("keyword", "value", "says"),
    [
        ("alpha", "8", "'8' is not a finite number"),
        ("alpha", math.nan, "nan is not a finite number"),
        ("alpha", True, "True is not a finite number"),
        ("force", 1, "1 is not True or False"),
        ("target", b"q_proj", "b'q_proj' is not a pattern or a list of patterns"),
        ("target", {"q_proj"}, "{'q_proj'} is not a pattern or a list of patterns"),
        ("exclude", [3], "3 is not a pattern, like q_proj or *.mlp.*"),
        ("layers", 3, "3 is not a list like 0-3,7, a range or a list of numbers"),
        ("layers", [0, -1], "[0, -1] has something that is not a layer number"),
        ("layers", "1-", "'1-' is not a list like 0-3,7"),
        ("drop", 3, "3 is not a word or a list of words"),
        ("max_shard_size", "5 apples", "'5 apples' is not a size like 5GB or 500MiB, or a number of bytes"),
        ("max_shard_size", -1, "-1 is not a size like 5GB or 500MiB, or a number of bytes"),
        ("workers", 0, "0 is not a whole number from 1"),
        ("workers", 2.0, "2.0 is not a whole number from 1"),
        ("progress", lambda done: None, "is not a function of two numbers, (done, total)"),
        ("like", "a" * 300, "has a name of 300 bytes"),
        ("like", "a\0", "is not a path"),
    ],
)
def test_the_line_says_what_is_taken(keyword: str, value: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        loratool.merge(BASE, ADAPTER, tmp_path / "out", **{keyword: value})
    assert str(refused.value).startswith(f"{keyword}: ") and says in str(refused.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["merge", BASE, ADAPTER, "--layers", "x"], "error: --layers: 'x' is not a list like 0-3,7\n"),
        (["merge", BASE, ADAPTER, "--target", ","], "error: --target: the pattern ',' names nothing\n"),
        (["resize", ADAPTER, "--rank-rule", "what=nan"], "error: --rank-rule: 'what' is none of rank, energy, "),
        (["extract", BASE, ADAPTER, "--architecture", ""], "error: --architecture: '' is not a text\n"),
        (["inspect", ""], "error: PATH: '' is not a path\n"),
    ],
)
def test_the_command_line_names_the_option(words: list[Any], says: str, run: Callable[..., Any]) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.startswith(says), result.stderr


def test_numbers_are_taken_of_any_library_and_layers_and_patterns_in_any_form(tmp_path: Path) -> None:
    def bytes_of(name: str, **options: Any) -> bytes:
        loratool.merge(BASE, ADAPTER, tmp_path / f"{name}.safetensors", **options)
        return (tmp_path / f"{name}.safetensors").read_bytes()

    plain = bytes_of("a", layers="0-1", target=["q_proj", "v_proj"], workers=1, undo=False)
    forms: list[dict[str, Any]] = [
        {"layers": range(2), "target": "q_proj,v_proj", "workers": np.int64(1), "undo": np.False_},
        {"layers": np.arange(2), "target": ("q_proj,v_proj",), "workers": np.uint8(1), "undo": False},
        {"layers": {0, 1}, "target": np.str_("q_proj,v_proj"), "undo": False},
        {"layers": (n for n in (1, 0)), "target": "re:(q|v)_proj$", "undo": False},
    ]
    for i, options in enumerate(forms):
        assert bytes_of(str(i), **options) == plain
    sizes = ["100KB", 100_000, 100_000.0, "100000", np.int32(100_000), Fraction(100_000)]
    shards = {
        tuple(sorted(p.stat().st_size for p in (tmp_path / f"s{i}").glob("*.safetensors")))
        for i, each in enumerate(sizes)
        if loratool.convert_model(BASE, tmp_path / f"s{i}", max_shard_size=each)
    }
    assert len(shards) == 1 and len(shards.pop()) > 1


def test_sizes_and_counts() -> None:
    assert [parse_size(each) for each in ("5GB", "2GiB", "1.5 MiB", "9kb", 7, None)] == [
        5 * 10**9, 2 << 30, 3 << 19, 9000, 7, None
    ]  # fmt: skip
    assert [parse_count(each) for each in ("20M", "1.5B", "500k", 2e6)] == [20 * 10**6, 15 * 10**8, 500_000, 2_000_000]
    numbers = 0, 0.5, -1, True, math.nan, math.inf, 2**63, 1j, Fraction(10**400), Fraction(3, 2)
    for wrong in ("", "-5", "0", "1e9", "5XB", "٣", "1" + "0" * 40, b"5", *numbers):
        with pytest.raises(UsageError, match="is not a size"):
            parse_size(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (ADAPTER, [ADAPTER]),
        ([str(ADAPTER), ADAPTER], [ADAPTER, ADAPTER]),
        ([(ADAPTER, 0.7), (str(ADAPTER), np.float32(-0.25))], [f"{ADAPTER}:0.7", f"{ADAPTER}:-0.25"]),
        ({ADAPTER: 0.7, f"{ADAPTER}/": -0.25}, [f"{ADAPTER}:0.7", f"{ADAPTER}/:-0.25"]),
        ({ADAPTER: Fraction(1, 2)}, [f"{ADAPTER}:0.5"]),
        ([(ADAPTER, 0.5, {"mlp": 0})], [f"{ADAPTER}:0.5,mlp=0"]),
    ],
    ids=["path", "paths", "pairs", "mapping", "fraction", "weights of modules"],
)
def test_weights_are_the_command_lines(
    adapters: Any, words: list[Any], tmp_path: Path, run: Callable[..., Any]
) -> None:
    loratool.merge(BASE, adapters, tmp_path / "library", undo=False)
    assert run("merge", BASE, *words, "-o", tmp_path / "line", "--no-undo").exit_code == 0
    files = sorted(path.name for path in (tmp_path / "line").glob("model*"))
    assert len(files) > 1
    for name in files:
        assert (tmp_path / "library" / name).read_bytes() == (tmp_path / "line" / name).read_bytes()


@pytest.mark.parametrize(
    ("word", "dtypes"),
    {
        "bf16": [torch.bfloat16, "torch.bfloat16", type("bfloat16", (np.generic,), {})],  # as ml_dtypes has it
        "fp16": [torch.half, np.float16, np.dtype("float16"), "FP16"],
        "fp32": [torch.float32, np.zeros(1, np.float32).dtype, "float32"],
    }.items(),
)
def test_dtypes_of_torch_and_numpy_are_those_of_their_names(word: str, dtypes: list[Any], tmp_path: Path) -> None:
    def resized(dtype: Any) -> bytes:
        out = tmp_path / "out"
        loratool.resize(ADAPTER, out, rank=2, dtype=dtype, force=True, card=False)
        return (out / "adapter_model.safetensors").read_bytes()

    assert {resized(dtype) for dtype in dtypes} == {resized(word)}
    merges = [loratool.merge(BASE, ADAPTER, dtype=each, undo=False, dry_run=True) for each in (word, dtypes[0])]
    assert merges[0].tensors == merges[1].tensors
    for wrong in (torch.int8, np.float64, float, np.ones(2, np.float16)):
        with pytest.raises(UsageError, match="is none of fp32, fp16, bf16"):
            resized(wrong)
