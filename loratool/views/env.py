"""Report on the machine and the installation, to be pasted into a report of a bug."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .parts.document import Document, Line, line
from .parts.numbers import plural
from .parts.report import Report


@dataclass(frozen=True)
class PackageVersion:
    """A package that is installed, and its version."""

    name: str
    version: str


@dataclass(frozen=True)
class CacheFolder:
    """A folder of cached files.

    Attributes:
        name: `hub` is huggingface_hub's, `outgoing` that of outputs on their way to a store.
        place: its path, with ~ for the home folder; outside of it no path.
    """

    name: str
    place: str
    exists: bool


@dataclass(frozen=True)
class EnvReport(Report):
    """The result of `env`. No text has the name of a user or of the machine.

    Attributes:
        native: the vector instructions of the compiled passes, or `none` and the reason.
        system: the kernel, the distribution and the C library.
        cores: how many workers a command has by default.
        packages: those that loratool and its extras can use, if installed.
        devices: a line for each GPU that torch sees.
        variables: names of environment variables that are set, without values.
    """

    document_function: ClassVar[str] = "env_document"

    loratool: str
    native: str
    python: str
    system: str
    processor: str
    cores: int
    packages: tuple[PackageVersion, ...]
    devices: tuple[str, ...]
    caches: tuple[CacheFolder, ...]
    variables: tuple[str, ...]


def env_document(report: EnvReport, verbose: bool) -> Document:
    """Return the document of the environment."""
    return Document(subject=line(f"loratool {report.loratool}"), lists=tuple(_lines(report)), verbose=verbose)


def _lines(report: EnvReport) -> Iterator[Line]:
    packages = ", ".join(f"{each.name} {each.version}" for each in report.packages)
    caches = [f"{each.name}, {each.place}{'' if each.exists else ', not there'}" for each in report.caches]
    values = {
        "native": [report.native],
        "python": [report.python],
        "system": [report.system],
        "processor": [f"{report.processor}, {plural(report.cores, 'worker')}"],
        "device": report.devices or ["no GPU"],
        "packages": [packages or "none"],
        "cache": caches,
        "variables": [", ".join(report.variables) or "none"],
    }
    for label, texts in values.items():
        yield from (line(f"{label}: {text}") for text in texts)
