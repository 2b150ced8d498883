"""Hold adapters in GGUF's names against llama.cpp's converters: of every model type of the tables, on small models.

All of it takes ten minutes on two cores.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lib.files import imatrix_files
from lib.models import gguf_families, tiny
from lib.oracles import llama_cpp

import loratool
from loratool.architectures.gguf import ARCHITECTURES
from loratool.binding.weights.input_moments import InputMoments
from loratool.files.checkpoint import read_config
from loratool.files.imatrix_file import ImatrixFile

pytestmark = pytest.mark.slow


TYPES = sorted({t for row in ARCHITECTURES.values() for t in (*row.model_types, *row.wrappers)} - tiny.NOT_BUILT.keys())
TYPES += gguf_families.VARIANTS

# The types of which llama.cpp's converter of adapters turns the factors of Conv1D with the weights, gives all to
# another class, so that it writes a file of the type `model` and no alpha, or stops at what it does to the weights
WRONG_THERE = {
    "gpt2": "turned", "ministral3": "a model", "mistral3": "a model", "mistral4": "a model", "qwen3_next": "none",
    "glm4v": "none", "glm_ocr": "none", "kimi_linear": "none", "step3p7": "none",
}  # fmt: skip

# Cases whose modules' names a GGUF file does not tell from those of another model of its architecture
UNTOLD = (
    "bamba", "bert", "eurobert", "gemma3_text headless", "granite", "granitemoehybrid attention",
    "granitemoehybrid dense",
)  # fmt: skip

STACKED = """afmoe cohere2_moe deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe glm4_moe glm4v_moe glm_moe_dsa
    gpt_oss
    granitemoe granitemoehybrid hunyuan_v1_moe hy_v3 jamba kimi_linear lfm2_moe llama4 llama4_text
    mellum mimo_v2_flash minimax_m2 mistral4 mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe
    qwen3_5_moe_text qwen3_moe qwen3_next qwen3_vl_moe step3p7""".split()


@dataclass(frozen=True)
class Family:
    """The files of one model type."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def gguf(self) -> Path:
        return self.folder / "model.gguf"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def theirs(self) -> Path:
        return self.folder / "theirs.gguf"

    @property
    def ours(self) -> Path:
        return self.folder / "ours.gguf"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Build all models and adapters, and run llama.cpp's converters on them in one process."""
    pytest.importorskip("gguf", reason="needs gguf, which is in the extra `test`")
    pytest.importorskip("peft", minversion="0.19")
    found = {each: Family(tmp_path_factory.mktemp(each.replace(" ", "_"))) for each in TYPES}
    jobs = []
    for model_type, family in found.items():
        gguf_families.build_model(model_type, family.model)
        model = gguf_families.load_model(family.model)
        gguf_families.build_adapter(model, family.adapter, gguf_families.linear_layers(model))
        jobs.append(llama_cpp.model_to_gguf(family.model, family.gguf))
        jobs.append(llama_cpp.adapter_to_gguf(family.adapter, family.model, family.theirs))
        loratool.convert(family.adapter, family.ours, to="gguf", base=family.model / "config.json")
    failed = llama_cpp.run_converters(jobs)
    assert {*failed} == {str(found[each].theirs) for each, how in WRONG_THERE.items() if how == "none"}, failed
    return found


@pytest.fixture(scope="module")
def merged(families: dict[str, Family]) -> dict[str, Family]:
    """Merge each adapter into its model of transformers, and convert that by llama.cpp's program."""
    jobs = []
    for family in families.values():
        loratool.merge(family.model, family.adapter, family.folder / "merged", undo=False)
        jobs.append(llama_cpp.model_to_gguf(family.folder / "merged", family.folder / "merged.gguf"))
    assert llama_cpp.run_converters(jobs) == {}
    return families


