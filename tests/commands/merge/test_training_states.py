"""Hold the commands on sharded states of training runs, models and adapters, against the same on plain files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, factors, load_model, weights, write_model, write_peft
from lib.models.training_runs import Shard, cut, write_dcp, write_ranks, write_zero
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.errors import InputError, NeedsFlag

MODULES = {"model.layers.0.self_attn.q_proj": (12, 8), "model.layers.0.mlp.down_proj": (8, 20)}
WEIGHTS = {f"{module}.weight": weights(*shape, seed=i) for i, (module, shape) in enumerate(MODULES.items())}
MODEL = {**WEIGHTS, "model.norm.weight": torch.ones(8), "model.layers.0.self_attn.q_proj.bias": weights(12)}
FACTORS = {module: factors(*shape, 4, seed=i) for i, (module, shape) in enumerate(MODULES.items())}
CONFIG = {"model_type": "some"}
PREFIX = "base_model.model."


def write_fsdp(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a trainer's folder with a model's state, cut by rows or by columns, beside the optimizer's."""
    state = {("model", name): tensor for name, tensor in tensors.items()}
    boxes = {}
    for i, (path, tensor) in enumerate(state.items()):
        d = i % tensor.dim()
        half = tensor.shape[d] // 2
        boxes[path] = cut(tensor.shape, {d: [half, tensor.shape[d] - half]})
    write_dcp(folder / "pytorch_model_fsdp_0", state, boxes)
    write_dcp(folder / "optimizer_0", {("optimizer", "m"): torch.ones(3)})
    return folder


def write_step(folder: Path, tensors: Mapping[str, Tensor], stage: int = 3) -> Path:
    write_zero(folder / "global_step7", stage, 3, [tensors])
    (folder / "latest").write_text("global_step7")
    return folder


