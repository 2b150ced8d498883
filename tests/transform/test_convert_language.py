"""Hold convert of language models' adapters, of loralib's files and of DoRA against peft, and dense sums in float64."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, SHARED, factors, load_model, needs_shared, weights, write_model, write_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.adapters.formats import open_adapter
from loratool.errors import LoratoolError
from loratool.numerics.tensors import tensor_of

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def change(path: Path, module: str) -> Tensor:
    """Return scale * B @ A, dense, as PEFT's config and tensors say it."""
    adapter = open_adapter(path)
    update: Any = adapter.load(adapter.updates[module])
    D: Tensor = update.scale * tensor_of(update.B).double() @ tensor_of(update.A).double()
    return D


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.v(self.q(x)))
        return y


def loaded(path: Path) -> Net:
    """Return the model with the adapter merged, by peft."""
    from peft import PeftModel

    net: Net = PeftModel.from_pretrained(Net(), str(path)).merge_and_unload()
    return net


def test_folder_and_file_hold_the_same_bytes(tmp_path: Path) -> None:
    start = FIXTURES / "llama" / "adapter"
    config = json.loads((start / "adapter_config.json").read_text())
    loratool.convert(start, tmp_path / "one.safetensors", to="peft")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert json.loads(file.metadata()["loratool"])["adapter_config"] == config
    loratool.convert(tmp_path / "one.safetensors", tmp_path / "back", to="peft")
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert json.loads((tmp_path / "back" / names[1]).read_text()) == config
    one, two = (load_file(folder / names[0]) for folder in (start, tmp_path / "back"))
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


class TestPlain:
    def test_rslora_and_patterns_as_peft_has_them(self, tmp_path: Path) -> None:
        """Servers ignore both: they go into the factors, and peft's model stays the same."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=4, lora_alpha=6, use_rslora=True, target_modules=["q", "v"], rank_pattern={"v": 2},
            alpha_pattern={"q": 5}, lora_bias=True, init_lora_weights=False, modules_to_save=["head"],
        )  # fmt: skip
        live = get_peft_model(Net(), config)
        live.base_model.model.v.lora_B["default"].bias.data.normal_()
        live.base_model.model.head.modules_to_save["default"].weight.data.normal_()
        live.save_pretrained(tmp_path / "a")
        report = loratool.convert(tmp_path / "a", tmp_path / "b", to="peft", plain=True)
        assert {(m.name, m.rank, m.alpha, m.how) for m in report.modules} == {
            ("q", 4, 4.0, "rounded"), ("v", 2, 2.0, "rounded")
        }  # fmt: skip
        fields = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert not fields["use_rslora"] and fields["rank_pattern"] == fields["alpha_pattern"] == {"^v": 2}
        x = torch.randn(5, 8)
        assert torch.allclose(loaded(tmp_path / "a")(x), loaded(tmp_path / "b")(x), atol=1e-5)

    def test_a_power_of_two_is_exact(self, tmp_path: Path) -> None:
        A, B = factors(6, 8, 2)
        start = write_peft(tmp_path / "a", {Q: (A, B)}, lora_alpha=0.5)
        (row,) = loratool.convert(start, tmp_path / "b", to="peft", plain=True).modules
        assert row.how == "folded" and torch.equal(change(tmp_path / "b", Q), change(start, Q))

    def trained(self, tmp_path: Path) -> tuple[Any, Path, Path]:
        """Return peft's own PiSSA: the live model, the trained adapter and the initial one."""
        from peft import LoraConfig, get_peft_model

        live = get_peft_model(Net(), LoraConfig(r=3, lora_alpha=6, target_modules=["q"], init_lora_weights="pissa"))
        live.peft_config["default"].init_lora_weights = True
        live.save_pretrained(tmp_path / "start")
        live.peft_config["default"].init_lora_weights = "pissa"
        for side in ("lora_A", "lora_B"):
            getattr(live.base_model.model.q, side)["default"].weight.data += torch.randn(1) * 0.1
        live.save_pretrained(tmp_path / "trained")
        return live, tmp_path / "trained", tmp_path / "start"

    def test_pissa_becomes_right_on_the_original_base(self, tmp_path: Path) -> None:
        live, trained, start = self.trained(tmp_path)
        with pytest.raises(NeedsFlag, match="initial"):
            loratool.convert(trained, tmp_path / "b", to="peft", plain=True)
        (row,) = loratool.convert(trained, tmp_path / "b", to="peft", plain=True, initial=start).modules
        assert row.rank == 6 and row.alpha == 6
        assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["init_lora_weights"] is True
        merged = live.merge_and_unload()
        assert torch.allclose(loaded(tmp_path / "b").q.weight, merged.q.weight, atol=1e-6)

    def test_a_rank_is_the_best_of_it(self, tmp_path: Path) -> None:
        _, trained, start = self.trained(tmp_path)
        loratool.convert(trained, tmp_path / "b", to="peft", plain=True, initial=start)
        (row,) = loratool.convert(trained, tmp_path / "c", to="peft", plain=True, initial=start, rank=2).modules
        assert row.rank == 2 and row.how == "truncated"
        D = change(tmp_path / "b", "q")
        left = torch.linalg.svdvals(D)[2:].norm()
        assert torch.allclose((D - change(tmp_path / "c", "q")).norm(), left, atol=1e-6)

    def test_dora_is_refused(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        A, B = factors(6, 8, 2)
        start = write_peft(tmp_path / "a", {Q: (A, B), V: factors(6, 8, 2, seed=1)}, use_dora=True)
        file = start / "adapter_model.safetensors"
        extra = {f"base_model.model.{m}.lora_magnitude_vector": torch.ones(6) for m in (Q, V)}
        save_file({**load_file(file), **extra}, file)
        refused = run("convert", start, "--to", "peft", "--plain", "-o", tmp_path / "b")
        assert refused.exit_code == 4 and Q in refused.stderr and not (tmp_path / "b").exists()

    def test_an_image_adapter(self, tmp_path: Path) -> None:
        A, B = factors(8, 8, 4, dtype=torch.float16)
        name = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k"
        for alpha, how, dtype in ((2.0, "folded", torch.float16), (3.3, "rounded", torch.float32)):
            tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(alpha)}
            save_file(tensors, tmp_path / "a.safetensors")
            report = loratool.convert(
                tmp_path / "a.safetensors", tmp_path / f"{how}.safetensors", to="kohya", plain=True
            )
            assert [m.how for m in report.modules] == [how]
            found = load_file(tmp_path / f"{how}.safetensors")
            assert found[f"{name}.alpha"] == 4 and found[f"{name}.lora_up.weight"].dtype == dtype
            scale = float(torch.tensor(alpha)) / 4
            assert torch.allclose(found[f"{name}.lora_up.weight"].double(), scale * B.double(), rtol=1e-7, atol=0)

    def test_options_that_need_it(self, tmp_path: Path) -> None:
        for options in ({"rank": 2}, {"initial": tmp_path}, {"rank": 0, "plain": True}):
            with pytest.raises(UsageError, match="need plain=True or runtime|rank: 0 is not a whole number from 1"):
                loratool.convert(FIXTURES / "llama" / "adapter", tmp_path / "b", to="peft", **options)  # type: ignore


