"""Hold what steps are made of: nothing is made before it is asked for, one module is held, and no loss is forgotten."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stepping import (
    Factors,
    counted,
    drawn,
    made_rows,
    opened,
    relative,
    rows_of,
    to_fuse,
    to_split,
    to_swap,
)
from torch import Tensor

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import FORMATS
from loratool.adapters.updates.experts import Experts
from loratool.adapters.updates.update import Stack
from loratool.files.dtypes import TensorSpec
from loratool.numerics.arrays import Numbers
from loratool.numerics.forms import BF16, F16, Bits, Form
from loratool.numerics.tensors import numbers_of, tensor_of
from loratool.transform.lazy import (
    RESTATED,
    LazyFile,
    Made,
    Tensors,
    Transformed,
    restated,
    start,
    with_factors,
    with_modules,
)
from loratool.transform.log import NO_LOSS, Loss
from loratool.transform.numbers import cut_ranks, fold, one_scale, pad, settle
from loratool.transform.output import content, in_format, rows
from loratool.transform.regroup import regroup

PEFT = FORMATS["peft"]
STEPS: dict[str, Callable[[Transformed], Transformed]] = {
    "cut": lambda state: cut_ranks(state, 2),
    "one scale": one_scale,
    "fold": fold,
    "pad": lambda state: pad(state, lambda module: 6),
}


def three() -> dict[str, Factors]:
    return {
        m: drawn(8, 3, seed, torch.bfloat16, alpha)
        for seed, (m, alpha) in enumerate(zip("qkv", (1.0, 6.0, 0.7), strict=True))
    }


def write(state: object) -> dict[str, Tensor]:
    """Make every tensor in the order of a file, as a writer does."""
    made = content(in_format(state, PEFT))  # type: ignore[arg-type]
    return {name: tensor_of(made.load(name)) for name in made.specs}


def numbers_by_role(**tensors: Tensor) -> Tensors:
    return {role: numbers_of(tensor) for role, tensor in tensors.items()}


def forbid_reading(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("read more than headers")

    for method in ("numbers", "read", "read_bytes", "read_numbers"):
        monkeypatch.setattr(adapter.file, method, refuse)


class TestMaking:
    def test_no_step_reads_a_number(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = opened(tmp_path, three())
        forbid_reading(source, monkeypatch)
        state = start(source)
        for step in STEPS.values():
            state = step(state)
        assert {(update.rank, update.scale) for update in state.adapter.updates.values()} == {(6, 1.0)}
        assert state.measured("q")

    def test_what_is_placed_alone_is_converted_from_headers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = opened(tmp_path, three())
        forbid_reading(source, monkeypatch)
        state = pad(start(source), lambda module: 4)
        names = {role: f"new.{role}" for role in "AB"}
        moved = {"q": replace(state.adapter.updates["q"], module="new", tensors=names)}
        keys = {names[role]: name for role, name in state.adapter.updates["q"].tensors.items()}
        for step in (state, with_modules(state, {}, moved, keys, "peft")):
            settled = settle(step, None)
            assert not any(map(step.measured, step.adapter.updates))
            assert {(row.how, row.error, row.rank) for row in rows(settled)} == {("exact", 0.0, 4)}
            assert {spec.dtype for spec in settled.adapter.file.specs.values()} == {"BF16"}

    def test_each_step_holds_one_module(self, tmp_path: Path) -> None:
        """No tensor that a step has made is alive when it begins to make another module's."""
        state = start(opened(tmp_path, three()))
        alive: dict[LazyFile, list[weakref.ref[Bits]]] = {}

        def watch(file: LazyFile, each: Made) -> Made:
            def make() -> tuple[Tensors, Loss]:
                assert not any(ref() is not None for ref in alive.get(file, ()))
                tensors, loss = each.make()  # a step may give on the former's
                own = {role: Numbers(numbers.bits.copy(), numbers.form) for role, numbers in tensors.items()}
                alive[file] = [weakref.ref(numbers.bits) for numbers in own.values()]
                return own, loss

            return replace(each, make=make)

        steps = [STEPS[name] for name in ("one scale", "fold", "cut", "pad")]
        for step in (*steps, lambda state: settle(state, F16)):
            state = step(state)
            file = state.adapter.file
            assert isinstance(file, LazyFile)
            file._planned = {module: watch(file, each) for module, each in file._planned.items()}
        for update in state.adapter.updates.values():
            for name in update.tensors.values():
                state.adapter.file.numbers(name)
        assert len(alive) == 5

    @pytest.mark.parametrize("first", STEPS)
    def test_a_conversion_makes_each_module_twice(self, first: str, tmp_path: Path) -> None:
        """Once to settle and once to write, whatever the number of steps."""
        state, counts = STEPS[first](start(opened(tmp_path, three()))), []
        counts.append(counted(state))
        for name, step in STEPS.items():
            if name != first and (after := step(state)) is not state:
                state = after
                counts.append(counted(state))
        settled = settle(state, BF16)
        assert max(max(each.values()) for each in counts) == 1
        counts.append(counted(settled))
        assert len(rows(settled)) == 3
        assert [tensor.dtype for tensor in write(settled).values()] == [torch.bfloat16] * 6
        assert max(max(each.values()) for each in counts) == 2

    @pytest.mark.parametrize("step", ["cut", "pad", "fold"])
    def test_fused_ones_once_more_to_plan(self, step: str, tmp_path: Path) -> None:
        """Ranks and types of what is fused are its numbers', and it is so of several modules of which one is held."""
        modules = {f"{i}.{m}": drawn(8, 3, 3 * i + j, alpha=0.7) for i in range(2) for j, m in enumerate("qkv")}
        state = STEPS[step](start(opened(tmp_path, modules)))
        counts, targets = counted(state), dict[str, object]()
        for i in range(2):
            targets |= to_fuse(state.adapter, [f"{i}.{m}" for m in "qkv"], f"{i}.qkv")
        fused = regroup(state, targets)  # type: ignore[arg-type]
        of_fused = counted(fused)
        write(settle(fused, BF16))
        assert set(counts.values()) == {3} and set(of_fused.values()) == {2}

    def test_losses_are_remembered(self, tmp_path: Path) -> None:
        state = cut_ranks(start(opened(tmp_path, three())), 2)
        counts, file = counted(state), state.adapter.file
        assert isinstance(file, LazyFile)
        first = [file.loss(module) for module in "qkvqkv"]
        assert set(counts.values()) == {1} and first[:3] == first[3:] and all(each.squared for each in first)
        file.tensor(state.adapter.updates["q"].tensors["A"])
        assert counts == {"q": 2, "k": 1, "v": 1} and file.loss("q") == first[0]

    def test_another_thread_may_ask_between_the_look_and_the_answer(self, tmp_path: Path) -> None:
        """Played by a name that asks for another module whenever it is compared."""

        class Asking(str):
            __hash__ = str.__hash__

            def __ne__(self, other: object) -> bool:
                if asking:
                    file.tensor(asking.pop())
                return str.__ne__(self, other)

        modules = three()
        source = start(opened(tmp_path, modules))
        made = {}
        for name in (Asking("q"), "k"):
            update = replace(source.adapter.updates[name], tensors={role: f"{name!s}.{role}" for role in "AB"})
            tensors = numbers_by_role(A=modules[name].A, B=modules[name].B)
            made[name] = Made(update, lambda tensors=tensors: (tensors, NO_LOSS), (name,))
        file = with_modules(source, made, {}, {}, "peft").adapter.file
        asking: list[str] = []
        for _ in range(3):
            assert torch.equal(file.tensor("q.B"), modules["q"].B)
            asking.append("k.B")
        assert not asking[1:]


