"""Hold that whatever steps an adapter goes through, its report says what dense float64 matrices find in the file.

Chains of steps are drawn, with the types, ranks and scales of the modules. What each module is made of is kept beside
them as rows of the modules that were opened, by which the truth is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stepping import (
    TYPES,
    WIDTH,
    Factors,
    drawn,
    made_rows,
    opened,
    relative,
    rows_of,
    small_integers,
    to_fuse,
    to_split,
    to_swap,
)
from torch import Tensor

from loratool.adapters.formats import FORMATS, open_adapter
from loratool.numerics.forms import FORMS
from loratool.numerics.tensors import tensor_of
from loratool.transform.lazy import Transformed, start
from loratool.transform.numbers import Settled, cut_ranks, fold, one_scale, pad, settle
from loratool.transform.output import content, in_format, rows
from loratool.transform.regroup import regroup

PEFT = FORMATS["peft"]
ROWS = {"q": 40, "k": 24, "v": 24, "o": 32}
FUSED = 88
STACK = "experts"
NOISE = 5e-15  # of float64's QR and SVD, of a few steps
LOSSES = ("rounded", "truncated")


@dataclass
class Chain:
    """An adapter on its way, and what is true of it."""

    state: Transformed
    rows: dict[str, list[tuple[str, int, int]]]  # module -> the rows of which it is, each of a module that was opened
    cut: set[str] = field(default_factory=set)  # modules of which directions were cut off
    folded: set[str] = field(default_factory=set)  # modules whose scale is another by now
    done: list[str] = field(default_factory=list)
    settled: bool = False

    def true(self, dense: Mapping[str, Tensor], module: str) -> Tensor:
        return torch.cat([dense[source][first:last] for source, first, last in self.rows[module]])

    def take(self, step: str) -> None:
        """Take a step if it is possible here."""
        name, _, number = step.partition(" ")
        before = self.state
        if name == "settle":
            self.state, self.settled = settle(self.state, FORMS.get(number)), True
        elif name == "cut":
            self.cut |= {m for m in before.adapter.updates if directions(before, m) > int(number)}
            self.state = cut_ranks(before, int(number))
        elif name == "pad":
            ranks = {m: max(int(number), update.rank) for m, update in before.adapter.updates.items()}
            self.state = pad(before, lambda module: ranks[module])
        elif name in ("fold", "scale"):
            self.state = fold(before) if name == "fold" else one_scale(before)
            after = self.state.adapter.updates
            self.folded |= {m for m, update in before.adapter.updates.items() if update.scale != after[m].scale}
        else:
            self._regroup(name)
        if self.state is not before:
            self.done.append(step)

    def _regroup(self, name: str) -> None:
        adapter = self.state.adapter
        there = adapter.updates.keys()
        if name == "fuse" and {"q", "k", "v"} <= there:
            targets, gone = to_fuse(adapter, ["q", "k", "v"], "qkv"), {"q", "k", "v"}
            self.rows["qkv"] = [each for module in "qkv" for each in self.rows[module]]
            self.cut |= {"qkv"} if self.cut & gone else set()
        elif name == "split" and "qkv" in there and not self.settled:  # after that only the sums of a loss are known
            targets, gone = to_split(adapter, "qkv", {"q": 40, "k": 24, "v": 24}), {"qkv"}
            every = [(source, row) for source, first, last in self.rows["qkv"] for row in range(first, last)]
            for module, first in (("q", 0), ("k", 40), ("v", 64)):
                part = every[first : first + ROWS[module]]
                self.rows[module] = [(source, row, row + 1) for source, row in part]
                self.cut |= {module} if "qkv" in self.cut else set()
        elif name == "swap" and "o" in there:
            targets, gone = to_swap(adapter, "o", 12), {"o"}
            every = [(source, row) for source, first, last in self.rows["o"] for row in range(first, last)]
            self.rows["o"] = [(source, row, row + 1) for source, row in every[12:] + every[:12]]
        else:
            return
        self.cut -= gone - targets.keys()
        self.state = regroup(self.state, targets, [module for module in there if module not in gone])


def directions(state: Transformed, module: str) -> int:
    """Return the rank of a module's change, of a stack the largest, whatever that of its factors is."""
    if state.adapter.updates[module].rank == 1:
        return 1
    S = torch.linalg.svdvals(made_rows(state.adapter, module).view(state.adapter.updates[module].experts, -1, WIDTH))
    return int((1e-10 * S[:, :1] < S).sum(1).max())


steps = st.lists(
    st.sampled_from(
        ["cut 1", "cut 3", "cut 6", "pad 5", "pad 12", "fold", "scale", "fuse", "split", "swap", "settle", "settle F32"]
    ),
    max_size=7,
)
last = st.sampled_from(["settle", "settle F32", "settle BF16", "settle F16", "settle F64"])
kinds = st.tuples(st.sampled_from([2, 4, 7]), st.sampled_from([*TYPES]), st.sampled_from([*TYPES]))
scales = st.sampled_from([1.0, 0.5, 2.0, -0.25, 0.7, 3.0, 1 / 3])
modules = st.fixed_dictionaries({m: st.tuples(kinds, scales) for m in (*ROWS, STACK)})


