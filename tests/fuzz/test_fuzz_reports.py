"""Hold `read_report` against pages and JSON that lie: it gives the report that stands there, or says what is wrong.

The command of a case is `inspect` of the same file, which is no weights.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES
from damages import damaged_bytes
from fuzzing import Case, Fuzzer, Ran
from lies import lie

import loratool
from loratool.views.parts.envelope import BEGIN, REPORT_TAG

pytestmark = pytest.mark.fuzz

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"


@cache
def envelopes() -> list[dict[str, Any]]:
    """Return what `--json` prints of reports that have all kinds of fields between them."""
    reports = {
        "count": loratool.count(BASE),
        "diff": loratool.diff(ADAPTER, ADAPTER, layers=[0], target="q_proj"),
        "inspect": loratool.inspect(BASE),
        "merge": loratool.merge(BASE, ADAPTER, "out", dry_run=True, target="q_proj"),
    }
    head = {"schema": 2, "ok": True, "exit_code": 0}
    found = [{**head, "verb": verb, "report": report.to_dict()} for verb, report in reports.items()]
    step = {"number": 1, "command": "count", "out": None, "state": "done", "waits_for": [], "exists": False}
    steps = [{**step, "report": each} for each in (found[0]["report"], None)]
    run = {"recipe": "r.json", "dry_run": False, "steps": steps, "total": 2}
    return [*found, {**head, "verb": "run", "report": run}, {**head, "ok": False, "verb": "diff", "error": {}}]


def page_of(data: bytes) -> bytes:
    return f"{BEGIN}\n<html><p>x</p>{REPORT_TAG}".encode() + data + b"</script>\n</body>\n</html>"


def make(rng: random.Random) -> Case:
    value: Any = rng.choice(envelopes())
    for _ in range(rng.choice((0, 1, 1, 1, 3))):
        report = value.get("report") if isinstance(value, dict) else None
        if isinstance(report, dict) and report and rng.random() < 0.7:
            value = {**value, "report": lie(report, rng)}
        elif value and isinstance(value, dict):
            value = lie(value, rng)
    text = json.dumps(value).replace("<", "\\u003c")
    match rng.randrange(12):
        case 0:
            text = text.replace("1", rng.choice(("1e999", "9" * 6000, "01", "-1", "1.0", "NaN")), 1)
        case 1:
            text = text.replace("null", rng.choice(("[" * 100_000, '{"a":' * 100_000, "[[]]", '"\\ud800"')), 1)
        case 2:
            text = text.replace('"verb"', '"verb": "merge", "verb"', 1)
    data = text.encode()
    if is_page := rng.random() < 0.7:
        data = page_of(data)
    match rng.randrange(10):
        case 0 | 1:
            data = damaged_bytes(rng, data)
        case 2:
            data = data[: rng.randrange(len(data) + 1)]
        case 3:
            data += rng.choice((data, REPORT_TAG.encode(), page_of(b"{}"), b"</script></html>", b"\n" * 5000))
        case 4:
            data = data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-8-sig", "latin-1")), "replace")
    name = f"report.{'html' if is_page else 'json'}"
    return Case({name: data}, ("inspect", name))


def held(data: bytes) -> Any:
    """Return the report that stands in a file, found without ours."""
    text = data.decode("utf-8-sig", "replace")  # what is around the report may be damaged
    start = text.find(REPORT_TAG)
    if start >= 0:
        text = text[start + len(REPORT_TAG) :].split("</script>")[0]
    return json.loads(text)["report"]


def test_reports(fuzz: Fuzzer) -> None:
    def judge(case: Case, ran: Ran, work: Path) -> Iterator[str]:
        (name, data), *_ = case.files.items()
        found = fuzz.server.call("report_reader:read", str(work / name))
        if found is None:
            yield "read_report raised another error, was killed or took long"
        elif found["too_much"]:
            yield f"read_report took {found['too_much']} bytes"
        elif "error" in found and not found["error"].startswith(str(work)):
            yield f"the error does not name the file: {found['error']}"
        elif "report" in found and found["report"] != held(data):
            yield "what was read is not what stands in the file"

    fuzz(make, 6, judge)
