"""Hold which memory a merge changes: wrappers, ties, views; and what it refuses, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from lib.models.peft_models import llama, peft, wrap
from safetensors.torch import save_file
from torch import Tensor, nn

import loratool
from loratool.errors import InputError, UsageError

pytestmark = [pytest.mark.filterwarnings("ignore")]

SHAPE = (24, 16)


class Layers(nn.Module):
    """Two linear layers in a block, as adapters name them."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 24, dtype=dtype) for _ in range(2))
        for seed, layer in enumerate(self.layers):
            layer.weight.data.copy_(weights(*SHAPE, seed=seed))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_peft(tmp_path / "adapter", {"layers.0": factors(*SHAPE, 4), "layers.1": factors(*SHAPE, 4, seed=1)})


@pytest.fixture
def wanted(tmp_path: Path, adapter: Path) -> dict[str, Tensor]:
    """The weights of `Layers` with the adapter, from files."""
    write_model(tmp_path / "base", {n: x.detach() for n, x in Layers().state_dict().items()}, {})
    loratool.merge(tmp_path / "base", adapter, tmp_path / "merged")
    return load_model(tmp_path / "merged")


def state(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {f"layers.{i}.weight": weights(*SHAPE, seed=i).to(dtype) for i in range(2)}


def compiled_inside() -> nn.Module:
    model = Layers()
    model.layers[1] = torch.compile(model.layers[1])  # type: ignore[assignment]
    return model


def checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Layers()
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    return model


def with_lora() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    return peft.get_peft_model(Layers(), config)


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(Layers()),  # type: ignore[dict-item, return-value]
    "a compiled layer": compiled_inside,
    "data parallel": lambda: nn.DataParallel(Layers()),
    "compiled, data parallel": lambda: nn.DataParallel(torch.compile(Layers())),  # type: ignore[arg-type]
    "checkpointed": checkpointed,
    "peft": with_lora,
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_what_is_inside_of_wrappers_changes(
    make: Callable[[], nn.Module], adapter: Path, wanted: dict[str, Tensor]
) -> None:
    model = make()
    before = {name: x.detach().clone() for name, x in model.state_dict().items()}
    with loratool.live.merged(model, adapter) as live:
        changed = [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])]
        ends = {f"layers.{i}.weight" for i in range(2)}
        assert len(changed) == 2
        for i, name in enumerate(changed):
            assert torch.equal(model.state_dict()[name], wanted[f"layers.{i}.weight"])
        assert {row.name for row in live.report.tensors} == ends
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_peft_model_is_found_by_its_own_config(tmp_path: Path) -> None:
    """Around a model of transformers whose head is tied; peft's factors stay."""
    model = wrap(llama(tie_word_embeddings=True), target_modules=["q_proj", "embed_tokens"])
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    factors_before = {n: x.clone() for n, x in model.state_dict().items() if "lora" in n}
    with pytest.raises(InputError, match=r"embed_tokens.weight: .*\n.*tied=\"share\""):
        loratool.live.merge(model, adapter)
    with loratool.live.merged(model, adapter, tied="share") as live:
        inner = model.get_base_model()
        assert inner.lm_head.weight.data_ptr() == inner.model.embed_tokens.base_layer.weight.data_ptr()
        assert len([row for row in live.report.tensors if "embed" in row.name or "head" in row.name]) == 1
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in factors_before.items())


def test_tensors_that_share_all_memory_are_merged_once(adapter: Path, wanted: dict[str, Tensor]) -> None:
    tensors = state()
    tensors["head.weight"] = tensors["layers.0.weight"]
    tensors["other.weight"] = tensors["layers.0.weight"].view(SHAPE)
    loratool.live.merge(tensors, adapter)
    for name in ("layers.0.weight", "head.weight", "other.weight"):
        assert torch.equal(tensors[name], wanted["layers.0.weight"])