class Words(Net):
    """A model with an embedding, whose own weight PEFT saves beside its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.words(x))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def get_output_embeddings(self) -> None:
        return None


class TestAWeightUnderTheFactors:
    """An embedding may be trained and have factors: `base_layer.weight`, of PEFT's `save_embedding_layers`."""

    def write(self, folder: Path) -> Path:
        from peft import LoraConfig, get_peft_model

        live = get_peft_model(Words(), LoraConfig(r=2, target_modules=["words", "q", "v"], init_lora_weights=False))
        with torch.no_grad():
            live.base_model.model.words.base_layer.weight.fill_(3.0)
        live.save_pretrained(folder, save_embedding_layers=True)
        return folder

    def merged(self, path: Path) -> Tensor:
        from peft import PeftModel

        words: Tensor = PeftModel.from_pretrained(Words(), str(path)).merge_and_unload().words.weight.detach()
        return words

    @pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"exclude": "q"}, {"plain": True}, {"rename": "q=q"}])
    def test_peft_merges_the_same(self, options: dict[str, Any], tmp_path: Path) -> None:
        start = self.write(tmp_path / "a")
        report: Any = loratool.convert(start, tmp_path / "b", to="peft", **options)
        assert report.dropped == (("q",) if "exclude" in options else ())
        assert torch.allclose(
            self.merged(tmp_path / "b"), self.merged(start), atol=0.05 if "dtype" in options else 1e-6
        )

    def test_a_layout_keeps_an_embeddings(self, tmp_path: Path) -> None:
        pairs = {Q: factors(8, 8, 2), V: factors(4, 8, 2), "model.embed_tokens": factors(8, 16, 2)}
        start = write_peft(tmp_path / "a", pairs)
        tensors = load_file(start / "adapter_model.safetensors")
        own = {"base_model.model.model.embed_tokens.base_layer.weight": weights(8, 16)}
        save_file(tensors | own, start / "adapter_model.safetensors")
        config = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "hidden_size": 8}
        base = write_model(tmp_path / "base", {}, config) / "config.json"
        loratool.convert(start, tmp_path / "b", to="peft", layout="fused", base=base)
        found = load_file(tmp_path / "b" / "adapter_model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
        under = {f"base_model.model.{Q}.base_layer.weight": weights(8, 8)}
        save_file(tensors | under, start / "adapter_model.safetensors")
        with pytest.raises(InputError, match="has another change beside its factors") as refused:
            loratool.convert(start, tmp_path / "c", to="peft", layout="fused", base=base)
        assert refused.value.culprit == Q

    def test_a_format_without_a_place_for_it_refuses(self, tmp_path: Path) -> None:
        start = self.write(tmp_path / "a")
        with pytest.raises(NeedsFlag, match="a new weight under its factors") as refused:
            loratool.convert(start, tmp_path / "b.safetensors", to="loralib")
        assert refused.value.remedy == "add --exclude words to exclude them; a merge applies them to the base"
        loratool.convert(start, tmp_path / "b.safetensors", to="loralib", exclude="words")

    @pytest.mark.parametrize("trained", [False, True])
    def test_mlx_has_a_head_s_factors_if_the_weight_is_the_base_s(self, tmp_path: Path, trained: bool) -> None:
        """PEFT saves the weight of a targeted head, trained or not."""
        W, query, head = weights(16, 8), "model.layers.0.self_attn.q_proj", "lm_head"
        start = write_peft(tmp_path / "a", {query: factors(8, 8, 2), head: factors(16, 8, 2)})
        tensors = load_file(start / "adapter_model.safetensors")
        under = {f"base_model.model.{head}.base_layer.weight": W + trained}
        save_file(tensors | under, start / "adapter_model.safetensors")
        config = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False, "hidden_size": 8}
        base = write_model(tmp_path / "base", {f"{head}.weight": W, f"{query}.weight": weights(8, 8)}, config)
        with pytest.raises(NeedsFlag, match="must be compared with the base's") as refused:
            loratool.convert(start, tmp_path / "b", to="mlx")
        assert refused.value.asks_for("--base")
        if trained:
            with pytest.raises(NeedsFlag, match="under their factors that is not the base's"):
                loratool.convert(start, tmp_path / "b", to="mlx", base=base)
            return
        report: Any = loratool.convert(start, tmp_path / "b", to="mlx", base=base)
        assert any("is left out: it is the base's" in note for note in report.notes)
        found = load_file(tmp_path / "b" / "adapters.safetensors")
        assert torch.equal(found[f"{head}.lora_a"].T, tensors[f"base_model.model.{head}.lora_A.weight"])

    def test_an_image_models_is_refused(self, tmp_path: Path) -> None:
        path = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"  # of SDXL alone
        start = write_peft(tmp_path / "a", {path: factors(8, 8, 2), path.replace("to_q", "to_k"): factors(8, 8, 2)})
        tensors = load_file(start / "adapter_model.safetensors")
        tensors[f"base_model.model.{path}.base_layer.weight"] = weights(8, 8)
        save_file(tensors, start / "adapter_model.safetensors")
        with pytest.raises(NeedsFlag) as refused:
            loratool.convert(start, tmp_path / "b.safetensors", to="kohya")
        assert path in refused.value.message
        loratool.convert(start, tmp_path / "b.safetensors", to="kohya", exclude=path)


