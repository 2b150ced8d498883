"""Describe the machine and the installation, without what would name a person."""

from __future__ import annotations

import getpass
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ...durable.fileio import size
from ...errors import without_credentials
from ...files.hub.snapshots import cache_folder
from ...numerics.passes.native import describe_native
from ...streaming.parallel import may_have_gpu, worker_count
from ...views.env import CacheFolder, EnvReport, PackageVersion
from ..to_store import outgoing_folder
from .call import Env

PACKAGE = "loratool"

# beginnings of the names of variables that change what loratool, torch or huggingface_hub do
PREFIXES = ("LORATOOL_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH", "CUDA_", "PYTORCH_", "OMP_", "OPENBLAS_")

OURS = "HF_HUB_DISABLE_PROGRESS_BARS"  # which -q and --json set


def run_env(call: Env) -> EnvReport:
    """Return the report of `env`."""
    return EnvReport(
        loratool=metadata.version(PACKAGE),
        native=_anonymous(describe_native()),
        python=f"{platform.python_version()}, {platform.python_implementation()}",
        system=_anonymous(", ".join(_system())),
        processor=_anonymous(_processor()),
        cores=worker_count(),
        packages=tuple(PackageVersion(name, _anonymous(version)) for name, version in _packages()),
        devices=tuple(map(_anonymous, _devices())),
        caches=(CacheFolder("hub", *_place(cache_folder())), CacheFolder("outgoing", *_place(outgoing_folder()))),
        variables=tuple(_anonymous(name) for name in sorted(os.environ) if name.startswith(PREFIXES) and name != OURS),
    )


def _anonymous(text: str) -> str:
    """Return a text with ~ for the home folder and USER for the user's names, and without credentials."""
    home = Path.home()
    if home != home.parent:
        text = re.sub(rf"{re.escape(str(home))}(?![\w.-])", "~", text)
    for name in {*_login(), home.name} - {""}:
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "USER", text)
    return without_credentials(text)


def _login() -> Iterator[str]:
    try:
        yield getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        return


def _system() -> Iterator[str]:
    """Yield the kernel with its release and machine, the distribution, and the C library. Not the machine's name."""
    yield f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        yield platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # no Linux
        yield from filter(None, [platform.mac_ver()[0]])
    yield from filter(None, [" ".join(platform.libc_ver()).strip()])


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _packages() -> Iterator[tuple[str, str]]:
    """Yield the packages that loratool and its extras can use, if installed, with their versions. None is imported."""
    for name in sorted({re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in metadata.requires(PACKAGE) or ()}):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _devices() -> Iterator[str]:
    """Yield a line for each GPU, or the reason for which torch sees none. Without a driver torch is not loaded."""
    if not may_have_gpu():
        return
    try:
        import torch

        made_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        for number in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(number)
            yield f"cuda:{number}: {of.name}, {size(of.total_memory)}, capability {of.major}.{of.minor}, {made_for}"
    except Exception as error:  # a report of a bug needs this too, whatever torch raises
        yield f"torch fails: {type(error).__name__}: {' '.join(str(error).split())}"


def _place(folder: Path) -> tuple[str, bool]:
    """Return where a folder is, and whether it exists. Outside of the home folder the path is not told."""
    home = Path.home()
    inside = home != home.parent and folder.is_relative_to(home)
    return _anonymous(str(folder)) if inside else "outside the home folder", _is_folder(folder)


def _is_folder(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:
        return False
