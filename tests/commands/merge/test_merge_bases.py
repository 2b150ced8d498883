"""Hold merges into bases of every kind: torch files, foreign and residual ones, renamed models; then the same bytes."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, factors, load_model, slow, weights, write_model, write_peft
from lib.models.peft_models import (
    DOWN,
    EAGER,
    FAMILIES,
    GATE_UP,
    Pair,
    agree,
    answer,
    config_of,
    gemma3,
    kinds,
    llama,
    llava,
    load,
    mixtral,
    peft,
    qwen2_vl,
    randomize,
    transformers,
    wrap,
    write_base,
    write_pair,
)
from lib.oracles.reference import change_reference, round_reference, to_longdouble
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool.errors import InputError, NeedsFlag, UsageError
from loratool.numerics.dense import TILE

pytestmark = [pytest.mark.filterwarnings("ignore")]


def as_bytes(folder: Path) -> dict[str, bytes]:
    return {name: bytes(bits(tensor).numpy()) for name, tensor in load_model(folder).items()}


def write_bin_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


WRITERS: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "one .bin": lambda folder, t: torch.save(t, folder / "pytorch_model.bin"),
    "sharded .bin": write_bin_shards,
    "legacy .pt": lambda folder, t: torch.save(t, folder / "x.pt", _use_new_zipfile_serialization=False),
    "a .ckpt with a state_dict": lambda folder, t: torch.save({"state_dict": t, "epoch": 3}, folder / "last.ckpt"),
    "a legacy .bin of parameters": lambda folder, t: torch.save(
        {name: nn.Parameter(tensor) for name, tensor in t.items()},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, dict[str, bytes]]:
    """Write a base and an adapter with many kinds of updates; return also the bytes of their merge from safetensors."""
    folder = tmp_path_factory.mktemp("plain")
    pair = write_pair(folder, llama(), **kinds(FAMILIES["llama"])["all at once"])
    loratool.merge(pair.base, pair.adapter, folder / "out")
    return pair, as_bytes(folder / "out")


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_merge_from_torch_files(plain: Any, tmp_path: Path, kind: str) -> None:
    pair, expected = plain
    base = tmp_path / "base"
    base.mkdir()
    WRITERS[kind](base, load_model(pair.base))
    shutil.copy(pair.base / "config.json", base)
    loratool.merge(base, pair.adapter, tmp_path / "out")
    assert as_bytes(tmp_path / "out") == expected
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt", ".ckpt")]
    assert pair.holds(tmp_path / "out")


def test_eight_bit_floats_without_scales_are_copied_and_changed_into_wider_ones(tmp_path: Path) -> None:
    """A float8 matrix without scales is a plain cast, not a code; `test_merge_float8` keeps its type."""
    codes, (A, B) = weights(6, 4, seed=1).to(torch.float8_e4m3fn), factors(6, 4, 2)
    base = write_model(tmp_path / "base", {"x.weight": weights(6, 4), "y.weight": codes})
    loratool.merge(base, write_peft(tmp_path / "a", {"x": (A, B)}), tmp_path / "out")
    assert torch.equal(bits(load_model(tmp_path / "out")["y.weight"]), bits(codes))
    adapter = write_peft(tmp_path / "b", {"y": (A, B)})
    with pytest.raises(NeedsFlag, match="y.weight: .*(\n.*)?undo=False"):
        loratool.merge(base, adapter, tmp_path / "no", dtype="fp32")
    loratool.merge(base, adapter, tmp_path / "wide", undo=False, dtype="fp32")
    wanted = round_reference(to_longdouble(codes) + change_reference(A, B, 1.0), torch.float32)
    assert torch.equal(load_model(tmp_path / "wide")["y.weight"], wanted)


class TestForeignBases:
    """Each is refused with exit 3, and the message says what it is and what to do."""

    def refused(self, run: Any, tmp_path: Path, base: Path, adapter: Path, name: str) -> None:
        result = run("merge", base, adapter, "-o", tmp_path / "out")
        assert result.exit_code == 3 and name in result.stderr and len(result.stderr.strip().splitlines()) >= 2
        assert not (tmp_path / "out").exists()

    def test_a_zero_folder_without_states(self, tmp_path: Path, run: Any) -> None:
        step = tmp_path / "base" / "global_step10"
        step.mkdir(parents=True)
        (tmp_path / "base" / "zero_to_fp32.py").write_text("")
        adapter = write_peft(tmp_path / "a", {"x": factors(6, 4, 2)})
        (tmp_path / "base" / "latest").write_text("global_step10")
        result = run("merge", tmp_path / "base", adapter, "-o", tmp_path / "out")
        assert result.exit_code == 3 and "holds no " in result.stderr
        torch.save({}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        result = run("merge", tmp_path / "base", adapter, "-o", tmp_path / "out")
        assert result.exit_code == 3 and "has no optimizer_state_dict" in result.stderr

    def test_a_step_of_zero_3_without_its_optimizer(self, tmp_path: Path, run: Any) -> None:
        """The folder of a step, and a file of it, in which every weight is empty."""
        step = tmp_path / "global_step10"
        step.mkdir()
        model = step / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        torch.save({"module": {"x.weight": torch.empty(0)}, "ds_version": "0.15"}, model)
        adapter = write_peft(tmp_path / "a", {"x": factors(6, 4, 2)})
        for base in (step, model):
            self.refused(run, tmp_path, base, adapter, "is a part of a DeepSpeed ZeRO state")

    def test_weights_made_of_a_training_state_are_taken(self, tmp_path: Path) -> None:
        """The weights that the remedy names must not be refused again."""
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "zero_to_fp32.py").write_text("")
        torch.save({"x.weight": weights(6, 4)}, tmp_path / "base" / "pytorch_model.bin")
        loratool.merge(tmp_path / "base", write_peft(tmp_path / "a", {"x": factors(6, 4, 2)}), tmp_path / "out")

    @pytest.mark.parametrize("flat", [True, False])
    def test_inspect_names_a_dump_too(self, plain: Any, tmp_path: Path, run: Any, flat: bool) -> None:
        pair, _ = plain
        state = wrap(load(pair.base, pair.cls), target_modules=["q_proj"]).state_dict()
        torch.save(
            {k.replace(".base_layer", "" if flat else ".base_layer"): v for k, v in state.items()}, tmp_path / "x.bin"
        )
        result = run("inspect", tmp_path / "x.bin")
        assert result.exit_code == 3 and "dump of a whole PeftModel" in result.stderr

    @pytest.mark.parametrize("container", ["safetensors", "bin"])
    def test_a_dump_of_a_whole_peft_model(self, plain: Any, tmp_path: Path, run: Any, container: str) -> None:
        pair, _ = plain
        (tmp_path / "base").mkdir()
        state = wrap(load(pair.base, pair.cls), target_modules=["q_proj"]).state_dict()
        assert any(".base_layer." in k for k in state) and any(".lora_A.default." in k for k in state)
        if container == "bin":
            torch.save(state, tmp_path / "base" / "pytorch_model.bin")
        else:
            save_file({k: v.clone() for k, v in state.items()}, tmp_path / "base" / "model.safetensors")
        self.refused(run, tmp_path, tmp_path / "base", pair.adapter, "PeftModel")

    def test_a_quantized_one(self, tmp_path: Path, run: Any) -> None:
        """A sum of packed codes is no weight."""
        base = write_model(
            tmp_path / "base", {"x.weight": torch.zeros(12, 1, dtype=torch.uint8), "x.weight.absmax": torch.zeros(1)}
        )
        self.refused(
            run, tmp_path, base, write_peft(tmp_path / "a", {"x": factors(6, 4, 2)}), "quantized (bitsandbytes 4-bit)"
        )

    def test_the_base_of_a_qlora(self, tmp_path: Path, run: Any) -> None:
        """Nothing tells whether the 16-bit base or the dequantized one is meant: the codes are refused.

        The message names the original, and on that the adapter merges.
        """
        adapter = write_peft(tmp_path / "a", {"x": factors(6, 4, 2)}, base_model_name_or_path="org/model")
        config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        codes = {"x.weight": torch.zeros(12, 1, dtype=torch.uint8), "x.weight.absmax": torch.zeros(1)}
        base = write_model(tmp_path / "base", codes, config)
        told = f"pass the original model in 16 or 32 bits; {adapter} says it was trained on org/model"
        self.refused(run, tmp_path, base, adapter, told)
        same = write_peft(tmp_path / "b", {"x": factors(6, 4, 2)}, base_model_name_or_path=str(base))
        assert "says it was" not in run("merge", base, same, "-o", tmp_path / "out").stderr
        original = write_model(tmp_path / "w16", {"x.weight": weights(6, 4, dtype=torch.bfloat16)})
        assert run("merge", original, adapter, "-o", tmp_path / "out").exit_code == 0

    @pytest.mark.parametrize("what", ["base", "adapter"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_that_would_run_something(self, tmp_path: Path, run: Any, what: str, zipped: bool) -> None:
        """A torch file is read without running its pickle."""
        mark = tmp_path / "ran"

        class Gadget:
            def __reduce__(self) -> Any:
                return Path.touch, (mark,)

        base = write_model(tmp_path / "base", {"x.weight": weights(6, 4)})
        adapter = write_peft(tmp_path / "a", {"x": factors(6, 4, 2)})
        victim = {"base": base / "model.safetensors", "adapter": adapter / "adapter_model.safetensors"}[what]
        tensors = {**load_file(victim), "z": Gadget()}
        victim.unlink()
        name = {"base": "pytorch_model.bin", "adapter": "adapter_model.bin"}[what]
        torch.save(tensors, victim.parent / name, _use_new_zipfile_serialization=zipped)
        result = run("merge", base, adapter, "-o", tmp_path / "out")
        assert result.exit_code == 3 and name in result.stderr and not mark.exists()
        pickle.loads(pickle.dumps(Gadget()))
        assert mark.exists(), "the gadget itself is broken"


@pytest.fixture(scope="module", params=["pissa", "pissa_niter_4", "olora", "pissa, rslora"])
def residual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return (folder, the answer of peft) of a model under an init that changes its base.

    The folder has the original base, the residual one, the adapter as it was initialized, and the trained adapter.
    """
    folder = tmp_path_factory.mktemp("residual")
    init, _, rslora = request.param.partition(", ")
    base = write_base(folder / "single", llama())
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)  # peft's inits need it
    write_model(folder / "base", {k: v.double() for k, v in model.state_dict().items()}, config_of(base))
    fields = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", "use_rslora": bool(rslora)}
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(init_lora_weights=init, target_modules=["q_proj", "down_proj"], **fields)
    )
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(folder / "initial")
    wrapped.peft_config["default"].init_lora_weights = init
    changed = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.double()
        for name, tensor in wrapped.state_dict().items()
        if "lora_" not in name
    }
    write_model(folder / "residual", changed, config_of(base))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
    wrapped.save_pretrained(folder / "adapter")
    return folder, answer(wrapped.double().eval())