def test_a_bias_goes_with_the_factors_that_it_is_of(tmp_path: Path) -> None:
    """PEFT's `lora_bias`: without its factors no file can be read that has it."""
    from peft import LoraConfig, get_peft_model

    live = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q", "v"], lora_bias=True, init_lora_weights=False))
    live.save_pretrained(tmp_path / "a")
    report: Any = loratool.convert(tmp_path / "a", tmp_path / "b", to="peft", exclude="q")
    assert sorted(report.dropped) == ["q", "q.bias"]
    names = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").partition(".")[0] for name in names} == {"v"}


def test_peft_makes_no_layer_of_what_is_left_out(tmp_path: Path) -> None:
    """Of a module that the config still named PEFT would make a new layer, as random as training begins."""
    from peft import LoraConfig, PeftModel, get_peft_model

    live = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False))
    live.save_pretrained(tmp_path / "a")
    loratool.convert(tmp_path / "a", tmp_path / "b", to="peft", exclude="q")
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "b")
    wrapped = {name for name, module in loaded.get_base_model().named_children() if hasattr(module, "lora_A")}
    assert wrapped == {"v"}
    for key, tensor in live.state_dict().items():
        if ".v.lora_" in key:
            assert torch.equal(loaded.state_dict()[key], tensor)


def test_an_alpha_beyond_float32_is_refused_where_the_file_has_one_of_float32(tmp_path: Path) -> None:
    start = write_peft(tmp_path / "a", {"model.layers.0.self_attn.o_proj": factors(64, 64, 2)}, lora_alpha=1e45)
    with pytest.raises(InputError, match="o_proj|attn_output") as refused:
        loratool.convert(start, tmp_path / "b.gguf", to="gguf", base=FIXTURES / "llama" / "base" / "config.json")
    assert "its factors overflow" in str(refused.value)
    loratool.convert(start, tmp_path / "b", to="peft", dtype="bf16")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_alpha"] == 1e45