class TestParts:
    """A module of several parts, as a stack of experts, of which some were cut and others were not."""

    def stack(self, state: Transformed, parts: list[str]) -> Transformed:
        """Put modules into a stack, E matrices of the largest rank."""
        updates = [state.adapter.updates[part] for part in parts]
        E, rank, (out, width) = len(parts), max(update.rank for update in updates), updates[0].shape

        def make() -> tuple[Tensors, Loss]:
            A = torch.zeros(E, rank, width, dtype=torch.float64)
            B = torch.zeros(out, rank, E, dtype=torch.float64)
            for e, update in enumerate(updates):
                loaded = state.adapter.load(update)
                A[e, : update.rank] = torch.from_numpy(loaded.A.wide())
                B[:, : update.rank, e] = torch.from_numpy(loaded.B.wide()) * update.scale
            return numbers_by_role(A=A.flatten(0, 1), B=B.flatten(1)), NO_LOSS

        specs = {"A": TensorSpec("F32", (E * rank, width)), "B": TensorSpec("F32", (out, rank * E))}
        names = {role: f"base_model.model.experts.lora_{role}.weight" for role in "AB"}
        update = replace(updates[0], cls=Experts, module="experts", tensors=names, specs=specs, detail=Stack(E))
        update = replace(update, scale=1.0)
        return with_modules(state, {"experts": Made(update, make, tuple(parts), "fused")}, {}, {}, "peft")

    def modules(self) -> dict[str, Factors]:
        ranks, alphas = (1, 4, 2, 4), (20.0, 4.0, 2.0, 1.0)
        both = enumerate(zip(ranks, alphas, strict=True))
        return {f"e{i}": drawn(8, rank, i, torch.bfloat16, alpha) for i, (rank, alpha) in both}

    @pytest.mark.parametrize("settled", [False, True])
    @pytest.mark.parametrize("dtype", [None, BF16])
    def test_those_that_lost_nothing_count_with_their_size(
        self, settled: bool, dtype: Form | None, tmp_path: Path
    ) -> None:
        modules = self.modules()
        state = cut_ranks(start(opened(tmp_path, modules)), 2)
        state = settle(state, None) if settled else state
        made = settle(self.stack(state, list(modules)), dtype)
        error = relative(made_rows(made.adapter, "experts"), torch.cat([rows_of(each) for each in modules.values()]))
        change = made.log["experts"]
        assert error < 0.2 and change.loss.relative == pytest.approx(error, rel=1e-4)
        assert change.how == "truncated" and change.sources == tuple(modules)

    def test_of_parts_without_a_loss_no_size_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        modules = self.modules()
        source = opened(tmp_path, modules)
        settled = settle(start(source), None)
        forbid_reading(source, monkeypatch)
        assert self.stack(settled, list(modules)).log["experts"].loss == NO_LOSS

    @pytest.mark.parametrize("between", [(), ("pad",), ("one scale", "pad", "fold")])
    def test_rows_of_a_cut_module_have_losses_of_their_own(self, between: tuple[str, ...], tmp_path: Path) -> None:
        """What is cut from all at once is little of some rows and much of others."""
        whole = drawn(20, 4, alpha=2.2)
        whole.B[8:16] *= 0.1
        whole.B[16:, :2] *= 0.01
        whole.B[:8, 2:] *= 0.01
        state = STEPS["cut"](start(opened(tmp_path, {"qkv": whole, "o": drawn(8, 3, 1)})))
        for name in between:
            state = STEPS[name](state)
        counts = counted(state)
        state = regroup(state, to_swap(state.adapter, "qkv", 8), ["o"])
        state = regroup(state, to_split(state.adapter, "qkv", {"k": 8, "v": 4, "q": 8}), ["o"])
        made, true = settle(state, None), rows_of(whole)
        errors = {}
        for module, part in {"q": slice(0, 8), "k": slice(8, 16), "v": slice(16, 20)}.items():
            errors[module] = relative(made_rows(made.adapter, module), true[part])
            assert made.log[module].loss.relative == pytest.approx(errors[module], rel=1e-6)
            assert made.log[module].how == "truncated" and made.log[module].sources == ("qkv",)
        assert max(errors.values()) > 2 * min(errors.values())
        write(made)
        assert counts["qkv"] <= 4 and counts["o"] <= 2

    def test_rows_of_a_module_that_was_fused_of_cut_ones(self, tmp_path: Path) -> None:
        """Zeros were filled in for rows that have no adapter; they stay away, and shift no other row's loss."""
        modules = {m: drawn(8, 4, seed, alpha=alpha) for seed, (m, alpha) in enumerate([("q", 4.0), ("v", 0.5)])}
        state = cut_ranks(start(opened(tmp_path, modules)), 1)
        fused = to_fuse(state.adapter, ["q"], "qkv", 24)["qkv"]
        other = to_fuse(state.adapter, ["v"], "qkv", 8)["qkv"].parts[0]
        fused = replace(fused, parts=(*fused.parts, replace(other, target_start=16)))
        state = regroup(state, {"qkv": fused})
        state = cut_ranks(state, 1)
        state = regroup(state, to_split(state.adapter, "qkv", {"q": 8, "k": 8, "v": 8}))
        made = settle(state, None)
        for module, each in modules.items():
            error = relative(made_rows(made.adapter, module), rows_of(each))
            assert made.log[module].loss.relative == pytest.approx(error, rel=1e-6)
        assert not math.isclose(*(made.log[module].loss.relative for module in "qv"), rel_tol=0.01)

    def test_where_no_rows_are_known_the_whole_stands_for_them(self, tmp_path: Path) -> None:
        whole = drawn(16, 3)
        source = start(opened(tmp_path, {"qk": whole}))
        tensors, told = numbers_by_role(A=whole.A, B=whole.B), Loss(1.0, 4.0, True)
        state = with_factors(
            source, {"qk": Made(source.adapter.updates["qk"], lambda: (tensors, told), ("qk",), "expanded")}
        )
        made = settle(regroup(state, to_split(state.adapter, "qk", {"q": 8, "k": 8})), None)
        assert [made.log[m].loss.relative for m in "qk"] == [0.5, 0.5]


