"""Merge into 8-bit floats that stand alone, as ComfyUI casts them: one rounding, no saturation, and all of it undone.

`test_exact_reals` holds every kind of update to fractions; here are the files, refusals and reports of such bases.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bits, factors, load_model, run_command, weights, write_model, write_peft
from lib.hostile.hostile_reals import form_of
from lib.oracles.fractions_oracle import FORMATS, Add, codes, count_wrong, low_rank, merge_codes, round_to_code
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError, NeedsFlag
from loratool.numerics.arrays import narrow, widen
from loratool.numerics.rounding_stats import cast_rounded
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KINDS = pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
OUT, IN, RANK = 40, 24, 4


def write_base(folder: Path, kind: torch.dtype, **other: Tensor) -> Path:
    """Write linear weights in 8 bits beside a bias and a norm in bf16."""
    state = {f"{Q}.bias": weights(OUT, seed=3).bfloat16(), "model.norm.weight": weights(IN, seed=4).bfloat16()}
    state |= {f"{name}.weight": (weights(OUT, IN, seed=i) * 0.3).to(kind) for i, name in enumerate((Q, UP))}
    return write_model(folder, {**state, **other}, {"model_type": "llama"})


def every_code(kind: torch.dtype) -> Tensor:
    """Return weights, the first 256 of them of every code."""
    W = (weights(OUT, IN, seed=1) * 0.3).to(kind)
    W.view(torch.uint8).view(-1)[:256] = torch.arange(256).view(2, 128).T.reshape(-1).to(torch.uint8)
    return W


def write_adapter(folder: Path, size: float = 0.3) -> tuple[Path, Tensor, Tensor]:
    A, B = factors(OUT, IN, RANK, seed=5)
    return write_peft(folder, {Q: (A * size, B)}), A * size, B


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@KINDS
def test_the_sum_is_rounded_once_and_comes_off_again(tmp_path: Path, kind: torch.dtype) -> None:
    base = write_base(tmp_path / "base", kind, **{f"{Q}.weight": every_code(kind)})
    adapter, A, B = write_adapter(tmp_path / "a")
    report = loratool.merge(base, adapter, tmp_path / "out")
    before, found = load_model(base), load_model(tmp_path / "out")
    W, Z = before[f"{Q}.weight"], found[f"{Q}.weight"]
    wanted = merge_codes(W, kind, [Add(low_rank(A, B, 1.0))])
    assert Z.dtype == kind and wanted and count_wrong(Z, wanted) == 0
    assert torch.equal(bits(Z)[W.isnan()], bits(W)[W.isnan()])  # with their signs and payloads
    assert all(torch.equal(bits(found[name]), bits(x)) for name, x in before.items() if name != f"{Q}.weight")
    assert any("are inf or nan" in line for line in report.warnings)
    assert loratool.verify(base, adapter, tmp_path / "out").status == "proven"
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)
    file = tmp_path / "out" / "model.safetensors"
    found[f"{Q}.weight"].view(torch.uint8)[30, 7] ^= 1
    save_file(found, file, {"format": "pt"})
    assert loratool.verify(base, adapter, tmp_path / "out").status == "wrong"
    with pytest.raises(InputError):
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "no")


@KINDS
def test_a_low_share_that_is_kept_is_warned_about(tmp_path: Path, kind: torch.dtype) -> None:
    base, (adapter, A, B) = write_base(tmp_path / "base", kind), write_adapter(tmp_path / "a", 0.03)
    report = loratool.merge(base, adapter, tmp_path / "out", undo=False)
    W, Z = (load_model(folder)[f"{Q}.weight"].double() for folder in (base, tmp_path / "out"))
    D = B.double() @ A.double()
    assert report.kept == pytest.approx(float(((Z - W) * D).sum() / D.square().sum()), abs=1e-4)
    assert report.kept is not None and report.kept < 0.9
    (line,) = [line for line in report.warnings if "loses part of the delta" in line]
    assert f"{report.kept:.1%} is kept in all" in line and "merge with --dtype bf16 --no-undo, or" in line
    other = loratool.merge(base, adapter, tmp_path / "wide", dtype="bf16", undo=False)
    assert other.kept is not None and other.kept > 0.99


# largest number of a type, half of the step there
LARGEST = {E4M3: (448.0, 16.0), E5M2: (57344.0, 4096.0)}


@KINDS
def test_what_is_beyond_the_largest_number_is_refused_and_not_held_there(tmp_path: Path, kind: torch.dtype) -> None:
    """Halfway to the next number that there is not, e4m3 rounds to its largest, which is even, and e5m2 to inf."""
    largest, half = LARGEST[kind]
    base = write_model(tmp_path / "base", {"x.weight": torch.full((2, 3), largest).to(kind)})

    def adapter(step: float) -> Path:
        return write_peft(tmp_path / str(step), {"x": (torch.tensor([[0.0, step, -1.0]]), torch.ones(2, 1))})

    loratool.merge(base, adapter(half - 2.0**-10), tmp_path / "out")
    assert load_model(tmp_path / "out")["x.weight"].double().tolist() == [[largest] * 3] * 2
    for step in (half + 2.0**-10, *([half] if kind == E5M2 else []), 1e6, 1e38):
        result = run_command("merge", base, adapter(step), "-o", tmp_path / "no")
        assert result.exit_code == 4 and "x.weight: 2 weights" in result.stderr and not (tmp_path / "no").exists()
        assert "add --dtype bf16 --no-undo, which holds them" in result.stderr
    loratool.merge(base, adapter(1e38), tmp_path / "wide", dtype="bf16", undo=False)
    if kind == E4M3:
        loratool.merge(base, adapter(half), tmp_path / "even")
        assert load_model(tmp_path / "even")["x.weight"].double().tolist() == [[largest] * 3] * 2


@KINDS
def test_a_value_that_replaces_one_of_8_bits(tmp_path: Path, kind: torch.dtype) -> None:
    base, (adapter, *_) = write_base(tmp_path / "base", kind), write_adapter(tmp_path / "a")
    file = adapter / "adapter_model.safetensors"
    for value, fits in ((weights(OUT, IN, seed=7), True), (torch.full((OUT, IN), 1e5), False)):
        save_file({**load_file(file), f"base_model.model.{UP}.weight": value.bfloat16()}, file)
        if not fits:
            with pytest.raises(NeedsFlag, match=f"{UP}.weight: {OUT * IN} weights"):
                loratool.merge(base, adapter, tmp_path / "no")
            continue
        report = loratool.merge(base, adapter, tmp_path / "out")
        found = load_model(tmp_path / "out")[f"{UP}.weight"]
        assert codes(found) == merge_codes(value.bfloat16(), kind) and report.kept is not None
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
        assert files_of(tmp_path / "back") == files_of(base)


@KINDS
def test_others_of_8_bits_with_a_mark_stay_refused(tmp_path: Path, kind: torch.dtype) -> None:
    adapter, *_ = write_adapter(tmp_path / "a")
    no_json = {f"{Q}.comfy_quant": torch.zeros(8, dtype=torch.uint8)}
    with pytest.raises(InputError, match=rf"{Q}.weight: is quantized"):
        loratool.merge(write_base(tmp_path / "base", kind, **no_json), adapter, tmp_path / "no")
    marked = write_base(tmp_path / "base", kind, scaled_fp8=torch.zeros(2).to(kind))
    with pytest.raises(NeedsFlag, match="but the other weights of the file have scales"):
        loratool.merge(marked, adapter, tmp_path / "no")


@KINDS
def test_what_changed_is_extracted_and_started_from(tmp_path: Path, kind: torch.dtype) -> None:
    base, (adapter, *_) = write_base(tmp_path / "base", kind), write_adapter(tmp_path / "a")
    loratool.merge(base, adapter, tmp_path / "out")
    loratool.extract(base, tmp_path / "out", tmp_path / "found", rank=IN)
    D = load_model(tmp_path / "out")[f"{Q}.weight"].double() - load_model(base)[f"{Q}.weight"].double()
    B, A = (load_model(tmp_path / "found")[f"base_model.model.{Q}.lora_{side}.weight"].double() for side in "BA")
    assert (B @ A - D).norm() < 1e-5 * D.norm()
    report: Any = loratool.inspect(base)
    assert {group.role for group in report.groups if group.dtype.startswith("F8")} == {"linear"}
    loratool.init(base, tmp_path / "new", rank=2)
    assert sum(name.endswith("lora_A.weight") for name in load_model(tmp_path / "new")) == 2


class TestCasts:
    """The casts are what the dense step trusts: ours, and below the largest number torch's, which a GPU makes."""

    @staticmethod
    def hard(kind: torch.dtype) -> Tensor:
        """Every midpoint of two numbers and its neighbours in float32, of both signs."""
        numbers = torch.arange(form_of(kind).inf, dtype=torch.uint8).view(kind).float()
        middle = torch.cat([(numbers[1:] + numbers[:-1]) / 2, numbers])
        near = [middle, *(torch.nextafter(middle, torch.full_like(middle, end)) for end in (-1e9, 1e9))]
        return torch.cat([*near, *(-x for x in near)])

    @KINDS
    def test_both_round_to_the_nearest(self, kind: torch.dtype) -> None:
        x = self.hard(kind)
        expected = [round_to_code(Fraction(float(each)), FORMATS[kind]) | (128 * _is_minus(each)) for each in x]
        assert codes(x.to(kind)) == expected
        ours = torch.empty(x.shape, dtype=kind)
        narrow(x.numpy(), numbers_of(ours))
        assert codes(ours) == expected

    @KINDS
    @pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16])
    def test_overflow_is_counted(self, kind: torch.dtype, source: torch.dtype) -> None:
        largest, half = LARGEST[kind]
        x = torch.tensor([[largest, 2 * largest, -1e30, largest + half / 2, 0.0, -0.0, 1.0]]).to(source)
        out = torch.empty(x.shape, dtype=kind)
        stats = cast_rounded(numbers_of(x), numbers_of(out), Workspace())
        assert stats.overflowed == 2 and stats.largest == float(x[0, 2].abs())
        fine = [0, 3, 4, 5, 6]
        assert codes(out[0, fine]) == codes(x[0, fine].to(kind))

    @KINDS
    @pytest.mark.parametrize("wider", [np.float32, np.float64])
    def test_every_code_is_widened(self, kind: torch.dtype, wider: type) -> None:
        x = torch.arange(256, dtype=torch.uint8).view(kind).view(16, 16)[:, 3:]
        found, wanted = widen(numbers_of(x), np.empty(x.shape, wider)), x.double().numpy()
        assert np.array_equal(found, wanted, equal_nan=True)
        assert np.array_equal(np.signbit(found), np.signbit(wanted))


def _is_minus(x: Tensor) -> bool:
    return bool(x.signbit()) and float(x) == 0
