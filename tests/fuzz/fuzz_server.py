"""Serve cases: each runs in a forked copy of this process, which has imported all of loratool and torch once.

A line of JSON on stdin asks, a line on stdout answers. What a case costs is then its own work, some 20 ms, and its
peak memory is its own: the kernel's mark is reset in the copy. Linux alone has all that this needs.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

SLACK = 1 << 30  # bytes of addresses that a case may take beside those of the server
SHOWN = 1 << 20  # bytes of a case's output that are answered
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Events of Python's audit -> the arguments that are paths of what changes.
# https://docs.python.org/3/library/audit_events.html
CHANGES = {
    "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,),
}  # fmt: skip
# Those of which no command has a need: what is in a file was run.
PROGRAMS = (
    "os.system os.exec os.posix_spawn os.spawn os.kill subprocess.Popen pickle.find_class socket.connect "
    "socket.getaddrinfo socket.bind webbrowser.open pty.spawn"
).split()


def main() -> None:
    """Answer until stdin ends."""
    import_everything()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def import_everything() -> None:
    """Import torch and every module of loratool, so that no case has to."""
    import torch

    import loratool

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(loratool.__path__, "loratool."):
        if not module.name.endswith(("__main__", "hub_download")):
            import_module(module.name)
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, every page of the server


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request in a copy of this process: its result, how it ended, the seconds, and what it printed."""
    files = {name: os.memfd_create(name) for name in ("stdout", "stderr", "result")}
    begun = time.monotonic()
    child = os.fork()
    if not child:
        _serve(request, files)
    handle = os.pidfd_open(child)
    in_time = bool(select.select([handle], [], [], request["seconds"])[0])
    if not in_time:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - begun
    os.close(handle)
    found = {name: os.pread(file, SHOWN, 0).decode(errors="surrogateescape") for name, file in files.items()}
    for file in files.values():
        os.close(file)
    result = json.loads(found.pop("result") or "{}")
    return {**result, **found, "code": os.waitstatus_to_exitcode(status), "in_time": in_time, "seconds": seconds}


def _serve(request: dict[str, Any], files: dict[str, int]) -> None:
    """Do what a request asks, in the copy, which then ends."""
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(files["stdout"], 1)
        os.dup2(files["stderr"], 2)
        os.chdir(request["folder"])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SLACK, used + SLACK))
        if request["call"] == "loratool":
            _run_loratool(request, files["result"])
        else:
            module, _, name = request["call"].partition(":")
            value = getattr(import_module(module), name)(*request["args"])
            os.write(files["result"], json.dumps({"value": value}).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def _run_loratool(request: dict[str, Any], result: int) -> None:
    """Run the command line, and tell its peak memory and what it changed outside of `root` and started."""
    from loratool.cli import main as run

    os.environ.update(request["environment"])
    changed: list[str] = []
    programs: list[str] = []
    me, leave = os.getpid(), os._exit

    def report(code: int) -> None:
        if os.getpid() == me:  # and not a worker of the command
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = next(line for line in lines if line.startswith("VmHWM"))
            found = {"peak": int(peak.split()[1]) * 1024, "changed": changed, "programs": programs}
            os.write(result, json.dumps(found).encode())
        leave(code)

    os._exit = report  # type: ignore[assignment]
    Path("/proc/self/clear_refs").write_text("5")
    sys.addaudithook(watch(request["root"], changed, programs))
    run(request["argv"])


def watch(root: str, changed: list[str], programs: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that notes paths outside of `root` that change, and what else no command does."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            places = (0,) if isinstance(args[2], int) and args[2] & WRITES else ()
        else:
            places = CHANGES.get(event, ())
        for place in places:
            if isinstance(args[place], (str, bytes, os.PathLike)):
                path = os.path.realpath(os.fsdecode(args[place]))
                if not path.startswith((root, "/dev/", "/proc/self/")):
                    changed.append(f"{event} {path}")
        if event in PROGRAMS:
            programs.append(f"{event} {args!r}"[:500])

    return hook


if __name__ == "__main__":
    main()