class TestTheWall:
    @pytest.mark.parametrize("steps", [("fold",), ("cut",), ("cut", "fold", "pad"), ("one scale", "pad")])
    @pytest.mark.parametrize("dtype", [BF16, F16, None])
    def test_settling_again_counts_nothing_twice(
        self, steps: tuple[str, ...], dtype: Form | None, tmp_path: Path
    ) -> None:
        modules = three()
        state = start(opened(tmp_path, modules))
        for name in steps:
            state = STEPS[name](state)
        once = settle(state, dtype)
        for again in (settle(once, None), settle(once, dtype), settle(settle(pad(once, lambda m: 8), dtype), None)):
            for module, each in modules.items():
                assert again.log[module].loss == once.log[module].loss
                error = relative(made_rows(again.adapter, module), rows_of(each))
                assert again.log[module].loss.relative == pytest.approx(error, rel=1e-3, abs=1e-15)
                assert again.adapter.file.loss(module) == NO_LOSS and not again.measured(module)

    def test_another_type_adds_its_own_rounding(self, tmp_path: Path) -> None:
        modules = {"m": drawn(64, 8, alpha=3.3)}
        half = settle(fold(start(opened(tmp_path, modules))), F16)
        brain = settle(half, BF16)
        error = relative(made_rows(brain.adapter, "m"), rows_of(modules["m"]))
        assert brain.log["m"].loss.relative == pytest.approx(error, rel=0.02)
        assert brain.log["m"].loss.relative > half.log["m"].loss.relative

    def test_a_state_can_be_settled_more_than_once(self, tmp_path: Path) -> None:
        """As where a plan is tried, and made again with another type."""
        state = pad(start(opened(tmp_path, three())), lambda module: 4)
        first = settle(fold(state), BF16)
        settle(state, None)
        for _ in range(2):
            again = settle(fold(state), BF16)
            assert {m: c.loss for m, c in again.log.items()} == {m: c.loss for m, c in first.log.items()}
            assert all(change.how == "rounded" for module, change in again.log.items() if module != "k")