class TestInitsThatChangeTheBase:
    """The adapter belongs to W - s * B0 @ A0, and on W itself it is wrong by O(1)."""

    def test_without_a_flag_it_is_refused_and_both_flags_are_named(
        self, residual: Any, tmp_path: Path, run: Any
    ) -> None:
        folder, _ = residual
        result = run("merge", folder / "base", folder / "adapter", "-o", tmp_path / "out")
        assert result.exit_code == 4 and "--initial" in result.stderr and "--residual-base" in result.stderr

    def test_on_the_residual_base_and_with_the_initial_adapter(self, residual: Any, tmp_path: Path, run: Any) -> None:
        folder, wanted = residual
        cls = transformers.LlamaForCausalLM
        loratool.merge(folder / "residual", folder / "adapter", tmp_path / "r", residual_base=True)
        loratool.merge(folder / "base", folder / "adapter", tmp_path / "i", initial=folder / "initial")
        assert all(agree(answer(load(tmp_path / out, cls)), wanted) for out in ("r", "i"))
        assert not agree(answer(load(folder / "base", cls)), wanted)
        flags = ["--initial", folder / "initial"]
        assert run("merge", folder / "base", folder / "adapter", "-o", tmp_path / "c", *flags).exit_code == 0
        assert as_bytes(tmp_path / "c") == as_bytes(tmp_path / "i")

    def test_a_weight_is_a_part_of_the_way_from_the_original(self, residual: Any, tmp_path: Path) -> None:
        """A weight w gives w times the delta, never w squared."""
        folder, _ = residual
        for w in (1.0, 0.5):
            loratool.merge(folder / "base", (folder / "adapter", w), tmp_path / str(w), initial=folder / "initial")
        W, full, half = (load_model(p) for p in (folder / "base", tmp_path / "1.0", tmp_path / "0.5"))
        assert all(torch.allclose(half[k], (W[k] + full[k]) / 2, rtol=1e-12, atol=1e-12) for k in W)


