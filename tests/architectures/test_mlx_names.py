"""Hold the table of MLX's names to itself; `test_mlx_oracle` compares it with mlx-lm."""

from __future__ import annotations

import pytest

from loratool.architectures.mlx_names import GATED, MLX, ONE_BY_ONE, PLAIN, find_share, mlx_path, stacks_of
from loratool.architectures.renames import canonical


@pytest.mark.parametrize("model_type", MLX)
def test_every_name_comes_back(model_type: str) -> None:
    names = MLX[model_type]
    wrapped = ("model.language_model.layers.0.x", "lm_head") if names.wrapped else ()
    inside = "model.language_model.layers.0" if names.wrapped else "model.layers.0"
    if names.starts:
        inside = f"{names.starts[-1][0]}.layers.0"
    parts = [f"{inside}.{old}" for old, _ in names.parts if "switch" not in old]
    for path in (*wrapped, *(old for old, _ in names.starts), *parts):
        theirs = mlx_path(path, names)
        assert canonical(theirs, (model_type,)) == canonical(path, (model_type,)) == path
        assert theirs != path


@pytest.mark.parametrize("model_type", MLX)
def test_every_stack_comes_back(model_type: str) -> None:
    names, layer = MLX[model_type], canonical("model.layers.0", (model_type,))
    assert names.shares in (GATED, PLAIN)
    for parameter in {name for name, *_ in names.shares.values()}:
        stack = f"{layer}.mlp.experts.{parameter}"
        found = [find_share(canonical(path, (model_type,)), (model_type,)) for path in stacks_of(stack, names)]
        assert [(each.stack, each.part) for each in found if each] == [(stack, part) for part in range(len(found))]
        assert found and all(each and each.parts == len(found) for each in found)


def test_the_list_is_of_the_table() -> None:
    assert MLX.keys() >= ONE_BY_ONE