def tensors(path: Path) -> dict[str, tuple[Any, list[int], bytes]]:
    """Read a GGUF file by the package `gguf`: the type, dimensions and bytes of each tensor."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {each.name: (each.tensor_type, [*each.shape], each.data.tobytes()) for each in reader.tensors}


def safe_tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("model_type", TYPES)
class TestEveryModelType:
    def test_writes_the_tensors_that_llama_cpps_converter_writes(
        self, families: dict[str, Family], model_type: str
    ) -> None:
        if WRONG_THERE.get(model_type) == "none":
            pytest.skip("llama.cpp's converter of adapters stops")
        ours, theirs = tensors(families[model_type].ours), tensors(families[model_type].theirs)
        assert (ours == theirs) is (model_type not in WRONG_THERE)
        assert ours.keys() == theirs.keys() or WRONG_THERE[model_type] == "a model"

    def test_says_the_same_alpha_and_architecture(self, families: dict[str, Family], model_type: str) -> None:
        import gguf

        if WRONG_THERE.get(model_type) == "none":
            pytest.skip("llama.cpp's converter of adapters stops")
        keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha", "general.file_type")
        ours, theirs = (
            gguf.GGUFReader(path).fields for path in (families[model_type].ours, families[model_type].theirs)
        )
        shared = [key for key in keys if key in theirs]
        same = [ours[key].contents() for key in shared] == [theirs[key].contents() for key in shared]
        assert same is (WRONG_THERE.get(model_type) != "a model")

    def test_gives_the_factors_back_bit_for_bit(
        self, families: dict[str, Family], model_type: str, tmp_path: Path
    ) -> None:
        import torch

        family = families[model_type]
        wrapped = "text_config" in (family.model / "config.json").read_text()  # which the file alone does not tell
        base = {"base": family.model} if wrapped or model_type in UNTOLD else {}
        loratool.convert(family.ours, tmp_path / "back", to="peft", **base)
        there, back = (safe_tensors(each / "adapter_model.safetensors") for each in (family.adapter, tmp_path / "back"))
        assert there.keys() == back.keys()
        assert all(torch.equal(there[key], back[key]) and there[key].dtype == back[key].dtype for key in there)

    def test_merges_as_the_adapter_that_it_is_made_of(
        self, merged: dict[str, Family], model_type: str, tmp_path: Path
    ) -> None:
        family = merged[model_type]
        loratool.merge(family.model, family.ours, tmp_path / "merged", undo=False)
        one, two = (each / "merged" / "model.safetensors" for each in (family.folder, tmp_path))
        assert _data(one) == _data(two)

    def test_finds_the_inputs_of_a_module_where_llama_cpp_has_its_factors(
        self, families: dict[str, Family], model_type: str, tmp_path: Path
    ) -> None:
        """The columns of lora_a are the inputs of the tensor that an imatrix has under the same name."""
        import torch

        family = families[model_type]
        path = family.ours if model_type in WRONG_THERE else family.theirs
        sums = {}
        for name, (_, shape, data) in tensors(path).items():
            if name.endswith(".lora_a") and not name.startswith("token_embd."):
                row = torch.frombuffer(bytearray(data), dtype=torch.float32)[: shape[0]]
                sums[name.removesuffix(".lora_a")] = (row[None].square(), [1])
        file = imatrix_files.write_gguf(tmp_path / "imatrix.gguf", sums)
        with closing(ImatrixFile(file)) as found, loratool.open_adapter(family.adapter) as adapter:
            moments = InputMoments.of_model(found, read_config(family.model), model_type)
            for module, update in adapter.items():
                h = update.A[0].double().square()
                weights = moments.weights(module, (1, *update.shape))
                assert weights is not None
                assert torch.allclose(
                    torch.from_numpy(weights[0]), (h / h.mean()).clamp(min=1e-3).sqrt().float(), rtol=1e-5
                )

    @pytest.mark.parametrize("adapter", ["ours", "adapter"])
    def test_merges_into_gguf_what_llama_cpp_converts_from_the_merged_model(
        self, merged: dict[str, Family], model_type: str, adapter: str, tmp_path: Path
    ) -> None:
        family = merged[model_type]
        loratool.merge(family.gguf, getattr(family, adapter), tmp_path / "out.gguf", undo=False)
        assert tensors(tmp_path / "out.gguf") == tensors(family.folder / "merged.gguf")


def _data(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.mark.parametrize("model_type", STACKED)
class TestStacksOfExperts:
    @pytest.fixture
    def stacked(self, families: dict[str, Family], model_type: str, tmp_path: Path) -> Path:
        """An adapter of the class's stacks, as PEFT saves it."""
        model = gguf_families.load_model(families[model_type].model)
        ends = {name.split(".layers.")[1].split(".", 1)[1] for name in tiny.stacks(model) if "bias" not in name}
        return gguf_families.build_adapter(model, tmp_path / "stacked", [], ends, r=2)

    def test_gives_the_factors_back_bit_for_bit(
        self, families: dict[str, Family], model_type: str, stacked: Path, tmp_path: Path
    ) -> None:
        import torch

        base = families[model_type].model
        loratool.convert(stacked, tmp_path / "x.gguf", to="gguf", base=base)
        loratool.convert(tmp_path / "x.gguf", tmp_path / "back", to="peft", base=base)
        there, back = (safe_tensors(each / "adapter_model.safetensors") for each in (stacked, tmp_path / "back"))
        assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there)

    @pytest.mark.parametrize("written", [False, True])
    def test_merges_into_gguf_what_llama_cpp_converts_from_the_merged_model(
        self, families: dict[str, Family], model_type: str, stacked: Path, written: bool, tmp_path: Path
    ) -> None:
        family, adapter = families[model_type], stacked
        if written:
            adapter = tmp_path / "x.gguf"
            loratool.convert(stacked, adapter, to="gguf", base=family.model)
        loratool.merge(family.model, stacked, tmp_path / "merged", undo=False)
        assert llama_cpp.run_converters([llama_cpp.model_to_gguf(tmp_path / "merged", tmp_path / "m.gguf")]) == {}
        loratool.merge(family.gguf, adapter, tmp_path / "out.gguf", undo=False)
        assert tensors(tmp_path / "out.gguf") == tensors(tmp_path / "m.gguf")


