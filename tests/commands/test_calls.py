"""Hold the calls of the library's functions to the tables of their choices and to the code that does them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import FIXTURES, factors, write_model, write_peft

import loratool
from loratool.cli import COMMANDS
from loratool.commands.arguments import arguments_of
from loratool.commands.calls import Call
from loratool.commands.merge.call import Merge

FUNCTIONS = {name: getattr(loratool, name) for name in loratool.__all__ if name.islower() and name != "live"}
CALLS: dict[str, type[Call[Any]]] = {each.name(): each for each in Call.__subclasses__()}


def words_in(annotation: Any) -> Iterator[object]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from words_in(part)


def test_every_function_that_is_a_command_has_a_call() -> None:
    assert FUNCTIONS.keys() - CALLS.keys() == {
        "iter_merged",
        "open_adapter",
        "open_checkpoint",
        "read_report",
        "save_adapter",
        "write_report",
    }
    assert CALLS.keys() <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_editors_complete_the_words_that_are_taken(name: str) -> None:
    annotations = get_type_hints(vars(CALLS[name])["__init__"], include_extras=True)
    for argument in arguments_of(CALLS[name]).values():
        assert {*words_in(annotations[argument.name])} == {*argument.type.choices}, argument.name


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_documented_once(name: str) -> None:
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    for argument in arguments_of(CALLS[name]).values():
        assert argument.text and text.count(f"\n    {argument.name}: ") == 1, argument.name
    assert "{words}" not in text and "{meanings}" not in text


@pytest.mark.parametrize("name", CALLS)
def test_its_work_takes_the_call(name: str) -> None:
    module, _, work = CALLS[name].work.rpartition(".")
    function = getattr(import_module(f"loratool.commands.{module}"), work)
    (taken,) = inspect.signature(function).parameters.values()
    assert taken.annotation == CALLS[name].__name__
    report = inspect.signature(function).return_annotation
    assert {*report.split(" | ")} == {*inspect.signature(FUNCTIONS[name]).return_annotation.split(" | ")}


def test_what_was_given_is_what_is_not_the_default(tmp_path: Any) -> None:
    call = Merge(FIXTURES / "llama" / "base", "adapter", dtype="keep", undo=False, target=("q_proj",), max_shard_size=9)
    assert call.given() == {"max_shard_size": 9, "target": ("q_proj",), "undo": False}
    assert replace(call, undo=True, target=()).given() == {"max_shard_size": 9}


@pytest.mark.parametrize("name", CALLS)
def test_the_command_line_has_every_option(name: str) -> None:
    first = name.partition("_")[0]
    command = first if first in COMMANDS else CALLS[name].__module__.split(".")[-2]
    known = getattr(import_module(f"loratool.cli.{command}"), command)
    has = {word for each in known.params for word in each.opts}
    asked = {f"--{each.word}" for each in arguments_of(CALLS[name]).values() if each.opt and each.opt.title}
    assert asked <= has, f"loratool/cli/{command}.py lists its options, without {', '.join(sorted(asked - has))}"


def test_what_a_report_warns_of_is_logged_in_python_and_printed_on_the_command_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, run: Callable[..., Any]
) -> None:
    base = write_model(tmp_path / "base", {"x.weight": torch.full((4, 5), torch.inf)})
    adapter = write_peft(tmp_path / "adapter", {"x": factors(4, 5, 1)})
    said = "x.weight: 20 weights of the base are inf or nan; they are copied unchanged"
    assert said in loratool.merge(base, adapter, tmp_path / "out").warnings
    assert ("loratool", logging.WARNING, said) in caplog.record_tuples
    caplog.clear()
    assert said in " ".join(run("merge", base, adapter, "-o", tmp_path / "again").stderr.split())
    assert caplog.record_tuples == []