def test_a_wrong_initial_adapter_is_refused(tmp_path: Path, run: Any) -> None:
    base = write_model(tmp_path / "base", {"x.weight": weights(6, 4), "y.weight": weights(6, 4, seed=1)})
    moved = write_peft(tmp_path / "a", {"x": factors(6, 4, 2)}, init_lora_weights="olora")
    for wrong, message in (
        (write_peft(tmp_path / "other", {"y": factors(6, 4, 2)}), "x: is in .* has no module of its shape and scale"),
        (write_peft(tmp_path / "wide", {"x": factors(8, 4, 2)}), "x: is in .* has no module of its shape and scale"),
    ):
        with pytest.raises(InputError, match=message):
            loratool.merge(base, moved, tmp_path / "out", initial=wrong)
    with pytest.raises(UsageError, match="is the adapter itself"):
        loratool.merge(base, moved, tmp_path / "out", initial=moved)
    right = write_peft(tmp_path / "right", {"x": factors(6, 4, 2, seed=5)})
    with pytest.raises(UsageError, match="exclude each other"):
        loratool.merge(base, moved, tmp_path / "out", initial=right, residual_base=True)
    usual = write_peft(tmp_path / "usual", {"x": factors(6, 4, 2)})
    assert run("merge", base, usual, "-o", tmp_path / "out", "--residual-base").exit_code == 2
    assert run("merge", base, usual, usual, "-o", tmp_path / "out", "--initial", right).exit_code == 2
    with pytest.raises(NeedsFlag):
        loratool.merge(base, [usual, moved], tmp_path / "out")


