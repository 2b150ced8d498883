"""Hold loralib's, cloneofsimo's and OneTrainer's files: whose factors are whose, and what the file does not say.

The formulas of loralib are transcribed from microsoft/LoRA, `loralib/layers.py` (MergedLinear.train and zero_pad).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, factors, load_model, needs_shared, weights, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.errors import InputError, NeedsFlag, UsageError
from loratool.numerics.tensors import tensor_of

C_ATTN = "transformer.h.0.attn.c_attn"


class TestLoralib:
    def write(self, path: Path, **extra: Tensor) -> Path:
        """Write a query's factors of rank 2, and a trained head, as loralib's users save it: a torch file."""
        A, B = factors(6, 4, 2)
        tensors = {"model.layers.0.self_attn.q_proj.lora_A": A, "model.layers.0.self_attn.q_proj.lora_B": B}
        torch.save({**tensors, "score.weight": weights(3, 6), **extra}, path)
        return path

    def test_alpha_is_asked_for(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "a.bin")
        with pytest.raises(NeedsFlag, match="alpha"):
            open_adapter(file)
        adapter = open_adapter(file, 3.0)
        assert adapter.format == "loralib" and set(adapter.updates) == {"model.layers.0.self_attn.q_proj", "score"}
        assert adapter.updates["model.layers.0.self_attn.q_proj"].scale == 1.5

    def test_a_merge(self, tmp_path: Path) -> None:
        file, W = self.write(tmp_path / "a.bin"), weights(6, 4, seed=1)
        base = {"model.layers.0.self_attn.q_proj.weight": W, "score.weight": weights(3, 6, seed=2)}
        write_model(tmp_path / "base", base, {"model_type": "llama"})
        loratool.merge(tmp_path / "base", (file, 1.0), tmp_path / "out", alpha=3.0, undo=False)
        found, (A, B) = load_model(tmp_path / "out"), factors(6, 4, 2)
        assert torch.equal(found["score.weight"], weights(3, 6))
        expected = W.double() + 1.5 * B.double() @ A.double()
        assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], expected.float())

    def test_a_weight_beside_its_factors_is_refused(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "a.bin", **{"model.layers.0.self_attn.q_proj.weight": weights(6, 4)})
        with pytest.raises(InputError, match="whether they are merged into it"):
            open_adapter(file, 3.0)

    def merged(self, path: Path, enabled: tuple[bool, ...]) -> Tensor:
        """Return MergedLinear's file of r 2, and its delta_w / scaling by loralib's own arithmetic, out 12, in 5."""
        n = sum(enabled)
        A, B = factors(12 // len(enabled) * n, 5, 2 * n)
        B = B[:, :2].contiguous()
        save_file({f"{C_ATTN}.lora_A": A, f"{C_ATTN}.lora_B": B}, path)
        delta = torch.nn.functional.conv1d(A.double().unsqueeze(0), B.double().unsqueeze(-1), groups=n).squeeze(0)
        index = torch.zeros(len(enabled), 12 // len(enabled), dtype=torch.bool)
        index[list(enabled), :] = True
        result = torch.zeros(12, 5, dtype=torch.float64)
        result[index.view(-1)] = delta
        return result

    @pytest.mark.parametrize("enabled", [(True, False, True), (False, True, True), (True, True, True), (True, True)])
    def test_merged_linear(self, enabled: tuple[bool, ...], tmp_path: Path) -> None:
        delta = self.merged(tmp_path / "a.safetensors", enabled)
        adapter = open_adapter(tmp_path / "a.safetensors", 6.0, enabled=enabled)
        update = adapter.updates[C_ATTN]
        loaded: Any = adapter.load(update)
        assert update.shape == (12, 5) and update.rank == 2 * sum(enabled) and update.scale == 3.0
        assert torch.allclose(
            tensor_of(loaded.B).double() @ tensor_of(loaded.A).double(), delta, atol=1e-15, rtol=1e-12
        )

    def test_merged_linear_without_its_slices(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        self.merged(tmp_path / "a.safetensors", (True, False, True))
        with pytest.raises(InputError, match=r"(?s)c_attn: holds factors of 2 slices.*convert") as refused:
            open_adapter(tmp_path / "a.safetensors", 6.0)
        assert not isinstance(refused.value, NeedsFlag)
        with pytest.raises(NeedsFlag, match="enable_lora"):
            open_adapter(tmp_path / "a.safetensors", 6.0, enabled=())
        with pytest.raises(InputError, match="names 3"):
            open_adapter(tmp_path / "a.safetensors", 6.0, enabled=(True,) * 3)
        found = run("inspect", tmp_path / "a.safetensors")
        assert found.exit_code == 0 and "MergedLinear" in found.stdout

    def test_resize_needs_another_format(self, tmp_path: Path) -> None:
        with pytest.raises(NeedsFlag, match='add to="peft"'):
            loratool.resize(self.write(tmp_path / "a.bin"), tmp_path / "out", rank=1, alpha=3.0)

    @needs_shared
    def test_the_real_one(self) -> None:
        file = SHARED / "microsoft-lora-roberta-mnli" / "roberta_base_lora_mnli.bin"
        adapter = open_adapter(file, 16.0)
        low_rank = [update for update in adapter.updates.values() if update.kind == "lora"]
        assert len(low_rank) == 24 and {u.scale for u in low_rank} == {2.0} and {u.rank for u in low_rank} == {8}
        rest = {module for module, update in adapter.updates.items() if update.kind == "replace"}
        assert rest == {"classifier.dense", "classifier.dense.bias", "classifier.out_proj", "classifier.out_proj.bias"}


class TestCloneofsimo:
    FILE = SHARED / "cloneofsimo-lora" / "analog_svd_rank4.safetensors"

    def expected(self) -> list[tuple[str, tuple[int, int]]]:
        """List SD 1.5's linear layers of attentions and gates in the order in which diffusers 0.11 registered them."""
        blocks = [(f"down_blocks.{i}", j, (320, 640, 1280)[i]) for i in range(3) for j in range(2)]
        blocks += [(f"up_blocks.{i}", j, (0, 1280, 640, 320)[i]) for i in (1, 2, 3) for j in range(3)]
        found = []
        for stem, j, width in [*blocks, ("mid_block", 0, 1280)]:
            path = f"unet.{stem}.attentions.{j}.transformer_blocks.0"
            found += [(f"{path}.attn1.{x}", (width, width)) for x in ("to_q", "to_k", "to_v", "to_out.0")]
            found.append((f"{path}.ff.net.0.proj", (8 * width, width)))
            found += [
                (f"{path}.attn2.{x}", (width, 768 if x in ("to_k", "to_v") else width))
                for x in ("to_q", "to_k", "to_v", "to_out.0")
            ]
        return found

    @needs_shared
    def test_the_real_one(self, tmp_path: Path) -> None:
        adapter, raw = open_adapter(self.FILE), load_file(self.FILE)
        assert adapter.format == "cloneofsimo" and len(adapter.updates) == 192
        for number, (module, shape) in enumerate(self.expected()):
            update = adapter.updates[module]
            assert update.shape == shape and update.scale == 1 and update.tensors["A"] == f"unet:{number}:down"
        k, v, q, out = (adapter.updates[f"text_encoder.text_model.encoder.layers.11.self_attn.{x}"] for x in
                        ("k_proj", "v_proj", "q_proj", "out_proj"))  # fmt: skip
        assert [u.tensors["B"] for u in (k, v, q, out)] == [f"text_encoder:{i}:up" for i in range(44, 48)]
        loratool.convert(self.FILE, tmp_path / "kohya.safetensors", to="kohya")
        found = load_file(tmp_path / "kohya.safetensors")
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        assert torch.equal(found[f"{name}.lora_up.weight"], raw["unet:135:up"]) and found[f"{name}.alpha"] == 4
        assert len(found) == 3 * 192

    def write(self, path: Path, count: int = 144, classes: object = ("Attention", "GEGLU"), **extra: Tensor) -> Path:
        tensors = {f"unet:{i}:down": weights(2, 4, seed=i) for i in range(count)}
        tensors |= {f"unet:{i}:up": weights(4, 2, seed=i) for i in range(count)}
        save_file({**tensors, **extra}, path, {"unet": json.dumps(classes)} if classes else None)
        return path

    def test_without_gates_there_are_eight_a_block(self, tmp_path: Path) -> None:
        updates = open_adapter(self.write(tmp_path / "a.safetensors", 128, ["CrossAttention"])).updates
        path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
        assert updates[path].tensors["A"] == "unet:4:down"

    @pytest.mark.parametrize(
        ("count", "classes", "extra", "message"),
        [
            (128, ["Attention", "GEGLU"], {}, "128 modules in unet, but the model has 144"),
            (144, ["Attention", "ResnetBlock2D"], {}, "does not say unet"),
            (144, None, {}, "does not say unet"),
            (144, [["Attention"]], {}, "does not say unet"),
            (144, ["Attention", "GEGLU"], {"s1": weights(768)}, "s1: is not a factor"),
        ],
    )
    def test_what_cannot_be_told_is_refused(
        self, count: int, classes: object, extra: dict[str, Tensor], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=message):
            open_adapter(self.write(tmp_path / "a.safetensors", count, classes, **extra))

    def test_learned_tokens_are_extras(self, tmp_path: Path) -> None:
        adapter = open_adapter(self.write(tmp_path / "a.safetensors", **{"<s1>": weights(768)}))
        assert adapter.extras == ("<s1>",) and len(adapter.updates) == 144

    def test_it_has_no_alpha(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="up @ down"):
            open_adapter(self.write(tmp_path / "a.safetensors"), 4.0)