class TestLoralib:
    def test_there_and_back(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        start = write_peft(tmp_path / "a", {Q: factors(6, 8, 2), V: factors(4, 8, 2, seed=1)}, lora_alpha=3)
        result = run("convert", start, "--to", "loralib", "-o", tmp_path / "b.safetensors")
        assert result.exit_code == 0 and "note: loralib's files hold no alpha" in result.stdout
        assert "r=2, lora_alpha=3" in result.stdout
        found = load_file(tmp_path / "b.safetensors")
        assert set(found) == {f"{m}.lora_{x}" for m in (Q, V) for x in "AB"}
        assert torch.equal(found[f"{Q}.lora_B"], factors(6, 8, 2)[1])
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "c", to="peft", alpha=3.0)
        assert (
            load_file(tmp_path / "c" / "adapter_model.safetensors").keys()
            == load_file(start / "adapter_model.safetensors").keys()
        )
        assert torch.equal(change(start, Q), change(tmp_path / "c", Q))

    def test_an_old_file_as_peft_loads_it(self, tmp_path: Path) -> None:
        """Factors, a trained head, and the biases of bias='all'."""
        (A, B), net = factors(8, 8, 2), Net()
        old = {"q.lora_A": A, "q.lora_B": B, "q.bias": weights(8, seed=1), "v.bias": weights(12, seed=2)}
        old |= {"head.weight": weights(3, 12, seed=3), "head.bias": weights(3, seed=4)}
        torch.save(old, tmp_path / "a.bin")
        report = loratool.convert(tmp_path / "a.bin", tmp_path / "b", to="peft", alpha=1.0)
        assert [(m.name, m.how, m.alpha) for m in report.modules] == [("q", "exact", 1.0)]
        found = loaded(tmp_path / "b")
        assert torch.allclose(found.q.weight, net.q.weight + 0.5 * B @ A, atol=1e-6)
        for name in ("q.bias", "v.bias", "head.weight", "head.bias"):
            assert torch.equal(found.state_dict()[name], old[name]), name

    def test_merged_linear_as_peft_loads_it(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        """GPT-2's [True, False, True] by loralib's arithmetic (`loralib/layers.py`: MergedLinear)."""
        A, B = factors(8, 8, 4)  # r 2: two slices of 4 rows
        save_file({"v.lora_A": A, "v.lora_B": B[:, :2].contiguous()}, tmp_path / "a.safetensors")
        argv = ["convert", tmp_path / "a.safetensors", "--to", "peft", "--alpha", 6, "-o", tmp_path / "b"]
        refused = run(*argv)
        assert refused.exit_code == 4 and "--enable-lora" in refused.stderr
        assert run(*argv, "--enable-lora", "1,0,x").exit_code == 2
        assert run(*argv, "--enable-lora", "1,0,1").exit_code == 0
        delta = torch.zeros(12, 8)
        delta[:4], delta[8:] = 3.0 * B[:4, :2] @ A[:2], 3.0 * B[4:8, :2] @ A[2:]
        assert torch.allclose(loaded(tmp_path / "b").v.weight, Net().v.weight + delta, atol=1e-6)

    def test_what_it_cannot_hold(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", {Q: factors(6, 8, 2)}, init_lora_weights="pissa")
        with pytest.raises(NeedsFlag, match="plain=True, initial"):
            loratool.convert(start, tmp_path / "b.safetensors", to="loralib")
        with pytest.raises(UsageError, match="loralib"):
            loratool.convert(start, tmp_path / "b", to="peft", enable_lora=(True, False, True))

    @needs_shared
    def test_the_real_one(self, tmp_path: Path) -> None:
        file = SHARED / "microsoft-lora-roberta-mnli" / "roberta_base_lora_mnli.bin"
        report = loratool.convert(file, tmp_path / "b", to="peft", alpha=16.0)
        raw = torch.load(file, map_location="cpu", weights_only=True)
        found = load_model(tmp_path / "b")
        assert len(report.modules) == 24 and len(found) == len(raw)
        key = "roberta.encoder.layer.3.attention.self.query.lora_A"
        assert torch.equal(found[f"base_model.model.{key}.weight"], raw[key])
        loratool.convert(tmp_path / "b", tmp_path / "c.safetensors", to="loralib")
        back = load_file(tmp_path / "c.safetensors")
        assert set(back) == set(raw) and all(torch.equal(back[k], raw[k]) for k in raw)


class TestDora:
    NAME = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"

    def kohya(self, path: Path) -> Path:
        """Write a linear layer and a convolution."""
        tensors = {}
        for name, shape in ((self.NAME, (8, 6)), ("down_blocks.0.resnets.0.conv1", (8, 4, 3, 3))):
            A, B = factors(8, 6 if len(shape) == 2 else 36, 2)
            flat, ones = f"lora_unet_{name.replace('.', '_')}", (1,) * (len(shape) - 2)
            tensors[f"{flat}.lora_down.weight"] = A.reshape(2, *shape[1:])
            tensors[f"{flat}.lora_up.weight"] = B.reshape(8, 2, *ones)
            tensors[f"{flat}.alpha"] = torch.tensor(1.0)
            tensors[f"{flat}.dora_scale"] = weights(8, seed=len(shape)).abs().reshape(8, 1, *ones)
        save_file(tensors, path)
        return path

    def test_every_convention_and_back(self, tmp_path: Path) -> None:
        start = self.kohya(tmp_path / "a.safetensors")
        raw, m = load_file(start), weights(8, seed=2).abs()
        for to in ("diffusers", "comfy"):
            report = loratool.convert(start, tmp_path / f"{to}.safetensors", to=to)
            assert {row.how for row in report.modules} == {"exact"}
            loratool.convert(tmp_path / f"{to}.safetensors", tmp_path / "back.safetensors", to="kohya")
            back = load_file(tmp_path / "back.safetensors")
            assert set(back) == set(raw) and all(torch.equal(raw[k], back[k]) for k in raw)
            (tmp_path / "back.safetensors").unlink()
        found = load_file(tmp_path / "diffusers.safetensors")
        assert torch.equal(found[f"unet.{self.NAME}.lora_magnitude_vector"], m)
        assert found["unet.down_blocks.0.resnets.0.conv1.lora_magnitude_vector"].shape == (1, 8, 1, 1)
        comfy = load_file(tmp_path / "comfy.safetensors")
        assert comfy["diffusion_model.input_blocks.1.0.in_layers.2.dora_scale"].shape == (8, 1, 1, 1)

    def test_peft_loads_it(self, tmp_path: Path) -> None:
        from peft import PeftModel

        loratool.convert(self.kohya(tmp_path / "a.safetensors"), tmp_path / "b", to="peft")

        class Path_(nn.Module):
            pass

        root, W = nn.Module(), weights(8, 6)
        for name, layer in (
            (self.NAME, nn.Linear(6, 8, bias=False)),
            ("down_blocks.0.resnets.0.conv1", nn.Conv2d(4, 8, 3)),
        ):
            at = root
            for part in name.split(".")[:-1]:
                if not hasattr(at, part):
                    at.add_module(part, Path_())
                at = getattr(at, part)
            at.add_module(name.split(".")[-1], layer)
        root.get_submodule(self.NAME).weight.data = W.clone()  # type: ignore[union-attr]
        merged = PeftModel.from_pretrained(root, str(tmp_path / "b")).merge_and_unload()
        A, B = factors(8, 6, 2)
        Vd = W.double() + 0.5 * B.double() @ A.double()
        expected = (weights(8, seed=2).abs().double() / Vd.norm(dim=1))[:, None] * Vd
        assert torch.allclose(merged.get_submodule(self.NAME).weight.double(), expected, atol=1e-6)

    @pytest.mark.usefixtures("few_families")
    def test_flux_comes_apart_and_together(self, tmp_path: Path) -> None:
        A, B = factors(18, 6, 4)
        name, m = "lora_unet_double_blocks_0_img_attn_qkv", weights(18, seed=1).abs() + 0.1
        tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(2.0)}
        save_file({**tensors, f"{name}.dora_scale": m.reshape(18, 1)}, tmp_path / "a.safetensors")
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
        found = load_file(tmp_path / "b.safetensors")
        assert torch.equal(found["transformer.transformer_blocks.0.attn.to_k.lora_magnitude_vector"], m[6:12])
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
        back = load_file(tmp_path / "c.safetensors")
        assert torch.equal(back[f"{name}.dora_scale"], m.reshape(18, 1)) and torch.equal(
            back[f"{name}.lora_up.weight"], B
        )
        part = {k: v for k, v in found.items() if "to_v" not in k}
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            save_file(part, tmp_path / "d.safetensors", file.metadata())
        with pytest.raises(NeedsFlag, match="no magnitude"):
            loratool.convert(tmp_path / "d.safetensors", tmp_path / "e.safetensors", to="kohya")

    def test_a_mixed_file_is_refused_where_no_loader_takes_it(self, tmp_path: Path) -> None:
        tensors = load_file(self.kohya(tmp_path / "a.safetensors"))
        del tensors["lora_unet_down_blocks_0_resnets_0_conv1.dora_scale"]
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=r"conv1: is not DoRA"):
            loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfy")


