"""The simulated schedule, against times worked out by hand, and its items against what a merge writes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import schedule
import trillion
from schedule import Task, Times

from loratool.streaming.items import HashBytes, each_part

FREE = schedule.Costs(*[0.0] * 11)


def test_the_items_are_those_of_a_merge(tmp_path: Path) -> None:
    trillion.make_base(tmp_path / "base", "tiny")
    modules = trillion.make_adapter(tmp_path / "adapter", "tiny")
    items = list(schedule.items_of(tmp_path))
    shapes = trillion.modules(trillion.MODELS["tiny"]).values()
    costs = replace(FREE, coded=1.0)
    assert len(shapes) == modules and not (tmp_path / "merged").exists()
    assert sum(schedule.task_of(item, costs).seconds for item in items) == sum(out * inp for out, inp in shapes)
    specs = dict(trillion.tensors(trillion.MODELS["tiny"]))
    merged = {f"{name}.weight": 2 * out * inp for name, (out, inp) in trillion.modules(trillion.MODELS["tiny"]).items()}
    beside = {name for name in specs if name.removesuffix("_scale_inv") in merged}
    left = sum(spec.nbytes for name, spec in specs.items() if name not in beside)
    assert sum(item.nbytes for item in items) == sum(merged.values()) + left
    assert sum(part.length for item in items for part in each_part(item) if isinstance(part, HashBytes)) == sum(
        spec.nbytes for spec in specs.values()
    )


ALIKE = [Task(3.0, 4, 2)] * 8


@pytest.mark.parametrize(
    "tasks, ranks, workers, bandwidth, worked",
    [
        (ALIKE, 1, 1, math.inf, 24.0),
        (ALIKE, 2, 2, math.inf, 6.0),
        (ALIKE, 3, 1, math.inf, 9.0),
        (ALIKE, 1, 1, 2.0, 8 * (2 + 3 + 1)),
        ([Task(100.0, 4, 0)] * 8, 4, 2, 2.0, 8 * 2 + 100.0),  # all read in a row, and the last computes
        ([Task(0.0, 4, 2)] * 8, 4, 2, 2.0, 8 * (2 + 1)),
    ],
)
def test_times_worked_out_by_hand(tasks: list[Task], ranks: int, workers: int, bandwidth: float, worked: float) -> None:
    assert schedule.simulate(tasks, FREE, ranks, workers, bandwidth, 0) == Times(0.0, worked, worked)


def test_what_all_wait_for_is_added() -> None:
    costs = replace(FREE, planned=2.0, finished=0.5, closed=2.0, enumerated=0.25)
    found = schedule.simulate([Task(3.0, 0, 0)] * 4, costs, 1, 1, math.inf, tensors=3)
    # its first item is told after a quarter of a second, and passes over itself in another
    assert found == Times(6.0, 6.0 + 0.25 + 4 * 3.25, 6.0 + 0.25 + 4 * 3.25 + 4 * 0.5 + 3 * 2.0)


def test_one_counter_and_one_journal_a_rank_are_limits() -> None:
    tasks = [Task(0.0, 0, 0)] * 100
    found = schedule.simulate(tasks, replace(FREE, asked=0.5), 4, 2, math.inf, 0)
    assert found.worked == pytest.approx(100 + 16)  # two answers of an item, and each worker is told twice of the end
    found = schedule.simulate(tasks, replace(FREE, journaled=1.0), 4, 2, math.inf, 0)
    assert found.worked == pytest.approx(25)


def test_the_least_that_any_schedule_takes() -> None:
    assert schedule.least(ALIKE, 4, math.inf) == 6.0 and schedule.least(ALIKE, 4, 2.0) == 24.0