class TestOneTrainer:
    MODULE = "transformer_blocks_0_attn_to_q"

    def write(self, path: Path, scale: Tensor, name: str = f"lora_transformer_{MODULE}") -> Path:
        A, B = factors(6, 4, 2)
        tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(1.0)}
        save_file({**tensors, f"{name}.dora_scale": scale}, path)
        return path

    @pytest.mark.parametrize("shape", [(6, 1), (6,), (6, 1, 1, 1)])
    def test_along_the_outputs_it_is_dora(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        m, W = weights(6, seed=3).abs() + 0.1, weights(6, 4)
        file = self.write(tmp_path / "a.safetensors", m.reshape(shape))
        key = "transformer_blocks.0.attn.to_q.weight"
        single = {"single_transformer_blocks.0.proj_out.weight": weights(6, 30)}  # which makes it Flux
        save_file({key: W, **single}, tmp_path / "base.safetensors")
        loratool.merge(tmp_path / "base.safetensors", file, tmp_path / "out.safetensors", undo=False)
        A, B = (side.double() for side in factors(6, 4, 2))
        V = W.double() + 0.5 * B @ A
        expected = (m.double() / V.norm(dim=1))[:, None] * V
        assert torch.allclose(load_file(tmp_path / "out.safetensors")[key].double(), expected, atol=1e-8, rtol=1e-6)

    def test_a_magnitude_of_another_shape_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="not a magnitude for each output"):
            open_adapter(self.write(tmp_path / "a.safetensors", weights(2, 3)))