class TestLayout:
    """Phi-3's fused modules and Llama's: GQA of 4 heads and 2 groups of size 3, hidden 8."""

    LAYER = "model.layers.0"
    QKV, GATE_UP = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.gate_up_proj"
    ROWS = (("q", 0, 12), ("k", 12, 18), ("v", 18, 24))

    def base(self, path: Path, **more: int) -> Path:
        fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8, "head_dim": 3, **more}
        path.mkdir()
        (path / "config.json").write_text(json.dumps(fields))
        return path / "config.json"

    def fused(self, path: Path, dtype: torch.dtype = torch.float32) -> Path:
        qkv, gate_up = factors(24, 8, 2, dtype=dtype), factors(10, 8, 4, seed=1, dtype=dtype)
        other = factors(8, 12, 2, seed=2, dtype=dtype)
        modules = {self.QKV: qkv, self.GATE_UP: gate_up, f"{self.LAYER}.self_attn.o_proj": other}
        return write_peft(path, modules, lora_alpha=3, rank_pattern={"gate_up_proj": 4}, alpha_pattern={"qkv_proj": 5})

    def test_split_and_back(self, tmp_path: Path) -> None:
        start, base = self.fused(tmp_path / "a", torch.float16), self.base(tmp_path / "base")
        report = loratool.convert(start, tmp_path / "b", to="peft", layout="split", base=base)
        assert {(m.name.rpartition(".")[2], m.how) for m in report.modules} == {
            ("o_proj", "exact"), *((f"{x}_proj", "split") for x in ("q", "k", "v", "gate", "up"))
        }  # fmt: skip
        for x, first, last in self.ROWS:
            part = change(tmp_path / "b", f"{self.LAYER}.self_attn.{x}_proj")
            assert torch.allclose(part, change(start, self.QKV)[first:last], atol=1e-12)
        for i, x in enumerate(("gate", "up")):
            part = change(tmp_path / "b", f"{self.LAYER}.mlp.{x}_proj")
            assert torch.allclose(part, change(start, self.GATE_UP)[5 * i : 5 * i + 5], atol=1e-12)
        loratool.convert(tmp_path / "b", tmp_path / "c", to="peft", layout="fused")
        one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ac")
        assert set(one) == set(two) and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)
        assert {m: u.scale for m, u in open_adapter(start).updates.items()} == {
            m: u.scale for m, u in open_adapter(tmp_path / "c").updates.items()
        }

    @pytest.mark.parametrize("start", ["pissa", "OLoRA"])
    def test_what_began_as_factors_of_whole_matrices(self, start: str, tmp_path: Path) -> None:
        """PEFT would take the parts' own out of the base instead."""
        parts = {f"{self.LAYER}.self_attn.{x}_proj": factors(6, 8, 2) for x in "qkv"}
        source = write_peft(tmp_path / "a", parts, r=2, init_lora_weights=start)
        with pytest.raises(NeedsFlag, match="from whole matrices of its base.*\n.*plain=True, initial"):
            loratool.convert(source, tmp_path / "b", to="peft", layout="fused")
        started = write_peft(tmp_path / "s", {m: factors(6, 8, 2, seed=1) for m in parts}, r=2, init_lora_weights=start)
        loratool.convert(source, tmp_path / "plain", to="peft", plain=True, initial=started)
        loratool.convert(tmp_path / "plain", tmp_path / "b", to="peft", layout="fused")

    def test_different_parts_are_side_by_side_and_come_apart_again(self, tmp_path: Path) -> None:
        parts = {f"{self.LAYER}.self_attn.{x}_proj": factors(n, 8, r, seed=r) for x, n, r in
                 (("q", 12, 2), ("k", 6, 1), ("v", 6, 3))}  # fmt: skip
        start = write_peft(tmp_path / "a", parts, r=2, lora_alpha=2, rank_pattern={"k_proj": 1, "v_proj": 3},
                           alpha_pattern={"k_proj": 0.7, "v_proj": 3})  # fmt: skip
        (row,) = loratool.convert(start, tmp_path / "b", to="peft", layout="fused").modules
        assert row.rank == 6 and row.how == "rounded" and 0 < row.error < 1e-7  # 0.7 is no float32
        expected = torch.cat([change(start, m) for m in parts])
        assert torch.allclose(change(tmp_path / "b", self.QKV), expected, atol=1e-8)
        base = self.base(tmp_path / "base")
        report = loratool.convert(tmp_path / "b", tmp_path / "c", to="peft", layout="split", base=base)
        assert [m.rank for m in report.modules] == [2, 1, 3]
        for module in parts:
            assert torch.allclose(change(tmp_path / "c", module), change(start, module), atol=1e-8)

    def test_missing_parts_are_zero_rows(self, tmp_path: Path) -> None:
        q, v = (f"{self.LAYER}.self_attn.{x}_proj" for x in "qv")
        start = write_peft(tmp_path / "a", {q: factors(12, 8, 2), v: factors(6, 8, 2, seed=1)})
        loratool.convert(start, tmp_path / "b", to="peft", layout="fused")  # k is as large as v
        D = change(tmp_path / "b", self.QKV)
        assert D.shape == (24, 8) and not D[12:18].any() and torch.allclose(D[18:], change(start, v), atol=1e-12)
        alone = write_peft(tmp_path / "c", {q: factors(12, 8, 2)})
        with pytest.raises(NeedsFlag, match="base"):
            loratool.convert(alone, tmp_path / "d", to="peft", layout="fused")
        loratool.convert(alone, tmp_path / "d", to="peft", layout="fused", base=self.base(tmp_path / "base"))
        assert change(tmp_path / "d", self.QKV).shape == (24, 8)

    def test_gpt2_has_thirds(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", {"transformer.h.0.attn.c_attn": factors(24, 8, 2)}, fan_in_fan_out=True)
        loratool.convert(start, tmp_path / "b", to="peft", layout="split")
        whole = change(start, "transformer.h.0.attn.c_attn")
        assert torch.allclose(change(tmp_path / "b", "transformer.h.0.attn.k_proj"), whole[8:16], atol=1e-12)
        loratool.convert(tmp_path / "b", tmp_path / "e", to="peft", layout="fused")
        one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ae")
        assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
        flags = [json.loads((tmp_path / x / "adapter_config.json").read_text())["fan_in_fan_out"] for x in "be"]
        assert flags == [False, True]  # transformers' Conv1D, which c_attn is
        odd = write_peft(tmp_path / "c", {"transformer.h.0.attn.c_attn": factors(12, 8, 2)})  # multi-query
        with pytest.raises(InputError, match="belongs to another model"):
            loratool.convert(odd, tmp_path / "d", to="peft", layout="split")

    def test_the_papers_query_and_value_as_gpt2s_c_attn(self, tmp_path: Path) -> None:
        """peft's GPT-2 computes with the fused adapter what it computes with the changed thirds of its weight."""
        from peft import PeftModel
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        models = [GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=16)).eval()]
        models.append(type(models[0])(models[0].config))
        models[1].load_state_dict(models[0].state_dict())
        stem = "transformer.h.0.attn"
        q, v = factors(8, 8, 2), factors(8, 8, 3, seed=1)
        start = write_peft(tmp_path / "a", {f"{stem}.q_proj": q, f"{stem}.v_proj": v}, rank_pattern={"v_proj": 3},
                           lora_alpha=64, alpha_pattern={"v_proj": 96})  # fmt: skip
        (row,) = loratool.convert(start, tmp_path / "b", to="peft", layout="fused").modules
        assert (row.name, row.how, row.rank) == (f"{stem}.c_attn", "fused", 5)
        W = models[0].state_dict()[f"{stem}.c_attn.weight"]
        W[:, :8] += 32 * (q[1] @ q[0]).T
        W[:, 16:] += 32 * (v[1] @ v[0]).T
        ids = torch.tensor([[1, 2, 3, 4]])
        loaded = PeftModel.from_pretrained(models[1], str(tmp_path / "b"))
        assert torch.allclose(models[0](ids).logits, loaded(ids).logits, atol=1e-5)
        wide = write_peft(tmp_path / "c", {f"{stem}.q_proj": factors(12, 8, 2)})
        with pytest.raises(InputError, match=r"has 12 rows of q_proj, and GPT-2's matrices 8"):
            loratool.convert(wide, tmp_path / "d", to="peft", layout="fused")

    def test_dora_in_some_parts_leaves_what_is_whole(self, tmp_path: Path) -> None:
        at = f"{self.LAYER}.self_attn."
        dora = {f"{at}{each}_proj": (*factors(8, 8, 2), weights(8)) for each in "qo"}
        gates = {f"{self.LAYER}.mlp.{each}_proj": (*factors(8, 8, 2), weights(8)) for each in ("gate", "up")}
        base = write_model(tmp_path / "base", {}, LLAMA)
        for n, (modules, error) in enumerate(((dora, InputError), ({**dora, **gates}, NeedsFlag))):
            start = write_peft(tmp_path / f"{n}", {m: (A, B) for m, (A, B, _) in modules.items()}, use_dora=True)
            file = start / "adapter_model.safetensors"
            norms = {f"base_model.model.{m}.lora_magnitude_vector": norm for m, (*_, norm) in modules.items()}
            save_file(load_file(file) | norms, file)
            options: dict[str, Any] = {"to": "peft", "layout": "fused", "base": base / "config.json"}
            with pytest.raises(error, match=r"1 modules .* have no magnitude.*q_proj"):
                loratool.convert(start, tmp_path / "b", **options)
        loratool.convert(start, tmp_path / "b", exclude=[f"{at}q_proj"], **options)

    def test_what_is_refused(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        start = self.fused(tmp_path / "a")
        refused = run("convert", start, "--to", "peft", "--layout", "split", "-o", tmp_path / "b")
        assert refused.exit_code == 4 and "--base" in refused.stderr and not (tmp_path / "b").exists()
        other = self.base(tmp_path / "base", num_key_value_heads=4)
        with pytest.raises(InputError, match="belongs to another model"):
            loratool.convert(start, tmp_path / "b", to="peft", layout="split", base=other)
        with pytest.raises(UsageError, match="changes nothing"):
            loratool.convert(start, tmp_path / "b", to="peft", layout="fused")
        with pytest.raises(UsageError, match="cannot be combined: run `loratool.convert` twice"):
            loratool.convert(start, tmp_path / "b", to="peft", layout="split", plain=True)
        file = start / "adapter_model.safetensors"
        save_file({**load_file(file), f"base_model.model.{self.QKV}.base_layer.bias": weights(24)}, file)
        with pytest.raises(InputError, match=r"qkv_proj.bias: has another change"):
            loratool.convert(start, tmp_path / "b", to="peft", layout="split", base=self.base(tmp_path / "right"))

    @pytest.mark.parametrize(
        ("shapes", "message"), [(((5, 8), (5, 9)), "not parts of one matrix"), (((5, 8), (6, 8)), "which no model has")]
    )
    def test_parts_that_do_not_fit(self, shapes: Any, message: str, tmp_path: Path) -> None:
        (a, b), (c, d) = shapes
        modules = {f"{self.LAYER}.mlp.gate_proj": factors(a, b, 2), f"{self.LAYER}.mlp.up_proj": factors(c, d, 2)}
        with pytest.raises(InputError, match=message):
            loratool.convert(write_peft(tmp_path / "a", modules), tmp_path / "b", to="peft", layout="fused")

    def test_peft_computes_the_same(self, tmp_path: Path) -> None:
        """A Phi-3's adapter on a Llama of the same weights."""
        from peft import PeftModel
        from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

        sizes: dict[str, Any] = {
            "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 11, "pad_token_id": 0,
        }  # fmt: skip
        torch.manual_seed(0)
        phi = Phi3ForCausalLM(Phi3Config(**sizes))
        state = phi.state_dict()
        qkv, gate_up = state.pop(f"{self.QKV}.weight"), state.pop(f"{self.GATE_UP}.weight")
        for x, part in zip(("q", "k", "v"), qkv.split([16, 8, 8]), strict=True):
            state[f"{self.LAYER}.self_attn.{x}_proj.weight"] = part
        for x, part in zip(("gate", "up"), gate_up.split(20), strict=True):
            state[f"{self.LAYER}.mlp.{x}_proj.weight"] = part
        llama = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=phi.config.rms_norm_eps))
        llama.load_state_dict(state)
        start = write_peft(tmp_path / "a", {self.QKV: factors(32, 16, 2), self.GATE_UP: factors(40, 16, 2, seed=1)},
                           lora_alpha=64)  # fmt: skip
        phi.config.save_pretrained(tmp_path / "base")
        loratool.convert(start, tmp_path / "b", to="peft", layout="split", base=tmp_path / "base" / "config.json")
        ids = torch.tensor([[1, 2, 3, 4]])
        plain = phi(ids).logits.detach().clone()
        one, two = (PeftModel.from_pretrained(m, str(tmp_path / x))(ids).logits for m, x in ((phi, "a"), (llama, "b")))
        assert torch.allclose(one, two, atol=1e-5) and not torch.allclose(one, plain, atol=1e-3)


LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 16,
}  # fmt: skip


def test_dora_needs_weights_and_a_config_is_none(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {f"{Q}.weight": weights(8, 8)}, LLAMA)
    start = write_peft(tmp_path / "a", {Q: factors(8, 8, 2)}, use_dora=True)
    file = start / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{Q}.lora_magnitude_vector": weights(8).abs() + 1}, file)
    with pytest.raises(NeedsFlag, match="add plain=True, base=BASE with the model and its weights"):
        loratool.convert(start, tmp_path / "b.gguf", to="gguf", base=base / "config.json")
    with pytest.raises(NeedsFlag) as raised:
        loratool.convert(start, tmp_path / "b.gguf", to="gguf", base=base)
    assert raised.value.remedy == "add --plain"
    loratool.convert(start, tmp_path / "b.gguf", to="gguf", base=base, plain=True)
    with pytest.raises(InputError, match=r"is only a config, but the weights are needed\nname its folder"):
        loratool.merge(base / "config.json", [start], tmp_path / "c")


class TestLayersThatTheBaseDoesNotHave:
    @pytest.mark.parametrize("options", [{"to": "mlx"}, {"to": "gguf"}, {"to": "peft", "layout": "fused"}])
    def test_they_are_refused_by_name(self, options: dict[str, Any], tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {}, LLAMA)
        pairs = {f"model.layers.{n}.self_attn.{each}_proj": factors(8, 8, 2) for n in (0, 99) for each in "qkv"}
        start, out = write_peft(tmp_path / "a", pairs), tmp_path / ("b.gguf" if options["to"] == "gguf" else "b")
        with pytest.raises(NeedsFlag, match=r"3 modules .* by the 2 layers of its config.json.*layers\.99") as raised:
            loratool.convert(start, out, base=base / "config.json", **options)
        exclude = [each for each in shlex.split(raised.value.remedy or "") if "." in each]
        report: Any = loratool.convert(start, out, base=base / "config.json", exclude=exclude, **options)
        assert len(report.dropped) == 3
        alone = write_peft(tmp_path / "c", {f"model.layers.{n}.self_attn.q_proj": factors(8, 8, 2) for n in (2, 99)})
        with pytest.raises(InputError, match="2 modules .* of a layer that the base does not have"):
            loratool.convert(alone, tmp_path / ("d" + out.suffix), base=base / "config.json", **options)


