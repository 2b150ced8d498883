"""`env`: what it says is what the system and the packages say, and it names no person and no secret."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

import loratool
from loratool.commands.env import command

Run = Callable[..., Any]


def test_it_says_what_the_system_says() -> None:
    report = loratool.env()
    uname = subprocess.run(["uname", "-srm"], capture_output=True, text=True, check=True).stdout.strip()
    assert report.system.startswith(uname) and report.python.startswith(platform.python_version())
    versions = {"torch": torch.__version__, "numpy": np.__version__, "safetensors": safetensors.__version__}
    assert versions.items() <= {each.name: each.version for each in report.packages}.items()


def test_no_person_and_no_secret_is_named(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "alice.smith"
    (home / "models" / "hub").mkdir(parents=True)
    secrets = {"HF_TOKEN": f"hf_{'S3cret' * 5}", "LORATOOL_MERGE_OUT": "s3://alice.smith:pw@bucket/secret-project"}
    places = {"HOME": home, "USER": "alice.smith", "LOGNAME": "alice.smith", "XDG_CACHE_HOME": "/scratch/alice.smith"}
    for name, value in {**secrets, **places, "HF_HOME": home / "models", "HF_alice.smith": "1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(command, "describe_native", lambda: f"none ({home}/x.so, /net/alice.smith/y.so: no symbol)")
    shown = [run("env"), run("env", "-v"), run("env", "--json")]
    for result in shown:
        assert result.exit_code == 0 and result.stderr == ""
        assert [
            word for word in ("alice", "S3cret", "s3:", "project", str(tmp_path), "/scratch") if word in result.stdout
        ] == []
        assert platform.node() not in result.stdout
    report = json.loads(shown[2].stdout)["report"]
    assert report["native"] == "none (~/x.so, /net/USER/y.so: no symbol)"
    assert report["caches"] == [
        {"name": "hub", "place": "~/models/hub", "exists": True},
        {"name": "outgoing", "place": "outside the home folder", "exists": False},
    ]
    assert {"HF_TOKEN", "LORATOOL_MERGE_OUT", "HF_USER"} <= {*report["variables"]}


def test_a_container_without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setenv("HOME", "/")
    assert loratool.env().caches[0].place == "outside the home folder"


@pytest.mark.parametrize("works", [True, False])
def test_gpus_are_those_of_torch(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(number: int) -> Any:
        if works:
            return SimpleNamespace(name="NVIDIA H100", total_memory=80_000_000_000, major=9, minor=0)
        raise RuntimeError("no\n  driver")

    monkeypatch.setattr(command, "may_have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if works else 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    lines = [f"cuda:{i}: NVIDIA H100, 80.0 GB, capability 9.0, CUDA 12.8" for i in range(2)]
    assert loratool.env().devices == tuple(lines if works else ["torch fails: RuntimeError: no driver"])