@pytest.mark.parametrize(("model_type", "path"), [("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")])
def test_stacks_single_experts_as_llama_cpps_converter_does(
    families: dict[str, Family], model_type: str, path: str, tmp_path: Path
) -> None:
    """Adapters of transformers 4 have experts one by one, as the files have them."""
    import json

    import torch
    from safetensors.torch import save_file

    names = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}[path]
    stored = safe_tensors(families[model_type].model / "model.safetensors")
    torch.manual_seed(2)
    found = {}
    for name, weight in stored.items():
        module = name.removesuffix(".weight")
        if f"{path}.experts." in name and module.endswith(names):
            found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, weight.shape[1])
            found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(weight.shape[0], 2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(found, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [*names]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    base, out = families[model_type].model, tmp_path / "theirs.gguf"
    assert llama_cpp.run_converters([llama_cpp.adapter_to_gguf(adapter, base, out)]) == {}
    loratool.convert(adapter, tmp_path / "ours.gguf", to="gguf", base=base)
    assert tensors(tmp_path / "ours.gguf") == tensors(out)


def test_a_pair_of_an_embedding_is_what_llama_cpps_converter_writes(
    families: dict[str, Family], tmp_path: Path
) -> None:
    model = gguf_families.load_model(families["qwen2"].model)
    adapter = gguf_families.build_adapter(model, tmp_path / "adapter", ["embed_tokens", "q_proj"])
    base, out = families["qwen2"].model, tmp_path / "theirs.gguf"
    assert llama_cpp.run_converters([llama_cpp.adapter_to_gguf(adapter, base, out)]) == {}
    loratool.convert(adapter, tmp_path / "ours.gguf", to="gguf", base=base)
    assert tensors(tmp_path / "ours.gguf") == tensors(out)


def test_the_rows_of_each_head_merge_as_llama_cpp_converts_them(families: dict[str, Family], tmp_path: Path) -> None:
    """GGUF has multi-head latent attention's kv_b as two stacks of a matrix for each head, one of them turned."""
    family = families["deepseek_v3"]
    adapter = gguf_families.build_adapter(gguf_families.load_model(family.model), tmp_path / "a", ["kv_b_proj"])
    loratool.merge(family.model, adapter, tmp_path / "merged", undo=False)
    assert llama_cpp.run_converters([llama_cpp.model_to_gguf(tmp_path / "merged", tmp_path / "m.gguf")]) == {}
    loratool.merge(family.gguf, adapter, tmp_path / "out.gguf", undo=False)
    assert tensors(tmp_path / "out.gguf") == tensors(tmp_path / "m.gguf")


def test_dora_merges_into_gguf_what_llama_cpp_converts_from_the_merged_model(
    families: dict[str, Family], tmp_path: Path
) -> None:
    family = families["llama"]
    model = gguf_families.load_model(family.model)
    adapter = gguf_families.build_adapter(model, tmp_path / "adapter", ["q_proj", "v_proj", "up_proj"], use_dora=True)
    loratool.merge(family.model, adapter, tmp_path / "merged", undo=False)
    assert llama_cpp.run_converters([llama_cpp.model_to_gguf(tmp_path / "merged", tmp_path / "m.gguf")]) == {}
    loratool.merge(family.gguf, adapter, tmp_path / "out.gguf", undo=False)
    assert tensors(tmp_path / "out.gguf") == tensors(tmp_path / "m.gguf")