@pytest.mark.parametrize("given", ["base", "initial"])
def test_no_file_of_another_input_is_replaced(given: str, tmp_path: Path) -> None:
    start, initial = (write_peft(tmp_path / name, {Q: factors(8, 8, 2)}) for name in ("a", "initial"))
    base = write_model(tmp_path / "base", {f"{Q}.weight": weights(8, 8)}, LLAMA)
    options: dict[str, Any] = {"base": base} if given == "base" else {"initial": initial, "plain": True}
    file = next((tmp_path / given).glob("*.safetensors"))
    before = file.read_bytes()
    with pytest.raises(UsageError, match="the output would overwrite an input"):
        loratool.convert(start, file, to="peft", force=True, **options)
    assert file.read_bytes() == before


def test_a_base_without_its_config_is_not_blamed_for_what_an_option_mends(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    A, B = factors(320, 320, 2)
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(1.0)}
    save_file({**tensors, f"{name}.dora_scale": torch.ones(1, 320)}, tmp_path / "a.safetensors")
    path = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn"
    context = {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight": weights(320, 320, 3, 3)}
    linear = {f"{path}1.to_q.weight": weights(320, 320), f"{path}2.to_k.weight": weights(320, 768)}
    save_file({**linear, **context}, tmp_path / "base.safetensors")
    with pytest.raises(NeedsFlag, match="add plain=True, base=BASE"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b", to="peft", base=tmp_path / "base.safetensors")


def test_parts_of_other_scales_are_rounded_once(tmp_path: Path) -> None:
    """MLX has one scale, and a fused module as well: what is put into the factors is put there by one quotient."""
    pairs = {f"model.layers.0.self_attn.{each}_proj": factors(8, 8, 2, seed=i) for i, each in enumerate("qkvo")}
    start = write_peft(tmp_path / "a", pairs, lora_alpha=3, alpha_pattern={"q_proj": 5})
    report: Any = loratool.convert(start, tmp_path / "b", to="mlx", layout="fused")
    fused = load_file(tmp_path / "b" / "adapters.safetensors")["model.layers.0.self_attn.qkv_proj.lora_b"]
    B = pairs[Q][1].double() * (2.5 / 1.5)
    assert report.modules[-1].name.endswith("qkv_proj") or report.modules[0].name.endswith("qkv_proj")
    assert torch.equal(fused[:2, :8].T, B.float())


def test_plain_says_so_where_no_number_changes(tmp_path: Path) -> None:
    start = write_peft(
        tmp_path / "a", {Q: factors(8, 8, 4)}, use_rslora=True, lora_alpha=2, target_modules="all-linear"
    )
    (row,) = loratool.convert(start, tmp_path / "b", to="peft", plain=True).modules
    assert (row.how, row.rank, row.alpha) == ("exact", 4, 4.0)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    told = {key: config[key] for key in ("r", "lora_alpha", "use_rslora", "target_modules")}
    assert told == {"r": 4, "lora_alpha": 4, "use_rslora": False, "target_modules": [Q]}


@pytest.mark.parametrize("to", ["peft", "loralib"])
def test_what_has_no_factors_can_only_be_merged(to: str, tmp_path: Path) -> None:
    start = write_peft(tmp_path / "a", {Q: factors(8, 8, 2)}, modules_to_save=["lm_head"])
    save_file({"base_model.model.lm_head.weight": weights(16, 8)}, start / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"(?s)has no factors to convert.*extract\(BASE, MERGED\)"):
        loratool.convert(start, tmp_path / "b.safetensors", to=to)


@pytest.mark.parametrize("size", [1e200, 1e300])
def test_a_change_that_float64_cannot_measure_is_not_cut(size: float, tmp_path: Path) -> None:
    A, B = factors(8, 8, 4)
    start = write_peft(tmp_path / "a", {Q: (A.double() * size, B.double() * size)})
    with pytest.raises(InputError, match=f"{Q}: its change is too large"):
        loratool.convert(start, tmp_path / "b", to="peft", plain=True, rank=2)


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"plain": True, "dtype": "fp16"}, {"plain": True}])
def test_an_overflow_is_refused_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    A, B = factors(6, 6, 2)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B * 1e38, f"{name}.alpha": torch.tensor(1e6)}
    save_file(tensors, tmp_path / "image.safetensors")
    write_peft(tmp_path / "language", {Q: (A, B * 1e38)}, lora_alpha=1e6)
    for source, to, out in (("image.safetensors", "comfy", "x.safetensors"), ("language", "peft", "x")):
        with pytest.raises(LoratoolError, match="to_q: its factors overflow|q_proj: its factors overflow"):
            loratool.convert(tmp_path / source, tmp_path / out, to=to, **options)
        assert not (tmp_path / out).exists()