LLAVA_4 = (("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."))
# family -> (model, adapter, its modules' names in transformers 5 and 4)
RENAMED: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[tuple[str, str], ...]]] = {
    "llava": (
        llava,
        {"target_modules": ["q_proj", "fc1", "linear_1", "lm_head"], "use_dora": True},
        (*LLAVA_4, ("model.multi_modal_projector.", "multi_modal_projector."), ("lm_head.", "language_model.lm_head.")),
    ),
    "gemma3": (
        gemma3,
        {"target_modules": ["q_proj", "down_proj", "fc2"], "modules_to_save": ["input_layernorm"]},
        LLAVA_4,
    ),
    "qwen2_vl": (
        qwen2_vl,
        {"target_modules": ["q_proj", "down_proj", "qkv"]},
        (("model.language_model.", "model."), ("model.visual.", "visual.")),
    ),
    "mixtral": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
        ((".mlp.gate.", ".block_sparse_moe.gate."),),
    ),
}


@pytest.mark.parametrize("family", RENAMED)
@pytest.mark.parametrize("version", [5, 4])
def test_renamed_models(tmp_path: Path, family: str, version: int) -> None:
    """transformers 5 renamed modules, and either side may have the old names.

    Every tensor is held against peft's merge of the same factors, and the answers of the text part too.
    """
    make, config, names = RENAMED[family]
    options = EAGER if family == "mixtral" else {}
    model = make()
    cls, base = type(model), write_base(tmp_path / "base", model)
    wrapped = wrap(load(base, cls, **options), **config)
    wrapped.save_pretrained(tmp_path / "a")
    wanted, merged = answer(wrapped), wrapped.merge_and_unload().state_dict()
    if version == 4:
        file, prefix = tmp_path / "a" / "adapter_model.safetensors", "base_model.model."
        renamed = {}
        for key, tensor in load_file(file).items():
            five, four = next((pair for pair in names if pair[0] in key.removeprefix(prefix)), ("", ""))
            renamed[prefix + key.removeprefix(prefix).replace(five, four, 1)] = tensor
        assert renamed.keys() != load_file(file).keys()
        save_file(renamed, file)
        if family == "mixtral":  # where the router was a module
            fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
            fields |= {"target_parameters": None, "target_modules": ["q_proj", "gate"]}
            (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields))
    report = loratool.merge(base, tmp_path / "a", tmp_path / "out")
    assert not report.left_out and load_model(tmp_path / "out").keys() == load_model(base).keys()
    out = load(tmp_path / "out", cls, **options)
    assert agree(answer(out), wanted)
    for name, tensor in out.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-11, atol=1e-11)


