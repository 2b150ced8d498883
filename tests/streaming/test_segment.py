"""Hold the rows of a segment to be what they are in the whole tensor, wherever others split it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from conftest import weights
from safetensors.torch import save_file

from loratool.adapters.formats import open_adapter
from loratool.binding.modules.placement import Placement
from loratool.files.checkpoint import open_checkpoint
from loratool.numerics.arrays import CPU
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace
from loratool.streaming.segment import RowSegment, UpdateLoader


def test_norms_of_columns_are_of_all_rows(tmp_path: Path) -> None:
    """Another adapter's update of some rows splits the tensor; a DoRA along the inputs keeps the norms of the whole."""
    W = weights(8, 6, dtype=torch.bfloat16, seed=1)
    save_file({"q.weight": W}, tmp_path / "base.safetensors")
    A, B, m = weights(2, 6, seed=2), weights(8, 2, seed=3), weights(1, 6, seed=4).abs()
    roles = {"lora_down.weight": A, "lora_up.weight": B, "dora_scale": m}
    save_file({f"lora_unet_q.{role}": tensor for role, tensor in roles.items()}, tmp_path / "a.safetensors")
    adapter, base = open_adapter(tmp_path / "a.safetensors"), open_checkpoint(tmp_path / "base.safetensors")
    placement = Placement(adapter, adapter.updates["lora_unet_q"], 1.0, False, 8, 0, 8)

    def merged(*edges: int) -> torch.Tensor:
        out, work = torch.empty_like(W), Workspace()
        for start, stop in pairwise(edges):
            segment = RowSegment(base.ref("q.weight"), 6, start, stop, [placement], UpdateLoader(CPU))
            segment.merge(numbers_of(W[start:stop]), start, numbers_of(out[start:stop]), work)
        return out

    V = W.double() + B.double() @ A.double()
    wanted = m.double() / torch.linalg.vector_norm(V, dim=0) * V
    assert torch.equal(merged(0, 8), merged(0, 3, 8))
    assert torch.allclose(merged(0, 3, 8).double(), wanted, rtol=2**-7)