def test_from_overrides_what_the_names_say(tmp_path: Path) -> None:
    """A language model whose modules begin as an image model's component does."""
    A, B = factors(6, 8, 2)
    tensors = {"unet.blocks.0.attn.lora_A.weight": A, "unet.blocks.0.attn.lora_B.weight": B}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="not an adapter of a known image model"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b", to="peft")
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "b", to="peft", from_format="peft", alpha=3.0)
    assert torch.equal(change(tmp_path / "b", "unet.blocks.0.attn"), 1.5 * B.double() @ A.double())
    with pytest.raises(InputError, match="is not a LoRA tensor|is none of"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "c", to="peft", from_format="kohya")
    with pytest.raises(UsageError, match="none of"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "c", to="peft", from_format="what")


@pytest.mark.parametrize(
    "options", [{"to": "mlx"}, {"to": "gguf"}, {"runtime": "mlx"}, {"runtime": "llama.cpp"}], ids=str
)
@pytest.mark.parametrize("head", ["score", "classifier.out_proj"])
def test_a_trained_classifier_is_refused_with_the_merge(tmp_path: Path, head: str, options: dict[str, Any]) -> None:
    """The factors without it classify nothing, so --exclude is not what its user wants."""
    query = "model.layers.0.self_attn.q_proj"
    start = write_peft(tmp_path / "a", {query: factors(8, 8, 2)}, modules_to_save=[head.partition(".")[0]])
    tensors = load_file(start / "adapter_model.safetensors")
    save_file(tensors | {f"base_model.model.{head}.weight": weights(3, 8)}, start / "adapter_model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "head_dim": 4, "vocab_size": 16, "intermediate_size": 8}
    base = write_model(tmp_path / "base", {f"{query}.weight": weights(8, 8)}, config)
    out = tmp_path / ("b.gguf" if {"gguf", "llama.cpp"} & {*options.values()} else "b")
    with pytest.raises(InputError, match="is a trained classifier of") as refused:
        loratool.convert(start, out, base=base, **options)
    assert refused.value.culprit == head
    assert re.search(r"merge it, .* loratool merge BASE \S+ -o MERGED", str(refused.value.remedy))
    loratool.convert(start, out, base=base, exclude=head, **options)
