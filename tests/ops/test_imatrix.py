"""Hold --imatrix of extract against dense SVDs of scaled matrices, and its names against llama.cpp's tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, load_model
from imatrix_files import write_gguf
from safetensors.torch import load_file
from torch import Tensor

import loratool

GGUF_OF_LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
GGUF_OF_GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def moments(inputs: int, seed: int) -> Tensor:
    return torch.randn(inputs, generator=torch.Generator().manual_seed(seed)).mul(2).exp()


def gguf_name(name: str, table: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    own = None if at is None else table.get(".".join(parts[at + 1 : -1]))
    return f"blk.{parts[at]}.{own}.weight" if own and at is not None else None


def imatrix(path: Path, model: Path, table: Mapping[str, str], turned: bool = False) -> tuple[Path, dict[str, Tensor]]:
    """Write moments for all matrices of a model's layers; return them by the model's names."""
    found: dict[str, Tensor] = {}
    for i, (name, W) in enumerate(load_model(model).items()):
        if gguf_name(name, table) and W.dim() == 2:
            found[name] = moments(W.shape[0 if turned else 1], i)
    sums = {str(gguf_name(name, table)): (h[None] * 3, [3]) for name, h in found.items()}
    return write_gguf(path, sums), found


@pytest.mark.parametrize(("family", "table", "turned"), [("llama", GGUF_OF_LLAMA, False), ("gpt2", GGUF_OF_GPT2, True)])
def test_extract_gives_the_best_for_the_outputs(
    family: str, table: dict[str, str], turned: bool, tmp_path: Path
) -> None:
    """Merged back, each matrix loses of its outputs what the dense SVD of the scaled change loses, and no more."""
    base, tuned = FIXTURES / family / "base", FIXTURES / family / "tuned"
    file, h = imatrix(tmp_path / "imatrix.gguf", base, table, turned)
    plain = loratool.extract(base, tuned, tmp_path / "plain", rank=3)
    report = loratool.extract(base, tuned, tmp_path / "adapter", rank=3, imatrix=file)
    before, after = load_model(base), load_model(tuned)
    for name in ("plain", "adapter"):
        loratool.merge(base, tmp_path / name, tmp_path / f"{name} merged", dtype="fp32", undo=False)
    merged, other = (load_model(tmp_path / f"{name} merged") for name in ("adapter", "plain"))
    rows = {row.name: row for row in report.modules}
    assert h.keys() <= rows.keys() and {*report.unweighted} == {
        n.removesuffix(".weight") for n in rows.keys() - h.keys()
    }
    lost = total = 0.0
    for name, moment in h.items():
        w = (moment / moment.mean()).clamp(min=1e-3).sqrt().double()
        each = [W[name].double().mT if turned else W[name].double() for W in (before, after, merged, other)]
        W, T, M, P = each
        S = torch.linalg.svdvals((T - W) * w)
        best, norm = float(S[3:].square().sum()), float(S.square().sum())
        found = float(((T - M) * w).square().sum())
        assert found == pytest.approx(best, rel=1e-3)
        assert found <= float(((T - P) * w).square().sum()) * (1 + 1e-6)
        row = rows[name]
        assert row.weighted_error == pytest.approx((best / norm) ** 0.5, rel=1e-3)
        assert row.error == pytest.approx(float((T - M).norm() / (T - W).norm()), rel=1e-4)
        assert row.above_noise is None
        lost, total = lost + best, total + norm
    assert report.weighted_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert plain.error is not None and report.error is not None and plain.error < report.error
    assert plain.weighted_error is None and not plain.unweighted
    embedding = next(row for row in report.modules if row.name not in h)
    assert embedding.weighted_error is None
    assert embedding == next(row for row in plain.modules if row.name == embedding.name)


@pytest.mark.parametrize("rule", [{"rank": 4}, {"energy": 0.8}, {"params": 20_000}, {"rank": 4, "certify": True}])
def test_equal_inputs_change_no_byte(rule: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    sums = {
        str(gguf_name(name, GGUF_OF_LLAMA)): (torch.full((1, W.shape[1]), 7.3), [3])
        for name, W in load_model(base).items()
        if gguf_name(name, GGUF_OF_LLAMA)
    }
    loratool.extract(base, tuned, tmp_path / "plain", **rule)
    loratool.extract(base, tuned, tmp_path / "equal", imatrix=write_gguf(tmp_path / "imatrix.gguf", sums), **rule)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "equal"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
