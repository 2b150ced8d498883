"""Run commands on numbers that overflow on the way: no warning of numpy's or torch's reaches the user."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import run_command
from lib.files import lycoris_files as files
from safetensors.torch import save_file
from torch import Tensor

EXITS = (0, 1, 3, 4)  # done, "no", not supported, needs a flag
KINDS = ("lora", "dora", "dora in", "full")
ENDS = {torch.float64: (-1060, 1010), torch.float32: (-140, 120), torch.bfloat16: (-130, 120)}
SIZES = ("usual", "tiny", "huge", "any", "largest")
CASES = [
    pytest.param(*case, id="-".join(map(str, case)), marks=[] if is_quick else [pytest.mark.slow])
    for case in itertools.product(KINDS, ENDS, SIZES, SIZES)
    for is_quick in [case[1] == torch.float64 and case[2] == "usual"]
]


def sized(x: Tensor, size: str, dtype: torch.dtype) -> Tensor:
    """Return numbers of a size, or of any size that the type has."""
    g, (low, high) = torch.Generator().manual_seed(1), ENDS[dtype]
    wide = x.double().clamp(-2, 2)
    powers = {"usual": 0, "tiny": low, "huge": high, "any": torch.randint(low, high, x.shape, generator=g)}
    if size == "largest":
        return (wide.sign() * torch.finfo(dtype).max).to(dtype)
    return torch.ldexp(wide, torch.as_tensor(powers[size])).to(dtype)


def write(folder: Path, kind: str, dtype: torch.dtype, of_base: str, of_adapter: str) -> tuple[Path, Path, Path]:
    """Write a base of one layer and two adapters."""
    base = files.base_of(files.KINDS[kind][0], torch.float64)
    numbers = {"weight": sized(base.weight, of_base, dtype), "bias": sized(base.bias, of_base, dtype)}
    save_file({f"{base.path}.{name}": x for name, x in numbers.items()}, folder / "base.safetensors")
    for seed, name in enumerate("ab"):
        roles = {
            role: x if role == "alpha" else sized(x, of_adapter, dtype)
            for role, x in files.roles_of(kind, torch.float64, seed).items()
        }
        files.write_lycoris(folder / f"{name}.safetensors", {base.path: roles}, "bare")
    return folder / "base.safetensors", folder / "a.safetensors", folder / "b.safetensors"


@pytest.mark.parametrize(("kind", "dtype", "of_base", "of_adapter"), CASES)
def test_numbers_that_overflow_warn_of_nothing(
    tmp_path: Path, kind: str, dtype: torch.dtype, of_base: str, of_adapter: str
) -> None:
    base, a, b = write(tmp_path, kind, dtype, of_base, of_adapter)
    merged = tmp_path / "merged.safetensors"
    calls: list[tuple[object, ...]] = [
        ("merge", base, a, "-o", merged),
        ("merge", base, a, b, "-o", tmp_path / "fp32.safetensors", "--dtype", "fp32", "--no-undo"),
        ("verify", base, a, merged),
        ("unmerge", merged, a, "-o", tmp_path / "back.safetensors"),
        ("verify", base, a, base),
        ("inspect", a),
        ("inspect", base, "--spectra"),
        ("inspect", a, "--base", base),
        ("diff", a, b),
        ("diff", base, merged, "--spectra"),
        ("extract", base, merged, "--rank", "3", "--allow", "unrelated", "-o", tmp_path / "extracted"),
        ("resize", a, "--rank", "2", "-o", tmp_path / "resized.safetensors"),
        ("combine", f"{a}:0.5", b, "--rank", "3", "-o", tmp_path / "combined.safetensors"),
        ("combine", a, b, "--method", "ties", "--density", "0.5", "--rank", "3", "-o", tmp_path / "ties.safetensors"),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for call in calls:
            if merged.exists() or merged not in call or call[0] == "merge":
                assert run_command(*call).exit_code in EXITS, call
    assert [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)] == []


def test_stderr_of_a_process_has_none(tmp_path: Path) -> None:
    base, a, _ = write(tmp_path, "dora", torch.float64, "usual", "any")
    command = [sys.executable, "-W", "always::RuntimeWarning", "-m", "loratool"]
    merged = tmp_path / "merged.safetensors"
    for call in (["merge", base, a, "-o", merged], ["verify", base, a, merged], ["verify", base, a, base]):
        done = subprocess.run([*command, *map(str, call)], capture_output=True, text=True, env=os.environ)
        assert done.returncode in EXITS and "Warning" not in done.stderr and ".py" not in done.stderr
