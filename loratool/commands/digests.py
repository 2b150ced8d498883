"""The digests of models and adapters by their paths: of what a command read and wrote, for its report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..adapters.formats import holds_adapter
from ..adapters.formats.find import find_adapter_file
from ..adapters.formats.peft_config import CONFIG_NAME
from ..errors import InputError
from ..files.checkpoint import open_checkpoint, open_weights
from ..files.hub.cache import by_ranges, resolve
from ..files.weights_file import WeightsFile, require_unchanged
from ..streaming.digests import digest_of_files
from ..streaming.parallel import Progress
from ..views.parts.report import CheckReport, WritingReport
from .adapter_requests import parse_adapters
from .arguments import parse_paths

if TYPE_CHECKING:
    from .arguments import StrPath

R = TypeVar("R")

# keywords of one model or adapter
INPUTS = ("base", "source", "adapter", "a", "b", "tuned", "merged", "initial", "like")


def digest_of_path(path: str | os.PathLike[str], progress: Progress | None = None) -> str:
    """Read all of a model or an adapter once, and return its digest as `files.digest` defines it.

    Raises:
        InputError: it cannot be read, changes meanwhile, or has a name that has no digest.
    """
    with opened_files(path) as files:
        digest = digest_of_files(files, progress)
        require_unchanged(files)
        return digest


def with_digests(call: object, report: R) -> R:
    """Return a report with the digests of the models and adapters that the call names, and of its output.

    Adapters are small, so theirs are always there; those of models only if the call has `digest`.
    """
    if not isinstance(report, CheckReport | WritingReport) or report.digests or getattr(report, "dry_run", False):
        return report
    asked, digests = bool(getattr(call, "digest", False)), {}
    for path in _named_paths(vars(call), getattr(report, "out", None)):
        with suppress(*() if asked else (InputError,)):
            if asked or holds_adapter(by_ranges(path)):  # a model of which only headers were read is no download
                digests[os.fspath(path)] = digest_of_path(path)
    return replace(report, digests=digests)


def _named_paths(arguments: Mapping[str, Any], out: StrPath | None) -> Iterator[StrPath]:
    for name in INPUTS:
        if (given := arguments.get(name)) is not None:
            yield from parse_paths(given)
    yield from arguments.get("others", ())
    if arguments.get("adapters") is not None:
        yield from (each.path for each in parse_adapters(arguments["adapters"]))
    if out is not None:
        yield out


def config_of_path(path: str | os.PathLike[str]) -> Path | None:
    """Return the config beside the weights of a model or an adapter, which has what tensors do not say, like alpha."""
    name = CONFIG_NAME if holds_adapter(path) else "config.json"
    with opened_files(path) as files:
        places = [file.path.parent / name for file in files[:1]]
    return next((place for place in places if place.is_file()), None)


@contextmanager
def opened_files(path: str | os.PathLike[str]) -> Iterator[Sequence[WeightsFile]]:
    """Open the weights files of a model, of an adapter or of another method."""
    if not holds_adapter(path):
        with closing(open_checkpoint(path)) as checkpoint:
            yield checkpoint.shards
    else:
        with closing(open_weights(find_adapter_file(resolve(path)))) as file:
            yield file.members