def write_actor(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    return write_ranks(folder, (2,), {name: (tensor, [Shard(0)]) for name, tensor in tensors.items()})


WRITERS: dict[str, Callable[[Path, Mapping[str, Tensor]], Path]] = {
    "fsdp": write_fsdp, "zero": write_step, "ranks": write_actor,
}  # fmt: skip


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Callable[[Path, Mapping[str, Tensor]], Path]:
    return WRITERS[request.param]


def same(one: Path, two: Path) -> None:
    first, second = load_model(one), load_model(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(bits(tensor), bits(second[name])) for name, tensor in first.items())


class TestBases:
    def test_every_command_reads_it_as_the_plain_model(self, tmp_path: Path, write: Any) -> None:
        plain, state = write_model(tmp_path / "plain", MODEL, CONFIG), write(tmp_path / "state", MODEL)
        (state / "config.json").write_text(json.dumps(CONFIG))
        adapter = write_peft(tmp_path / "adapter", FACTORS)
        for name, base in (("one", plain), ("two", state)):
            loratool.merge(base, adapter, tmp_path / name)
        same(tmp_path / "one", tmp_path / "two")
        assert loratool.verify(state, adapter, tmp_path / "two").status == "proven"
        loratool.unmerge(tmp_path / "two", adapter, tmp_path / "back")
        same(tmp_path / "back", plain)
        assert loratool.convert_model(state, tmp_path / "converted").cast == ()
        same(tmp_path / "converted", plain)
        loratool.convert_model(state, tmp_path / "half", dtype="bf16")
        assert all(torch.equal(t, MODEL[name].bfloat16()) for name, t in load_model(tmp_path / "half").items())
        assert loratool.diff(plain, state).same
        tuned = write(tmp_path / "tuned", load_model(tmp_path / "one"))
        for name, pair in (("a", (plain, tmp_path / "one")), ("b", (state, tuned))):
            loratool.extract(*pair, tmp_path / name, rank=4)
        same(tmp_path / "a", tmp_path / "b")
        assert loratool.inspect(state).parameters == loratool.inspect(plain).parameters

    def test_what_stands_beside_is_told(self, tmp_path: Path, run: Any) -> None:
        state, adapter = write_fsdp(tmp_path / "state", MODEL), write_peft(tmp_path / "adapter", FACTORS)
        result = run("merge", state, adapter, "-o", tmp_path / "out")
        assert result.exit_code == 0 and "not copied: optimizer_0/" in result.stdout
        assert "pytorch_model_fsdp_0" not in result.stdout
        step = write_step(tmp_path / "step", MODEL)
        told = run("convert", step, "-o", tmp_path / "told")
        assert "also holds optimizer, which is not read" in told.stderr
        quiet = run("convert", step, "-o", tmp_path / "quiet", "--drop", "optimizer")
        assert "also holds" not in quiet.stderr and "excluded: optimizer" in quiet.stdout

    def test_no_part_is_overwritten(self, tmp_path: Path, run: Any) -> None:
        state, adapter = write_actor(tmp_path / "state", MODEL), write_peft(tmp_path / "adapter", FACTORS)
        part = state / "model_world_size_2_rank_1.pt"
        for out in (part, state):
            result = run("convert", state, "--to", "torch", "-o", out, "--force")
            assert result.exit_code == 2 and "would overwrite an input" in result.stderr
        assert run("merge", state, adapter, "-o", state, "--force").exit_code == 2


def with_base(layers: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a whole PeftModel's state has: the factors, and the base's tensors."""
    own = {}
    for module, (A, B) in layers.items():
        own |= {f"{PREFIX}{module}.lora_A.default.weight": A, f"{PREFIX}{module}.lora_B.default.weight": B}
    moved = {f"{module}.{kind}": f"{module}.base_layer.{kind}" for module in layers for kind in ("weight", "bias")}
    return own, {PREFIX + moved.get(name, name): tensor for name, tensor in MODEL.items()}


class TestAdapters:
    def test_factors_alone(self, tmp_path: Path, write: Any) -> None:
        """FSDP's own saving, and DeepSpeed's without frozen parameters, leave the base out."""
        plain, adapter = write_model(tmp_path / "plain", MODEL), write_peft(tmp_path / "adapter", FACTORS)
        state = write(tmp_path / "state", with_base(FACTORS)[0])
        with pytest.raises(NeedsFlag, match="alpha"):
            loratool.merge(plain, state, tmp_path / "none")
        (state / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
        for name, each in (("one", adapter), ("two", state)):
            loratool.merge(plain, each, tmp_path / name)
        same(tmp_path / "one", tmp_path / "two")
        loratool.convert(state, tmp_path / "converted", to="peft")
        same(tmp_path / "converted", adapter)
        loratool.resize(state, tmp_path / "small", rank=2)
        loratool.combine([state, adapter], tmp_path / "both", method="cat")
        assert loratool.diff(state, adapter).same

    @pytest.mark.parametrize("stage", [2, 3])
    def test_zero_says_what_was_frozen(self, tmp_path: Path, run: Any, stage: int) -> None:
        own, frozen = with_base(FACTORS)
        trained = f"{PREFIX}model.norm.weight"
        del frozen[trained]
        state = tmp_path / "state"
        write_zero(state, stage, 2, [own, {trained: torch.full((8,), 2.0)}], frozen, {"rope": torch.ones(2)})
        (state / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "all"}')
        result = run("merge", write_model(tmp_path / "plain", MODEL), state, "-o", tmp_path / "out")
        assert result.exit_code == 0 and "4 tensors of its base are in" in result.stderr
        merged = load_model(tmp_path / "out")
        assert torch.equal(merged["model.norm.weight"], torch.full((8,), 2.0))
        loratool.merge(tmp_path / "plain", write_peft(tmp_path / "adapter", FACTORS), tmp_path / "one")
        expected = load_model(tmp_path / "one")
        assert all(torch.equal(merged[name], expected[name]) for name in WEIGHTS)

    def test_the_ranks_of_verl(self, tmp_path: Path, run: Any) -> None:
        own, base = with_base(FACTORS)
        state = write_actor(tmp_path / "state", {**own, **base})
        (state / "lora_train_meta.json").write_text('{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}')
        plain = write_model(tmp_path / "plain", MODEL)
        result = run("merge", plain, state, "-o", tmp_path / "two")
        assert result.exit_code == 0 and "4 tensors of its base are in" in result.stderr
        loratool.merge(plain, write_peft(tmp_path / "adapter", FACTORS, lora_alpha=8), tmp_path / "one")
        same(tmp_path / "one", tmp_path / "two")
        loratool.convert(state, tmp_path / "peft", to="peft")
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert config["lora_alpha"] == 8 and config["target_modules"] == ["down_proj", "q_proj"]

    def test_biases_that_may_have_been_trained_are_not_left_out(self, tmp_path: Path) -> None:
        own, base = with_base(FACTORS)
        state = write_fsdp(tmp_path / "state", {**own, **base})
        (state / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "all"}')
        with pytest.raises(InputError, match="trains biases"):
            open_adapter(state)

    def test_its_hash_is_that_of_all_its_files(self, tmp_path: Path, write: Any) -> None:
        own, _ = with_base(FACTORS)
        hashes = set()
        for number in range(2):
            state = write(tmp_path / str(number), {name: tensor + number for name, tensor in own.items()})
            with closing(open_adapter(state, alpha=4).file):
                hashes.add(open_adapter(state, alpha=4).sha256)
        assert len(hashes) == 2


RANKS = """
import os, sys
os.environ.update(MASTER_ADDR="127.0.0.1")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn

def model():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).bfloat16()

def shard(whole, layers, mesh):
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(whole, mesh=mesh)

def run(rank, out, port):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    os.environ.update(MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    base = model()
    if rank == 0:
        base.save_pretrained(f"{out}/plain")
    shard(base, base.model.layers, mesh)
    dcp.save({"model": base.state_dict()}, checkpoint_id=f"{out}/base/pytorch_model_fsdp_0")
    tuned = get_peft_model(model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for number, (name, parameter) in enumerate(tuned.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(number))
    if rank == 0:
        tuned.save_pretrained(f"{out}/adapter")
    dist.barrier()
    shard(tuned, tuned.base_model.model.model.layers, mesh)
    state = tuned.state_dict()
    dcp.save({"model": get_peft_model_state_dict(tuned, state)}, checkpoint_id=f"{out}/factors")
    os.makedirs(f"{out}/actor", exist_ok=True)
    torch.save(state, f"{out}/actor/model_world_size_2_rank_{rank}.pt")
    dist.destroy_process_group()

if __name__ == "__main__":
    spawn(run, (sys.argv[1], sys.argv[2]), 2)
"""


@pytest.mark.slow
def test_what_two_ranks_of_fsdp_save(tmp_path: Path) -> None:
    """Torch's fully_shard, DCP and DTensors, and PEFT on top of them."""
    (tmp_path / "run.py").write_text(RANKS)
    subprocess.run([sys.executable, tmp_path / "run.py", tmp_path, "29619"], check=True, capture_output=True)
    assert loratool.diff(tmp_path / "plain", tmp_path / "base").same
    loratool.merge(tmp_path / "plain", tmp_path / "adapter", tmp_path / "merged")
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    config = (tmp_path / "adapter" / "adapter_config.json").read_bytes()
    for base in ("plain", "base"):
        for adapter in ("adapter", "factors", "actor"):
            (tmp_path / adapter / "adapter_config.json").write_bytes(config)
            out = tmp_path / f"{base} {adapter}"
            loratool.merge(tmp_path / base, tmp_path / adapter, out)
            found = load_model(out)
            assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in expected.items())
