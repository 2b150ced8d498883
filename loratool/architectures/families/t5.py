"""Name the modules of a T5 encoder; all files have transformers' names."""

from __future__ import annotations

from .table import Block, ModelFamily

FAMILY = ModelFamily(
    key="t5",
    title="T5",
    blocks=(
        Block(
            "encoder.block.{i}",
            "encoder.block.{i}",
            {},
            alike=(
                "layer.0.SelfAttention.q",
                "layer.0.SelfAttention.k",
                "layer.0.SelfAttention.v",
                "layer.0.SelfAttention.o",
                "layer.1.DenseReluDense.wi_0",
                "layer.1.DenseReluDense.wi_1",
                "layer.1.DenseReluDense.wo",
                "layer.0.layer_norm",
                "layer.1.layer_norm",
            ),
        ),
    ),
    alike=("encoder.final_layer_norm",),
    marks=("encoder.block.",),
)
