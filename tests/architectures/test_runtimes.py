"""Hold the rows of RUNTIMES: every word is one of the table's, every expression compiles, and the guide prints them."""

from __future__ import annotations

import re

import pytest

from loratool.adapters.formats import FORMATS
from loratool.architectures.runtimes.runtime import FEATURES, OUTCOMES, Runtime, Served
from loratool.architectures.runtimes.table import PROGRAMS, RUNTIMES


def served(row: Runtime) -> list[Served]:
    return [row.served, *row.classes.values()]


@pytest.mark.parametrize("key", RUNTIMES)
class TestRow:
    def test_it_says_each_feature_in_the_words_of_the_table(self, key: str) -> None:
        row = RUNTIMES[key]
        assert row.key == key and tuple(row.reads) == tuple(FEATURES)
        assert {*row.reads.values(), row.miss} <= OUTCOMES.keys()

    def test_its_expressions_compile(self, key: str) -> None:
        row = RUNTIMES[key]
        re.compile(row.modules)
        is_mapped = bool(re.compile(row.old_names).pattern)
        assert is_mapped is (row.prefixes == "mapped"), "old_names are of a row with prefixes='mapped', and of no other"
        for each in served(row):
            re.compile(each.never)
            for pattern, replacement in (*row.renames, *each.renames):
                re.compile(pattern).sub(replacement, "")

    def test_what_depends_on_the_class_has_classes(self, key: str) -> None:
        row = RUNTIMES[key]
        assert bool(row.classes) >= ("class" in row.reads.values())
        assert not {name.rpartition(":")[2] for name in row.classes} & row.without
        assert all({*each.heads} <= {"embeddings", "head"} for each in served(row))

    def test_its_ranks_are_in_order(self, key: str) -> None:
        row = RUNTIMES[key]
        assert [*row.max_ranks] == sorted(row.max_ranks)
        assert row.max_ranks or not row.rank_flag, "rank_flag has no values: name them in max_ranks"


def test_a_format_is_loaded_by_runtimes_that_there_are() -> None:
    assert {key for each in FORMATS.values() for key in (*each.loaded_by, *each.also_loaded_by)} <= PROGRAMS.keys()