class Zoo(nn.Module):
    """A layer for each kind of update, of sizes that no block divides."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.rows, self.columns = nn.Linear(170, 150), Conv1D(90, 300)
        self.words, self.tokens = nn.Embedding(270, 80), nn.Embedding(130, 70)
        self.conv, self.saved = nn.Conv2d(12, 20, 3), nn.Linear(90, 80)


class TestSameBytes:
    """Nothing but the inputs decides a byte, for every kind of update."""

    @pytest.fixture(params=[torch.bfloat16, slow(torch.float32)], ids=str)
    def inputs(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[tuple[Path, float]]]:
        """Write two models in one file, and adapters that together have DoRA, LoRA, biases, values, rows, experts."""
        layers, config = ["rows", "columns", "words", "conv"], {"task_type": None, "r": 5}
        linear = [name for name in layers if name != "words"]

        def zoo(seed: int, **kind: Any) -> Any:
            return wrap(randomize(Zoo()), seed, **{"target_modules": ["conv"], **config, **kind})

        made = {
            "dora": (zoo(1, target_modules=layers, use_dora=True), 0.7),
            "lora": (zoo(2, target_modules=linear, lora_bias=True), -1.3),
            "saved": (zoo(3, modules_to_save=["saved"]), 0.4),
            "rows": (zoo(4, trainable_token_indices={"tokens": [7, 3, 128, 64]}), -0.6),
            "experts": (wrap(randomize(mixtral(72)), 5, r=5, target_parameters=[GATE_UP, DOWN]), 1.1),
        }
        adapters = []
        for name, (model, weight) in made.items():
            model.save_pretrained(tmp_path / name)
            file = tmp_path / name / "adapter_model.safetensors"
            save_file({k: v.float() for k, v in load_file(file).items()}, file)
            adapters.append((tmp_path / name, weight))
        state = {**randomize(Zoo()).state_dict(), **randomize(mixtral(72)).state_dict()}
        tensors = {name: tensor.to(request.param).contiguous() for name, tensor in state.items()}
        return write_model(tmp_path / "base", tensors, shards=2), adapters

    def digest(self, folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}

    def test_whatever_the_workers_and_blocks(
        self, tmp_path: Path, inputs: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, adapters = inputs
        report = loratool.merge(base, adapters, tmp_path / "expected")
        found = {part for row in report.tensors for part in row.update.split("+")}
        assert found == {"dora", "lora", "add", "replace", "rows", "experts"}
        expected = self.digest(tmp_path / "expected")
        for workers, block, tile, item, least, norm in (
            (2, 1 << 20, 1 << 17, 1 << 22, 256, 256),
            (1, 1, 1, 1, 1, 64),
            (2, 170, 100, 1000, 3, 128),
            (2, 5000, 64, 1 << 22, 1, 192),
            (5, 1 << 20, 1 << 12, 1, 33, 1024),
        ):
            monkeypatch.setattr("loratool.streaming.rewrite.CAST_BLOCK", block)
            monkeypatch.setattr("loratool.numerics.dense.TILE", dict.fromkeys(TILE, tile))
            monkeypatch.setattr("loratool.numerics.norms.TILE", dict.fromkeys(TILE, tile))
            monkeypatch.setattr("loratool.numerics.merge.TOGETHER", max(tile, 50))
            monkeypatch.setattr("loratool.undo.records.ASKED", max(tile, 50))
            monkeypatch.setattr("loratool.streaming.rewrite.ROWS_ITEM", item)
            monkeypatch.setattr("loratool.streaming.rewrite.MIN_ROWS", least)
            monkeypatch.setattr("loratool.streaming.rewrite.COPY_ITEM", 1000)
            monkeypatch.setattr("loratool.streaming.segment.NORM_ROWS", norm)
            loratool.merge(base, adapters, tmp_path / "out", workers=workers, force=True)
            assert self.digest(tmp_path / "out") == expected, (workers, block, tile)

    def test_order_of_adapters_and_of_the_rank(self, tmp_path: Path, inputs: Any) -> None:
        base, adapters = inputs
        loratool.merge(base, adapters, tmp_path / "expected")
        for turned in (adapters[::-1], adapters[2:] + adapters[:2]):
            loratool.merge(base, turned, tmp_path / "out", force=True)
            assert self.digest(tmp_path / "out") == self.digest(tmp_path / "expected")
        order = torch.tensor([3, 1, 4, 0, 2])
        for folder, _ in adapters:
            file = folder / "adapter_model.safetensors"
            turned = {}
            for name, tensor in load_file(file).items():
                stack = 3 if ".experts." in name else 1
                if ".lora_A" in name or ".lora_embedding_A" in name:  # (experts * r, ...)
                    tensor = tensor.unflatten(0, (stack, 5))[:, order].flatten(0, 1)
                elif name.endswith("lora_B.weight") or ".lora_embedding_B" in name:  # (..., r * experts)
                    tensor = tensor.unflatten(1, (5, stack))[:, order].flatten(1, 2)
                turned[name] = tensor.contiguous()
            save_file(turned, file)
        loratool.merge(base, adapters, tmp_path / "permuted")
        assert as_bytes(tmp_path / "permuted") == as_bytes(tmp_path / "expected")