@pytest.mark.parametrize("side", ["rows", "columns", "transposed", "steps"])
def test_views_of_other_tensors_are_written_through(side: str, adapter: Path, wanted: dict[str, Tensor]) -> None:
    """Rows or columns of a fused weight, or a weight that is stored the other way round."""
    plain = state()
    if side == "rows":
        fused = torch.cat([*plain.values()])
        views = fused.split(24)
    elif side == "columns":
        fused = torch.cat([*plain.values()], dim=1)
        views = fused.split(16, dim=1)
    elif side == "transposed":
        fused = torch.stack([x.T.contiguous() for x in plain.values()])
        views = tuple(x.T for x in fused)
    else:
        fused = torch.stack([*plain.values()], dim=2)
        views = fused.unbind(2)
    tensors = {"fused": fused, **dict(zip(plain, views, strict=True))}
    before = fused.clone()
    live = loratool.live.merge(tensors, adapter)
    for name in plain:
        assert torch.equal(tensors[name], wanted[name])
    assert not torch.equal(fused, before)
    live.unmerge()
    assert torch.equal(fused, before)


def test_a_stack_that_is_stored_in_another_order(tmp_path: Path) -> None:
    """Runs of its numbers begin and end inside of rows and of matrices."""
    from loratool.live.strided import StridedMemory

    x = torch.arange(60, dtype=torch.int16).reshape(5, 4, 3).permute(2, 0, 1)
    flat, memory = x.reshape(-1).clone(), StridedMemory(x)
    for first, count in ((0, 60), (3, 1), (7, 30), (19, 41), (20, 20), (5, 0)):
        out = torch.empty(count, dtype=torch.int16)
        memory.read(first, out.numpy())
        assert torch.equal(out, flat[first : first + count])
        memory.write(first, out.numpy() + 1)
        flat[first : first + count] += 1
        assert torch.equal(x.reshape(-1), flat)


def test_weights_made_in_inference_mode(adapter: Path, wanted: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        tensors = state()
        live = loratool.live.merge(tensors, adapter)
    assert all(torch.equal(tensors[name], wanted[name]) for name in tensors)
    live.unmerge()
    assert all(torch.equal(tensors[name], x) for name, x in state().items())


def test_autograd_sees_the_change(adapter: Path) -> None:
    """A graph that saved the weight before cannot go backward with another."""
    model = Layers(torch.float32)
    x = torch.ones(2, 16, requires_grad=True)
    loss = model.layers[0](x).square().sum()
    loratool.live.merge(model, adapter)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Coded(nn.Parameter):
    """A weight whose numbers are codes, as those of bitsandbytes and torchao."""


def meta() -> Tensor:
    return torch.empty(SHAPE, dtype=torch.bfloat16, device="meta")


def fake() -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(SHAPE, dtype=torch.bfloat16)


def distributed() -> Tensor:
    """What FSDP makes of a weight, in a group of one rank."""
    from torch.distributed import destroy_process_group, init_process_group, is_initialized
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not is_initialized():
        init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        return distribute_tensor(weights(*SHAPE).bfloat16(), init_device_mesh("cpu", (1,)))
    finally:
        destroy_process_group()


def partitioned() -> Tensor:
    """As DeepSpeed's ZeRO leaves a parameter."""
    x = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    x.ds_id = 3  # type: ignore[attr-defined]
    return x


def flat() -> Tensor:
    x = nn.Parameter(torch.empty(24 * 16, dtype=torch.bfloat16))
    x._is_flat_param = True  # type: ignore[attr-defined]
    return x


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (meta, "is on the meta device"),
    "fake": (fake, "is fake"),
    "dtensor": (distributed, "is a DTensor"),
    "codes": (lambda: Coded(torch.zeros(192, 1, dtype=torch.uint8), requires_grad=False), "is quantized"),
    "torchao": (lambda: Coded(weights(*SHAPE).bfloat16()), "is of the class Coded"),
    "sparse": (lambda: weights(*SHAPE).bfloat16().to_sparse(), "is stored as torch.sparse_coo"),
    "graph": (lambda: nn.Parameter(weights(*SHAPE)) * 2, "that autograd recorded"),
    "shared": (lambda: weights(*SHAPE).bfloat16().share_memory_(), "that other processes share"),
    "expanded": (lambda: weights(1, 16).bfloat16().expand(SHAPE), "is an overlapping view"),
    "windows": (lambda: weights(40).bfloat16().as_strided(SHAPE, (1, 1)), "is an overlapping view"),
    "zero": (partitioned, "is a shard of DeepSpeed's ZeRO"),
    "fsdp": (flat, "is a flat parameter of FSDP"),
}


