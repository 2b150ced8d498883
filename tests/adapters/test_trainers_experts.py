"""Hold unsloth's, tinker's and Megatron-Bridge's experts to the matrices that they mean, as their own code has them."""

from __future__ import annotations

import ast
import collections
import importlib
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model, oracle_folder, weights, write_model
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.errors import InputError

P, E, HIDDEN, WIDE, SCALE = "model.layers.0.mlp.experts", 3, 8, 6, 1.5
GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": E, "architectures": ["GptOssForCausalLM"]}


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "experts"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def gpt_oss(folder: Path, wide: int = WIDE) -> dict[str, Tensor]:
    """Write a base of two matrices and a query, the stacks (expert, in, out), gates and ups in turn."""
    W = {
        f"{P}.gate_up_proj": weights(E, HIDDEN, 2 * wide),
        f"{P}.down_proj": weights(E, wide, HIDDEN, seed=1),
        "model.layers.0.self_attn.q_proj.weight": weights(HIDDEN, HIDDEN, seed=2),
        "lm_head.weight": weights(11, HIDDEN, seed=3),
    }
    write_model(folder, W, GPT_OSS)
    return W


class TestUnsloth:
    def factors(self, wide: int = WIDE, experts: tuple[int, ...] = (0, 2)) -> dict[str, Tensor]:
        found = {}
        for e in experts:
            found[f"{P}.gate_up_projs.{e}.lora_A.weight"] = weights(2, HIDDEN, seed=10 + e)
            found[f"{P}.gate_up_projs.{e}.lora_B.weight"] = weights(2 * wide, 2, seed=20 + e)
            found[f"{P}.down_projs.{e}.lora_A.weight"] = weights(2, wide, seed=30 + e)
            found[f"{P}.down_projs.{e}.lora_B.weight"] = weights(HIDDEN, 2, seed=40 + e)
        q = "model.layers.0.self_attn.q_proj"
        query = {f"{q}.lora_A.weight": weights(2, HIDDEN, seed=5), f"{q}.lora_B.weight": weights(HIDDEN, 2, seed=6)}
        return {**found, **query}

    @pytest.mark.parametrize("wide", [WIDE, HIDDEN])  # with the last, down_proj is square
    def test_a_merge(self, wide: int, tmp_path: Path) -> None:
        """`W[e] += (s B A)^T`, as `_fold_perexpert_lora_into_fused` of unsloth_zoo has it."""
        tensors, W = self.factors(wide), gpt_oss(tmp_path / "base", wide)
        adapter = write_adapter(tmp_path / "a", tensors, peft_version="0.17.1")
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
        found = load_model(tmp_path / "out")
        for parameter in ("gate_up_proj", "down_proj"):
            expected = W[f"{P}.{parameter}"].double()
            for e in (0, 2):
                A, B = (tensors[f"{P}.{parameter}s.{e}.lora_{side}.weight"].double() for side in "AB")
                expected[e] += SCALE * (B @ A).T
            assert torch.equal(found[f"{P}.{parameter}"], expected.float())
        loratool.convert(adapter, tmp_path / "peft", to="peft")
        loratool.merge(tmp_path / "base", tmp_path / "peft", tmp_path / "again", undo=False)
        again = load_model(tmp_path / "again")
        if wide == HIDDEN:  # of two experts only: the converted adapter does not know the third
            return
        assert all(torch.equal(again[key], found[key]) for key in found)

    def test_other_ranks(self, tmp_path: Path) -> None:
        """A pattern is of the trainer's names, and a scale is alpha over the module's own rank."""
        adapter = write_adapter(tmp_path / "a", self.factors(), r=8, rank_pattern={r".*_projs\.\d+": 2, "q_proj": 2})
        assert {update.scale for update in open_adapter(adapter).updates.values()} == {SCALE}
        with pytest.raises(InputError, match="the config says"):
            open_adapter(write_adapter(tmp_path / "b", self.factors(), r=8, rank_pattern={"q_proj": 2}))
        with pytest.raises(InputError, match="alpha_pattern"):
            open_adapter(write_adapter(tmp_path / "c", self.factors(), alpha_pattern={"q_proj": 2}))

    def test_one_of_the_two(self, tmp_path: Path) -> None:
        tensors = {k: v for k, v in self.factors(experts=(0, 1, 2)).items() if "gate_up" not in k}
        updates = open_adapter(write_adapter(tmp_path / "a", tensors)).updates
        assert updates[f"{P}.down_proj"].shape == (E, HIDDEN, WIDE) and f"{P}.gate_up_proj" not in updates

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"gate_up_projs.1.lora_A.weight": (2, HIDDEN)}, "has no partner"),
            ({"gate_up_projs.1.lora_magnitude_vector": (2 * WIDE,)}, "not a LoRA factor"),
            ({"down_projs.1.lora_A.weight": (3, WIDE), "down_projs.1.lora_B.weight": (HIDDEN, 3)}, "different ranks"),
            ({"down_projs.7.lora_A.weight": (2, WIDE), "down_projs.7.lora_B.weight": (HIDDEN, 2)}, "the model has 3"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, extra: dict[str, tuple[int, ...]], message: str, tmp_path: Path
    ) -> None:
        more = {f"{P}.{name}": weights(*shape) for name, shape in extra.items()}
        with pytest.raises(InputError, match=message):
            open_adapter(write_adapter(tmp_path / "a", {**self.factors(), **more}), model=GPT_OSS)

    def test_a_number_is_no_stack_of_so_many(self, tmp_path: Path) -> None:
        tensors = {name.replace("_projs.0.", "_projs.9999."): tensor for name, tensor in self.factors().items()}
        with pytest.raises(InputError, match="at most 1024 experts"):
            open_adapter(write_adapter(tmp_path / "a", tensors))