def draw(seed: int, drawn_modules: Mapping[str, tuple[tuple[int, str, str], float]]) -> dict[str, Factors]:
    found = {}
    for i, (module, ((rank, of_A, of_B), scale)) in enumerate(drawn_modules.items()):
        dtypes, experts = (TYPES[of_A], TYPES[of_B]), 3 if module == STACK else 0
        found[module] = drawn(ROWS.get(module, 16), rank, 10 * seed + i, dtypes, scale * rank, experts)
    return found


def read_again(state: Settled, folder: Path) -> dict[str, Tensor]:
    """Write what a conversion writes, and return the changes by safetensors' own reader."""
    adapter = state.adapter
    plain = {module: update for module, update in adapter.updates.items() if module != STACK}
    made = content(in_format(replace(state, adapter=replace(adapter, updates=plain)), PEFT))
    save_file(
        {name: tensor_of(made.load(name)).contiguous() for name in made.specs}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(dict(made.config)))
    stored, written = load_file(folder / "adapter_model.safetensors"), open_adapter(folder)
    found = {STACK: made_rows(adapter, STACK)} if STACK in adapter.updates else {}  # its name says no stack
    for module, update in plain.items():
        again = written.updates[module]
        A, B = (stored[again.tensors[role]] for role in "AB")
        assert (again.rank, A.dtype, B.dtype) == (update.rank, *(TYPES[update.specs[role].dtype] for role in "AB"))
        found[module] = again.scale * B.double() @ A.double()
    return found


@settings(max_examples=100)
@given(st.integers(0, 2**20), modules, steps, last)
def test_what_is_said_is_true(
    seed: int, drawn_modules: Mapping[str, tuple[tuple[int, str, str], float]], chain: list[str], end: str
) -> None:
    sources = draw(seed, drawn_modules)
    dense = {module: rows_of(each) for module, each in sources.items()}
    with TemporaryDirectory() as folder:
        way = Chain(start(opened(Path(folder, "a"), sources)), {m: [(m, 0, len(D))] for m, D in dense.items()})
        for step in (*chain, end):
            way.take(step)
        Path(folder, "b").mkdir()
        assert isinstance(way.state, Settled)
        found = read_again(way.state, Path(folder, "b"))
        said = {row.name: row for row in rows(way.state)}
    assert said.keys() == found.keys() == way.state.log.keys()
    for module, made in found.items():
        row, error = said[module], relative(made, way.true(dense, module))
        told = f"{module} after {way.done}: said {row.how} {row.error:.4e}, is {error:.4e}"
        assert row.rank == way.state.adapter.updates[module].rank
        assert {*row.sources} >= {source for source, _, _ in way.rows[module]}  # all of what was fused and split again
        assert (row.how in LOSSES) is (row.error > 0), told
        assert (row.how == "truncated") is (module in way.cut), told
        largest = max(error, row.error)
        assert abs(error - row.error) <= (5e-4 if largest > 1e-4 else 0.3) * largest + NOISE, told


EXACT_STEPS = st.lists(
    st.sampled_from(["pad 5", "pad 9", "fold", "scale", "fuse", "split", "swap", "settle"]), max_size=8
)


@settings(max_examples=80)
@given(
    st.integers(0, 2**20), EXACT_STEPS, st.lists(st.sampled_from([1.0, 0.5, 2.0, 4.0, -8.0]), min_size=4, max_size=4)
)
def test_exact_steps_lose_exactly_nothing(seed: int, chain: list[str], drawn_scales: list[float]) -> None:
    """Small integers and powers of two, of which float64 rounds no product and no sum."""
    types = [*TYPES.values()]
    sources = {
        module: small_integers(count, 2 + i, seed + i, types[(seed + i) % 4], drawn_scales[i] * (2 + i))
        for i, (module, count) in enumerate(ROWS.items())
    }
    dense = {module: rows_of(each) for module, each in sources.items()}
    with TemporaryDirectory() as folder:
        way = Chain(start(opened(Path(folder), sources)), {m: [(m, 0, len(D))] for m, D in dense.items()})
        for step in (*chain, "settle"):
            way.take(step)
        for module, change in way.state.log.items():
            assert torch.equal(made_rows(way.state.adapter, module), way.true(dense, module)), way.done
            assert change.loss.relative == 0 and change.how not in LOSSES, way.done
            assert change.how == _word(way, module), way.done


def _word(way: Chain, module: str) -> str:
    """Return the word for what was done to a module, the strongest of all."""
    if module in ("q", "k", "v", "qkv") and "fuse" in way.done:
        return "fused"
    if module == "o" and "swap" in way.done:
        return "swapped"
    return "folded" if module in way.folded else "exact"


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_types_that_hold_the_numbers_are_kept_through_a_chain(dtype: str, tmp_path: Path) -> None:
    """Also where float64 numbers were fused or split before they were settled."""
    sources = {m: small_integers(ROWS[m], 2, i, TYPES[dtype], 4.0 + 4 * i) for i, m in enumerate("qkv")}
    way = Chain(start(opened(tmp_path, sources)), {m: [(m, 0, ROWS[m])] for m in sources})
    for step in ("fold", "fuse", "pad 8", "split", "scale", "settle"):
        way.take(step)
        assert {spec.dtype for u in way.state.adapter.updates.values() for spec in u.specs.values()} == {dtype}
    found = {way.state.adapter.file.tensor(name).dtype for name in way.state.adapter.file.specs}
    assert found == {TYPES[dtype]} and way.done == ["fold", "fuse", "pad 8", "split", "settle"]