@pytest.mark.parametrize(("make", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_change_is_named(make: Callable[[], Tensor], says: str, adapter: Path) -> None:
    tensors = state() | {"layers.1.weight": make()}
    before = tensors["layers.0.weight"].clone()
    with pytest.raises(InputError, match=rf"^layers\.1\.weight: .*{says}.*\n."):
        loratool.live.merge(tensors, adapter)
    assert torch.equal(tensors["layers.0.weight"], before)


@pytest.mark.parametrize("name", ["meta", "torchao", "sparse", "graph", "shared", "expanded"])
def test_what_no_adapter_changes_may_be_anything(name: str, adapter: Path) -> None:
    tensors = state() | {"other.weight": REFUSED[name][0]()}
    loratool.live.merge(tensors, adapter).unmerge()


def test_overlaps_are_refused(adapter: Path) -> None:
    buffer = torch.zeros(3 * 24 * 16, dtype=torch.bfloat16)
    first = buffer[: 24 * 16].view(SHAPE)
    half = buffer[24 * 8 : 24 * 24].view(SHAPE)
    with pytest.raises(InputError, match=r"shares memory with .*, and both would change\nexclude"):
        loratool.live.merge({"layers.0.weight": first, "layers.1.weight": half}, adapter)
    with pytest.raises(InputError, match=r"shares a part of its memory with .*, and neither is a view of the other"):
        loratool.live.merge(state() | {"layers.0.weight": first, "other": half}, adapter)
    strided = buffer[: 24 * 32].view(24, 32)
    with pytest.raises(InputError, match="both would change"):
        loratool.live.merge({"layers.0.weight": strided[:, :16], "layers.1.weight": strided[:, 8:24]}, adapter)
    loratool.live.merge({"layers.0.weight": strided[:, :16], "layers.1.weight": strided[:, 16:]}, adapter)


def test_what_would_need_another_tensor_is_refused(tmp_path: Path) -> None:
    """A vocabulary of other rows, and a tensor that the model lacks."""
    model = llama(vocab_size=24).to(torch.bfloat16)
    saved = ["embed_tokens", "lm_head", "score"]
    modules = {"model.layers.0.self_attn.q_proj": factors(16, 16, 4)}
    adapter = write_peft(tmp_path / "adapter", modules, modules_to_save=saved)
    own, prefix = load_model(adapter), "base_model.model."
    vocabulary = {f"{prefix}{name}.weight": weights(20, 16) for name in ("model.embed_tokens", "lm_head")}
    for more, says in (
        (vocabulary, "would become BF16 .*; it is BF16"),
        ({f"{prefix}score.weight": weights(2, 16)}, "is not in the model, and would be added"),
    ):
        save_file(own | more, adapter / "adapter_model.safetensors")
        with pytest.raises(InputError, match=rf": {says}.*\n.*loratool.merge"):
            loratool.live.merge(model, adapter)


def test_scaled_codes_are_refused(tmp_path: Path, adapter: Path) -> None:
    tensors = {f"layers.{i}.weight": weights(*SHAPE).to(torch.float8_e4m3fn) for i in range(2)}
    tensors |= {f"layers.{i}.weight_scale": torch.ones(24, 1) for i in range(2)}
    with pytest.raises(InputError, match=r"layers\.0\.weight: is (stored as codes|quantized)"):
        loratool.live.merge(tensors, adapter)


@pytest.mark.parametrize("model", [None, 3, {}, {"x": 3}, [torch.zeros(2)], "base"])
def test_what_is_no_model_is_refused(model: Any, adapter: Path) -> None:
    with pytest.raises(UsageError, match="^model: .* is not a module, or a mapping from names to tensors"):
        loratool.live.merge(model, adapter)