class TestTinker:
    def stacks(self, shared: str = "") -> dict[str, Tensor]:
        """Return w1, w2 and w3 of E experts; of the names in `shared`, like w1.A, a stack of one."""
        found = {}
        for seed, name in enumerate(("w1", "w2", "w3")):
            rows, width = (HIDDEN, WIDE) if name == "w2" else (WIDE, HIDDEN)
            a, b = (1 if f"{name}.{side}" in shared else E for side in "AB")
            found[f"{P}.{name}.lora_A.weight"] = weights(a, 2, width, seed=seed)
            found[f"{P}.{name}.lora_B.weight"] = weights(b, rows, 2, seed=seed + 10)
        return found

    def delta(self, tensors: dict[str, Tensor], name: str, e: int) -> Tensor:
        A, B = (tensors[f"{P}.{name}.lora_{side}.weight"].double() for side in "AB")
        return SCALE * B[e if len(B) > 1 else 0] @ A[e if len(A) > 1 else 0]

    @pytest.mark.parametrize("shared", ["", "w1.A w3.A w2.B"])
    def test_of_experts_one_by_one(self, shared: str, tmp_path: Path) -> None:
        names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        W = {f"{P}.{e}.{n}.weight": weights(*((HIDDEN, WIDE) if n == "down_proj" else (WIDE, HIDDEN)), seed=e)
             for e in range(E) for n in names.values()}  # fmt: skip
        W["lm_head.weight"] = weights(11, HIDDEN)
        tensors = self.stacks(shared=shared)
        head = {f"model.unembed_tokens.lora_{x}.weight": weights(*s) for x, s in (("A", (2, HIDDEN)), ("B", (11, 2)))}
        adapter = write_adapter(tmp_path / "a", {**tensors, **head}, target_modules="all-linear")
        write_model(tmp_path / "base", W, {"model_type": "qwen3_moe"})
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
        found = load_model(tmp_path / "out")
        for name, own in names.items():
            for e in range(E):
                key = f"{P}.{e}.{own}.weight"
                assert torch.equal(found[key], (W[key].double() + self.delta(tensors, name, e)).float())
        A, B = (head[f"model.unembed_tokens.lora_{side}.weight"].double() for side in "AB")
        assert torch.equal(found["lm_head.weight"], (W["lm_head.weight"].double() + SCALE * B @ A).float())

    @pytest.mark.parametrize("shared", ["", "w1.A w3.A w2.B"])
    def test_of_gpt_oss(self, shared: str, tmp_path: Path) -> None:
        """Gates are the even columns, ups the odd ones, and the attention has another name."""
        W, tensors = gpt_oss(tmp_path / "base"), self.stacks(shared=shared)
        shapes = {"A": (2, HIDDEN), "B": (HIDDEN, 2)}
        q = {f"model.layers.0.attn.q_proj.lora_{x}.weight": weights(*s) for x, s in shapes.items()}
        adapter = write_adapter(tmp_path / "a", {**tensors, **q})
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
        found = load_model(tmp_path / "out")
        gate_up, down = W[f"{P}.gate_up_proj"].double(), W[f"{P}.down_proj"].double()
        for e in range(E):
            gate_up[e, :, 0::2] += self.delta(tensors, "w1", e).T
            gate_up[e, :, 1::2] += self.delta(tensors, "w3", e).T
            down[e] += self.delta(tensors, "w2", e).T
        assert torch.equal(found[f"{P}.gate_up_proj"], gate_up.float())
        assert torch.equal(found[f"{P}.down_proj"], down.float())
        A, B = (q[f"model.layers.0.attn.q_proj.lora_{side}.weight"].double() for side in "AB")
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(found[name], (W[name].double() + SCALE * B @ A).float())

    def test_attention_alone(self, tmp_path: Path) -> None:
        """`attn` is GPT-OSS's where the model is, or tinker's other names are there; another model's keeps its name."""
        shapes = {"A": (2, HIDDEN), "B": (HIDDEN, 2)}
        q = {f"model.layers.0.attn.q_proj.lora_{x}.weight": weights(*s) for x, s in shapes.items()}
        adapter, own, theirs = (
            write_adapter(tmp_path / "a", q),
            "model.layers.0.attn.q_proj",
            "model.layers.0.self_attn.q_proj",
        )
        assert (
            set(open_adapter(adapter).updates) == set(open_adapter(adapter, model={"model_type": "x"}).updates) == {own}
        )
        assert set(open_adapter(adapter, model=GPT_OSS).updates) == {theirs}
        head = {f"model.unembed_tokens.lora_{x}.weight": weights(*s) for x, s in shapes.items()}
        both = write_adapter(tmp_path / "b", {**q, **head})
        assert set(open_adapter(both).updates) == {theirs, "lm_head"}
        assert set(open_adapter(both, model={"model_type": "x"}).updates) == {own, "lm_head"}

    def qkv(self) -> dict[str, Tensor]:
        stem, rows = "model.layers.0.linear_attn.in_proj_", {"q": 4, "k": 2, "v": 6}
        return {f"{stem}{each}.lora_{x}.weight": weights(*((2, HIDDEN) if x == "A" else (n, 2)), seed=n)
                for each, n in rows.items() for x in "AB"}  # fmt: skip

    def test_q_k_and_v_of_qwen(self, tmp_path: Path) -> None:
        """Its linear attention has them as one in transformers, q's rows first."""
        tensors, name = self.qkv(), "model.layers.0.linear_attn.in_proj_qkv.weight"
        W = {name: weights(12, HIDDEN), "lm_head.weight": weights(11, HIDDEN)}
        write_model(tmp_path / "base", W, {"model_type": "qwen3_5_text"})
        loratool.merge(tmp_path / "base", write_adapter(tmp_path / "a", tensors), tmp_path / "out", undo=False)
        pairs = [
            [tensors[name.replace("qkv.weight", f"{x}.lora_{side}.weight")].double() for side in "AB"] for x in "qkv"
        ]
        expected = W[name].double() + SCALE * torch.cat([B @ A for A, B in pairs])
        assert torch.equal(load_model(tmp_path / "out")[name], expected.float())
        for number, lost in enumerate(("in_proj_k", "in_proj_q", "in_proj_q.lora_A")):
            some = {k: v for k, v in tensors.items() if lost not in k}
            with pytest.raises(InputError, match="not all are there"):
                open_adapter(write_adapter(tmp_path / str(number), some))
        mixed = {k: v.half() if "in_proj_k" in k else v for k, v in tensors.items()}
        with pytest.raises(InputError, match="do not belong together"):
            open_adapter(write_adapter(tmp_path / "mixed", mixed))

    @pytest.mark.parametrize("name", [f"{P}.0.gate_proj.lora_A.weight", "lm_head.lora_A.weight"])
    def test_two_of_one_name_are_refused(self, name: str, tmp_path: Path) -> None:
        head = {"model.unembed_tokens.lora_A.weight": weights(2, HIDDEN), name: weights(2, HIDDEN)}
        with pytest.raises(InputError, match="under this name and under its trainer's"):
            open_adapter(write_adapter(tmp_path / "a", {**self.stacks(), **head}))

    def test_of_nemotron(self, tmp_path: Path) -> None:
        """It has no gate: w3 is empty, and w1 the projection up."""
        tensors = {k: v for k, v in self.stacks().items() if "w3" not in k}
        empty = {f"{P}.w3.lora_A.weight": torch.empty(0, 2, HIDDEN), f"{P}.w3.lora_B.weight": torch.empty(0, WIDE, 2)}
        updates = open_adapter(write_adapter(tmp_path / "a", {**tensors, **empty})).updates
        assert set(updates) == {f"{P}.{e}.{name}" for e in range(E) for name in ("up_proj", "down_proj")}
        assert updates[f"{P}.1.up_proj"].shape == (WIDE, HIDDEN)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"w1.lora_A": (2, 2, HIDDEN)}, "is of 2 experts, and its B of 3"),
            ({"w1.lora_A": (1, 2, HIDDEN), "w1.lora_B": (1, WIDE, 2)}, "is of 1 experts"),
            ({"w1.lora_A": None}, "has no partner"),
            ({"w1.lora_A": (1, 2, HIDDEN), "w1.lora_B": (1 << 40, 0, 2)}, "one of the two is empty"),
            ({"w1.lora_A": (E, 4, HIDDEN)}, "do not share a rank"),
            ({"w1.lora_A": (4, 2, HIDDEN), "w1.lora_B": (4, WIDE, 2)}, r"stacks of \[3, 4\] experts"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, change: dict[str, tuple[int, ...] | None], message: str, tmp_path: Path
    ) -> None:
        tensors = self.stacks()
        for name, shape in change.items():
            tensors.pop(f"{P}.{name}.weight")
            tensors |= {} if shape is None else {f"{P}.{name}.weight": weights(*shape)}
        with pytest.raises(InputError, match=message):
            open_adapter(write_adapter(tmp_path / "a", tensors))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"r": 4}, r"has rank 2, but the config says \['4'\]"),
            ({"alpha_pattern": {"w1": 5}}, "alpha_pattern"),
            ({"use_rslora": True}, "gate and up fused"),
        ],
    )
    def test_other_configs_are_refused(self, config: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            open_adapter(write_adapter(tmp_path / "a", self.stacks(), **config), model=GPT_OSS)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["gpt_oss", "default"])
    def test_as_tinker_cookbook_merges_it(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = oracle_folder("tinker_cookbook", "tinker_cookbook==0.6.1")
        monkeypatch.syspath_prepend(folder)
        package = types.ModuleType("tinker_cookbook.weights")  # as a whole it needs the service's client
        package.__path__ = [f"{folder}/tinker_cookbook/weights"]
        monkeypatch.setitem(sys.modules, package.__name__, package)
        their = importlib.import_module("tinker_cookbook.weights._merge")
        own = importlib.import_module(f"tinker_cookbook.weights._merge_{kind}")
        q = "model.layers.0.attn.q_proj" if kind == "gpt_oss" else "model.layers.0.self_attn.q_proj"
        tensors = {**self.stacks(shared="w1.A w3.A w2.B"), f"{q}.lora_A.weight": weights(2, HIDDEN),
                   f"{q}.lora_B.weight": weights(HIDDEN, 2), "model.unembed_tokens.lora_A.weight": weights(2, HIDDEN),
                   "model.unembed_tokens.lora_B.weight": weights(11, 2)}  # fmt: skip
        W, config = gpt_oss(tmp_path / "base"), GPT_OSS
        if kind == "default":
            config = {"model_type": "qwen3_moe"}
            stacks = {k: W.pop(k) for k in [*W] if ".experts." in k}
            for e in range(E):
                gate_up = stacks[f"{P}.gate_up_proj"][e].T
                W |= {f"{P}.{e}.gate_proj.weight": gate_up[:WIDE], f"{P}.{e}.up_proj.weight": gate_up[WIDE:]}
                W[f"{P}.{e}.down_proj.weight"] = stacks[f"{P}.down_proj"][e].T
            W = {k: v.contiguous() for k, v in W.items()}
            write_model(tmp_path / "base", W, config)
        adapter = write_adapter(tmp_path / "a", tensors)
        profile = own.detect_profile(GPT_OSS if kind == "gpt_oss" else {"architectures": []}, set(W))
        given = {f"base_model.model.{k}": v for k, v in tensors.items()}
        expected = {k: v.clone() for k, v in W.items()}
        for ops in own.plan_merge_ops(given, {"r": 2, "lora_alpha": 3}, set(W), profile).values():
            for op in ops:
                their.apply_merge_op(expected, op)
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
        found = load_model(tmp_path / "out")
        assert found.keys() == expected.keys() and sum(not torch.equal(found[k], W[k]) for k in W) >= 4
        assert all(torch.allclose(found[k], expected[k], rtol=1e-5, atol=1e-8) for k in found)


BRIDGE = {
    "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": "Qwen/Qwen3.5-35B-A3B", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_alpha": 3, "lora_dropout": 0.0,
    "modules_to_save": None, "r": 2, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    "target_parameters": [f"{P}.down_proj", f"{P}.gate_up_proj"],
}  # fmt: skip


class TestMegatronBridge:
    def stacks(self) -> dict[str, Tensor]:
        """Return what it exports before it packs it: A (experts, rank, in) and B (experts, out, rank)."""
        shapes = {"gate_up_proj": (2 * WIDE, HIDDEN), "down_proj": (HIDDEN, WIDE)}
        return {f"{P}.{n}.lora_{x}.weight": weights(E, *((2, s[1]) if x == "A" else (s[0], 2)), seed=ord(x))
                for n, s in shapes.items() for x in "AB"}  # fmt: skip

    def pack(self, stacks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pack them as `_pack_target_parameter_adapter_weights` does, the first of two names outside."""
        found = {}
        for name, wrapper in (("down_proj", P), ("gate_up_proj", f"{P}.base_layer")):
            A, B = (stacks[f"{P}.{name}.lora_{x}.weight"] for x in "AB")
            found[f"{wrapper}.lora_A.weight"] = torch.cat([each.T for each in B])
            found[f"{wrapper}.lora_B.weight"] = torch.cat([each.T for each in A], 1)
        return found

    def write(self, folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
        adapter = write_adapter(folder, tensors)
        (adapter / "adapter_config.json").write_text(json.dumps({**BRIDGE, **config}))
        return adapter

    def test_a_merge(self, tmp_path: Path) -> None:
        stacks = self.stacks()
        W = {f"{P}.gate_up_proj": weights(E, 2 * WIDE, HIDDEN), f"{P}.down_proj": weights(E, HIDDEN, WIDE, seed=1)}
        write_model(tmp_path / "base", {**W, "lm_head.weight": weights(11, 8)}, {"model_type": "qwen3_5_moe_text"})
        adapter = self.write(tmp_path / "a", self.pack(stacks))
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
        found = load_model(tmp_path / "out")
        for name, own in W.items():
            A, B = (stacks[f"{name}.lora_{x}.weight"].double() for x in "AB")
            assert torch.equal(found[name], (own.double() + SCALE * B @ A).float())

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"base_model_name_or_path": "openai/gpt-oss-20b"}, "of GPT-OSS in another order"),
            ({"r": 4}, "not experts of rank 4"),
            ({"target_parameters": [f"{P}.down_proj", f"{P}.other", f"{P}.gate_up_proj"]}, "has no factors"),
            ({"rank_pattern": {f"{P}.down_proj": 1}}, r"stacks of \[3, 6\] experts"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, config: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            open_adapter(self.write(tmp_path / "a", self.pack(self.stacks()), **config))

    def test_a_stack_of_no_bytes_is_refused(self, tmp_path: Path) -> None:
        packed = self.pack(self.stacks())
        shapes = {"A": (1 << 40, 0), "B": (0, 1 << 40)}
        empty = {name: torch.empty(shapes[name.rpartition(".lora_")[2][0]]) for name in packed}
        with pytest.raises(InputError, match="not experts of rank"):
            open_adapter(self.write(tmp_path / "a", empty))

    @pytest.mark.slow
    def test_it_packs_them_so(self, tmp_path: Path) -> None:
        """Its functions run here as they stand; the module as a whole needs Megatron."""
        folder = oracle_folder(
            "megatron_bridge_main", "and put peft_bridge.py of github NVIDIA-NeMo/Megatron-Bridge (2026-08) there"
        )
        tree = ast.parse((Path(folder) / "peft_bridge.py").read_text())
        names = """_pack_target_parameter_adapter_weights _order_target_parameters _build_target_parameter_prefixes
            _split_hf_lora_weight_name convert_adapter_weights_to_peft_state _HF_LORA_SUFFIXES""".split()
        kept = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in names]
        tree.body = [
            *(each for each in tree.body if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) in names),
            *kept,
        ]
        space: dict[str, Any] = {"torch": torch, "defaultdict": collections.defaultdict, **vars(typing)}
        exec(compile(tree, "peft_bridge", "exec"), space)
        given = [types.SimpleNamespace(param_name=k, weight=v) for k, v in self.stacks().items()]
        state, _, targets = space["convert_adapter_weights_to_peft_state"](given)
        own = {f"base_model.model.{k}": v for k, v in self.pack(self.stacks()).items()}
        assert targets == BRIDGE["target_parameters"] and state.keys() == own.keys()
        assert all(torch.equal(state[k], own[k]) for k in own)
