"""Answer questions of a test in a process of its own: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(start: Callable[[], None], verbs: dict[str, Callable[..., Any]]) -> None:
    """Read lists of a verb and paths from standard input, and write each answer, or its fault, to standard output.

    What the server itself prints goes to standard error.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start()
    for line in sys.stdin:
        verb, *paths = json.loads(line)
        signal.alarm(120)
        try:
            found = verbs[verb](*map(Path, paths))
        except Exception as fault:
            found = {"fault": f"{type(fault).__name__}: {fault}"[:600], "trace": traceback.format_exc()[-2500:]}
        print(json.dumps([paths, found], default=str), file=out, flush=True)


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Hold what an adapter adds to each weight (`found`) against what it must add (`wanted`).

    Returned are the largest number of what it must add (`size`) and of the difference (`off`), where one is not 0. A
    weight that a server has padded with rows or columns agrees if these are zero.
    """
    report = {}
    for name in sorted(set(wanted) | set(found)):
        want, have = wanted.get(name), found.get(name)
        size = 0.0 if want is None else float(want.abs().max())
        if want is None or have is None:
            off = size if have is None else float(have.abs().max())
        else:
            have = have.reshape(want.shape) if have.numel() == want.numel() else have
            shape = [max(pair) for pair in zip(want.shape, have.shape, strict=True)]
            left, right = want.new_zeros(shape), want.new_zeros(shape)
            left[tuple(map(slice, want.shape))] = want
            right[tuple(map(slice, have.shape))] = have
            off = float((left - right).abs().max())
        if size or off:
            report[name] = {"size": size, "off": off}
    return report