class TestNames:
    def test_other_factors_keep_all_names(self, tmp_path: Path) -> None:
        modules = {m: replace(each, others={"lora_magnitude_vector": torch.ones(8)}) for m, each in three().items()}
        source = start(opened(tmp_path, modules))
        for step in STEPS.values():
            state = step(source)
            assert state.adapter.file.specs.keys() == source.adapter.file.specs.keys()
            assert list(state.adapter.updates) == list(state.log) == list(source.adapter.updates)
            assert state.adapter.file.metadata == source.adapter.file.metadata
            for module, update in state.adapter.updates.items():
                assert update.tensors == source.adapter.updates[module].tensors
                for role, name in update.tensors.items():
                    assert state.adapter.file.specs[name] == update.specs[role]
                    assert state.adapter.file.tensor(name).shape == update.specs[role].shape

    def test_a_tensor_under_the_factors_stays(self, tmp_path: Path) -> None:
        modules = three()
        source = start(opened(tmp_path, modules))
        under = source.adapter.updates["v"].tensors["A"]  # any other tensor of the file will do
        updates = {"q": replace(source.adapter.updates["q"], base=under)}
        source = start(replace(source.adapter, updates=updates))
        state = cut_ranks(source, 1)
        assert state.adapter.updates["q"].base == under
        assert torch.equal(state.adapter.file.tensor(under), modules["v"].A)

    def test_other_modules_have_theirs_alone(self, tmp_path: Path) -> None:
        modules = three()
        source = start(opened(tmp_path, modules))
        update = source.adapter.updates["q"]
        names = {role: f"new.{role}" for role in "AB"}
        moved = {"q": replace(update, module="new", tensors=names)}
        made = {"w": Made(replace(update, module="w", tensors={r: f"w.{r}" for r in "AB"}), dict, ("k", "v"), "fused")}
        keys = {names[role]: update.tensors[role] for role in "AB"}
        state = with_modules(source, made, moved, keys, "kohya", ["w", "new"])
        assert list(state.adapter.updates) == ["w", "new"] and state.adapter.format == "kohya"
        assert state.adapter.file.specs.keys() == {"new.A", "new.B", "w.A", "w.B"}
        assert torch.equal(state.adapter.file.tensor("new.B"), modules["q"].B)
        assert {m: (c.sources, c.how) for m, c in state.log.items()} == {
            "new": (("q",), "exact"),
            "w": (("k", "v"), "fused"),
        }
        assert list(with_modules(source, made, moved, keys, "peft").adapter.updates) == ["new", "w"]

    def test_a_moved_module_keeps_its_loss(self, tmp_path: Path) -> None:
        state = cut_ranks(start(opened(tmp_path, three())), 1)
        update = state.adapter.updates["q"]
        moved = {"q": replace(update, module="new")}
        renamed = with_modules(state, {}, moved, {name: name for name in update.tensors.values()}, "peft")
        assert renamed.measured("new")
        assert settle(renamed, None).log["new"].loss == settle(state, None).log["q"].loss

    def test_a_config_says_no_more_than_the_updates(self, tmp_path: Path) -> None:
        source = start(opened(tmp_path, three()))
        before = source.adapter.config.peft
        assert RESTATED & before.keys() and "use_dora" in before
        for step in STEPS.values():
            after = step(source).adapter.config.peft
            assert not RESTATED & after.keys()
            assert after == {key: value for key, value in before.items() if key not in RESTATED}
        assert settle(source, F16).adapter.config.peft == before  # the type alone restates nothing
        assert settle(fold(source), None).adapter.config == restated(source.adapter).config

    def test_what_is_written_says_the_new_scales_and_ranks(self, tmp_path: Path) -> None:
        state = settle(STEPS["pad"](fold(start(opened(tmp_path, three())))), None)
        fields = content(in_format(state, PEFT)).config
        assert fields["r"] == 6 and fields["lora_alpha"] == 6 and not fields["rank_pattern"]


class TestNothing:
    @pytest.mark.parametrize("step", STEPS)
    def test_an_adapter_without_modules_goes_through(self, step: str, tmp_path: Path) -> None:
        source = opened(tmp_path, three())
        state = start(replace(source, updates={}))
        made = settle(STEPS[step](state), BF16)
        assert not made.log and not made.adapter.updates and rows(made) == ()
        assert regroup(state, {}).adapter.updates == {} and with_modules(state, {}, {}, {}, "peft").log == {}

    def test_a_module_that_is_made_of_none_has_no_row(self, tmp_path: Path) -> None:
        """Zeros that a runtime needs."""
        source = start(opened(tmp_path, three()))
        zeros = numbers_by_role(A=torch.zeros(3, 24), B=torch.zeros(8, 3))
        update = replace(source.adapter.updates["q"], module="z", tensors={role: f"z.{role}" for role in "AB"})
        state = with_modules(source, {"z": Made(update, lambda: (zeros, NO_LOSS), ())}, {}, {}, "peft")
        made = settle(state, BF16)
        assert made.log["z"].sources == () and rows(made) == ()
        assert not made.adapter.file.tensor("z.B").any()
