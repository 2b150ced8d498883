"""--drop leaves out kinds of things, and says so: what remains is, byte for byte, what a file without them gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, only_families, weights, write_model, write_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.adapters.formats import open_adapter
from loratool.architectures.components import WEIGHED
from loratool.commands.choices import DROP_CHOICES, MODEL_DROP_CHOICES
from loratool.commands.convert.checkpoint import DROPPED

TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
K_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"
OF_BASE = {
    TO_Q: "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
    K_PROJ: "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight",
}
EXTRAS = {
    "<s1>": torch.ones(8),
    "bundle_emb.cat.string_to_param.*": torch.ones(2, 8),
    "bundle_emb.cat.clip_g_out": torch.ones(2, 12),
    "emb_params": torch.full((1, 8), torch.nan),  # nobody reads it
    "clip_l": torch.ones(2, 8),
    "t5xxl": torch.ones(2, 16),
}


def kohya() -> dict[str, Tensor]:
    found = {}
    for seed, module in enumerate((TO_Q, K_PROJ)):
        component, _, path = module.partition(".")
        name = {"unet": "lora_unet_", "text_encoder": "lora_te1_"}[component] + path.replace(".", "_")
        A, B = factors(8, 8, 2, seed)
        found |= {f"{name}.lora_up.weight": B, f"{name}.lora_down.weight": A, f"{name}.alpha": torch.tensor(1.0)}
    return found


def diffusers() -> dict[str, Tensor]:
    found = {}
    for seed, module in enumerate((TO_Q, K_PROJ)):
        A, B = factors(8, 8, 2, seed)
        found |= {f"{module}.lora_B.weight": B, f"{module}.lora_A.weight": A}
    return found


def bare() -> dict[str, Tensor]:
    A, B = factors(8, 8, 2)
    module = TO_Q.removeprefix("unet.")
    return {f"{module}.lora_up.weight": B, f"{module}.lora_down.weight": A, f"{module}.alpha": torch.tensor(2.0)}


FILES: dict[str, Callable[[], dict[str, Tensor]]] = {"kohya": kohya, "diffusers": diffusers, "bare": bare}


def pair(folder: Path, tensors: Mapping[str, Tensor], extras: Mapping[str, Tensor] = EXTRAS) -> tuple[Path, Path]:
    """Write a file without extras and one of the same name with them."""
    plain, full = folder / "plain" / "a.safetensors", folder / "full" / "a.safetensors"
    for file, content in ((plain, tensors), (full, {**extras, **tensors})):
        file.parent.mkdir()
        save_file(dict(content), file, {"format": "pt"})
    return plain, full


@pytest.fixture
def of_sdxl() -> Iterator[None]:
    """Know no other family, which has these few modules too."""
    with only_families("sdxl"):
        yield


def sdxl(folder: Path) -> Path:
    shapes = {
        **dict.fromkeys(OF_BASE.values(), (8, 8)),
        "model.diffusion_model.input_blocks.3.0.op.weight": (8, 8, 3, 3),
    }
    file = folder / "sdxl.safetensors"
    generator = torch.Generator().manual_seed(7)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, file)
    return file


@pytest.mark.usefixtures("of_sdxl")
@pytest.mark.parametrize("form", FILES)
def test_what_is_written_is_that_of_a_file_without_extras(form: str, tmp_path: Path) -> None:
    plain, full = pair(tmp_path, FILES[form]())
    verbs: dict[str, Callable[[Path, Path, Any], Any]] = {
        "convert": lambda a, out, drop: loratool.convert(a, out, to="kohya", drop=drop),
        "resize": lambda a, out, drop: loratool.resize(a, out, rank=1, drop=drop),
        "combine": lambda a, out, drop: loratool.combine([(a, 0.5)], out, drop=drop),
    }
    for verb, call in verbs.items():
        outs = [tmp_path / f"{verb}-{file.parent.name}.safetensors" for file in (plain, full)]
        call(plain, outs[0], ())
        with pytest.raises(NeedsFlag, match=r'(?s)full/a.safetensors: holds token embeddings.*add drop="extras"'):
            call(full, outs[1], ())
        assert not outs[1].exists()
        report = call(full, outs[1], ["extras"])
        assert outs[0].read_bytes() == outs[1].read_bytes(), verb
        left_out = report.dropped if verb == "convert" else report.left_out
        assert sorted(left_out) == sorted(EXTRAS)
    compared = loratool.diff(plain, full, drop=["extras"])
    assert compared.same and sorted(compared.left_out) == sorted(EXTRAS)  # type: ignore[union-attr]
    with pytest.raises(NeedsFlag, match='drop="extras"'):
        loratool.diff(plain, full)


def test_a_merge_without_extras_and_back(tmp_path: Path, run: Any) -> None:
    plain, full = pair(tmp_path, kohya())
    base, merged, back = sdxl(tmp_path), tmp_path / "merged.safetensors", tmp_path / "back.safetensors"
    loratool.merge(base, plain, tmp_path / "plain.safetensors", undo=False)
    refused = run("merge", base, full, "-o", merged)
    assert refused.exit_code == 4 and "add --drop extras to exclude them" in refused.stderr and not merged.exists()
    done = run("merge", base, full, "-o", merged, "--drop", "extras")
    assert done.exit_code == 0 and "excluded: emb_params\n" in done.stdout
    one, two = load_file(merged), load_file(tmp_path / "plain.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert run("verify", base, full, merged).exit_code == 4
    proven = run("verify", base, full, merged, "--drop", "extras")
    assert proven.exit_code == 0 and "excluded: clip_l\n" in proven.stdout
    assert run("unmerge", merged, full, "-o", back).exit_code == 4
    assert run("unmerge", merged, full, "-o", back, "--drop", "extras").exit_code == 0
    assert back.read_bytes() == base.read_bytes()


def test_inspect_lists_extras(tmp_path: Path, run: Any) -> None:
    plain, full = pair(tmp_path, kohya())
    shown = run("inspect", full)
    assert shown.exit_code == 0
    mark = "beside the weights (--drop extras): "
    told = [line for line in run("inspect", full, "-v").stdout.splitlines() if line.startswith(mark)]
    assert {line.removeprefix(mark) for line in told} == set(EXTRAS)
    assert 1 <= sum(line.startswith(mark) for line in shown.stdout.splitlines()) <= 4
    one, two = (json.loads(run("inspect", file, "--json").stdout)["report"] for file in (plain, full))
    assert sorted(two.pop("extras")) == sorted(EXTRAS) and one.pop("extras") == []
    own = {"path": "", "sha256": {}}
    assert one | own == two | own


def test_pefts_files_and_names_that_metadata_marks(tmp_path: Path) -> None:
    """With PEFT any other name is a tensor that replaces the base's."""
    adapter = write_peft(tmp_path / "a", {"x": factors(6, 4, 2)})
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "emb_params": torch.ones(3)}, file, {"format": "pt"})
    found = open_adapter(adapter)
    assert found.extras == ("emb_params",) and list(found.updates) == ["x"]
    found.file.close()
    save_file({**kohya(), "sks": torch.ones(3)}, tmp_path / "b.safetensors", {"sks": "<embed>"})
    found = open_adapter(tmp_path / "b.safetensors")
    assert found.extras == ("sks",) and len(found.updates) == 2
    found.file.close()


@pytest.mark.parametrize("name", ["sks", "clip_l.weight", "lora_unet_x.emb_params", "x.<s1>", "bundle_emb", "clip_x"])
def test_what_could_mean_something_for_a_module_stays_refused(name: str, tmp_path: Path) -> None:
    save_file({**kohya(), name: torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError):
        open_adapter(tmp_path / "a.safetensors")


def test_embeddings_alone_are_no_adapter(tmp_path: Path, run: Any) -> None:
    save_file({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 12)}, tmp_path / "e.safetensors")
    shown = run("inspect", tmp_path / "e.safetensors")
    assert shown.exit_code == 0 and "textual inversion), which adds inputs, and no weight could hold" in shown.stdout
    with pytest.raises(InputError, match="holds only embeddings of tokens"):
        loratool.merge(sdxl(tmp_path), tmp_path / "e.safetensors", tmp_path / "out", drop=["extras"])


@pytest.mark.parametrize(("word", "kept"), [("te1", TO_Q), ("te", TO_Q), ("unet", K_PROJ)])
def test_a_component_is_left_out(word: str, kept: str, tmp_path: Path) -> None:
    for make in (kohya, diffusers):
        folder = tmp_path / make.__name__
        folder.mkdir()
        adapter, base, merged = folder / "a.safetensors", sdxl(folder), folder / "merged.safetensors"
        save_file(make(), adapter)
        report = loratool.merge(base, adapter, merged, drop=[word])
        assert [row.name for row in report.tensors] == [OF_BASE[kept]] and len(report.left_out) == 1
        assert json.loads(_metadata(merged)["loratool"])["left_out"] == list(report.left_out)
        assert loratool.verify(base, adapter, merged, drop=[word]).status == "proven"
        with pytest.raises(InputError, match="drop differs"):
            loratool.unmerge(merged, adapter, folder / "back.safetensors")
        loratool.unmerge(merged, adapter, folder / "back.safetensors", drop=[word])
        assert (folder / "back.safetensors").read_bytes() == base.read_bytes()
        converted = loratool.convert(adapter, folder / "c.safetensors", to="comfy", drop=[word])
        assert len(converted.modules) == 1 and converted.dropped == report.left_out
        resized = loratool.resize(adapter, folder / "r.safetensors", rank=1, drop=[word])
        assert len(load_file(folder / "r.safetensors")) == len(make()) // 2 and resized.left_out == report.left_out
        combined = loratool.combine([adapter], folder / "d.safetensors", drop=[word])
        assert len(combined.modules) == 1 and combined.left_out == report.left_out
        compared = loratool.diff(adapter, folder / "d.safetensors", drop=[word])
        assert compared.same and len(compared.modules) == 1


def test_a_component_of_a_file_that_is_copied(tmp_path: Path) -> None:
    """PEFT's own files go to PEFT's without a look into the modules."""
    adapter = write_peft(tmp_path / "a", {"unet.x": factors(6, 4, 2), "text_encoder.y": factors(6, 4, 2)})
    report = loratool.convert(adapter, tmp_path / "out", to="peft", drop=["te1"])
    assert report.dropped == ("text_encoder.y",) and len(report.modules) == 1
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(found) == 2 and all(".unet.x." in name for name in found)


def _metadata(file: Path) -> dict[str, str]:
    data = file.read_bytes()
    found: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return found


def test_what_is_not_there_cannot_be_dropped(tmp_path: Path, run: Any) -> None:
    adapter, base = tmp_path / "a.safetensors", sdxl(tmp_path)
    save_file(kohya(), adapter)
    with pytest.raises(InputError, match=r'(?s)drop="te2": matches no module of .*a.safetensors.*modules of unet, te1'):
        loratool.resize(adapter, tmp_path / "r.safetensors", rank=1, drop=["te2"])
    with pytest.raises(InputError, match="has nothing left after drop"):
        loratool.merge(base, adapter, tmp_path / "m.safetensors", drop=["unet", "te"])
    for word in ("ema", "te5"):
        with pytest.raises(UsageError, match=f'drop="{word}" is none of extras, unet'):
            loratool.convert(adapter, tmp_path / "c.safetensors", to="comfy", drop=[word])
    with pytest.raises(UsageError, match='drop="extras" is none of ema, optimizer'):
        loratool.convert_model(base, tmp_path / "c.safetensors", drop=["extras"])
    with pytest.raises(UsageError, match="drop and alpha are for adapters"):
        loratool.diff(base, base, drop=["extras"])
    assert run("merge", base, adapter, "--drop", "te5").exit_code == 2
    loratool.resize(adapter, tmp_path / "r.safetensors", rank=1, drop=["extras"])  # none are there, as is wished


def test_one_of_several_adapters_may_lack_a_component(tmp_path: Path) -> None:
    base, names = sdxl(tmp_path), [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(kohya(), names[0])
    save_file({k: v for k, v in kohya().items() if k.startswith("lora_unet")}, names[1])
    report = loratool.merge(base, names, tmp_path / "m.safetensors", drop=["te1"])
    assert [a.modules for a in report.adapters] == [1, 1] and len(report.left_out) == 1


def test_the_words_are_those_of_the_tables() -> None:
    assert DROP_CHOICES.keys() == {"extras", *WEIGHED} and MODEL_DROP_CHOICES.keys() == DROPPED.keys()


WEIGHTS = {"model.diffusion_model.x.weight": torch.ones(4, 3), "model.diffusion_model.y.bias": torch.arange(5.0)}
EMA = {"model_ema.diffusion_modelxweight": torch.full((4, 3), 2.0), "model_ema.decay": torch.tensor(0.5)}


class TestOfACheckpoint:
    @pytest.mark.parametrize("dtype", ["keep", "bf16"])
    @pytest.mark.parametrize("to", ["safetensors", "torch"])
    def test_ema(self, to: Any, dtype: str, tmp_path: Path) -> None:
        plain, full = pair(tmp_path, WEIGHTS, EMA)
        outs = [tmp_path / f"{file.parent.name}.{'bin' if to == 'torch' else 'safetensors'}" for file in (plain, full)]
        kept = loratool.convert_model(full, tmp_path / f"kept{outs[0].suffix}", to=to, dtype=dtype)
        assert kept.copied + len(kept.cast) == 4 and not kept.left_out
        loratool.convert_model(plain, outs[0], to=to, dtype=dtype)
        report = loratool.convert_model(full, outs[1], to=to, dtype=dtype, drop=["ema"])
        assert outs[0].read_bytes() == outs[1].read_bytes() and sorted(report.left_out) == sorted(EMA)
        with pytest.raises(InputError, match="has nothing left after drop"):
            save_file(EMA, tmp_path / "ema.safetensors")
            loratool.convert_model(tmp_path / "ema.safetensors", tmp_path / "no.safetensors", drop=["ema"])

    def test_in_shards(self, tmp_path: Path) -> None:
        for name, extra in (("plain", {}), ("full", EMA)):
            write_model(tmp_path / name, {**WEIGHTS, **extra})
            report = loratool.convert_model(tmp_path / name, tmp_path / f"{name}-out", max_shard_size=50, drop=["ema"])
            assert sorted(report.left_out) == sorted(extra)
        one, two = ({p.name: p.read_bytes() for p in (tmp_path / f"{n}-out").iterdir()} for n in ("plain", "full"))
        assert one == two and load_model(tmp_path / "full-out").keys() == WEIGHTS.keys()

    def test_a_storage_that_both_share(self, tmp_path: Path) -> None:
        shared = torch.ones(4, 3)
        torch.save({"model_ema.a": shared, "z.weight": shared}, tmp_path / "x.bin")
        loratool.convert_model(tmp_path / "x.bin", tmp_path / "x.safetensors", drop=["ema"])
        found = load_file(tmp_path / "x.safetensors")
        assert list(found) == ["z.weight"] and torch.equal(found["z.weight"], shared)

    def test_what_a_torch_file_has_beside_its_weights(self, tmp_path: Path, run: Any) -> None:
        """It is read in no case: --drop says that this is known, and the rest is still warned of."""
        torch.save(
            {"state_dict": WEIGHTS, "optimizer_states": [EMA], "params_ema": EMA, "epoch": 3},
            tmp_path / "x.ckpt",
        )
        plain = run("convert", tmp_path / "x.ckpt", "-o", tmp_path / "a.safetensors")
        assert plain.exit_code == 0 and "also holds optimizer_states, params_ema, epoch, which" in plain.stderr
        flags = ("--drop", "optimizer", "--drop", "ema")
        known = run("convert", tmp_path / "x.ckpt", "-o", tmp_path / "b.safetensors", *flags)
        assert known.exit_code == 0 and "also holds epoch, which is not read" in known.stderr
        assert "excluded: optimizer_states\nexcluded: params_ema\n" in known.stdout
        together = run("convert", tmp_path / "x.ckpt", "-o", tmp_path / "c.safetensors", "--drop", "ema,optimizer")
        assert together.exit_code == 0 and together.stderr == known.stderr
        assert len({(tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"}) == 1
        wrong = run("convert", tmp_path / "x.ckpt", "-o", tmp_path / "d.safetensors", "--drop", "ema,optimiser")
        assert wrong.exit_code == 2 and "'optimiser' is not one of" in wrong.stderr

    def test_a_checkpoint_of_stable_diffusion_in_training(self, tmp_path: Path) -> None:
        """Names as LDM's `LitEma` writes them, and what Lightning has beside the weights."""
        W = {"model.diffusion_model.input_blocks.0.0.weight": weights(4, 4), "first_stage_model.decoder.x": weights(3)}
        means = {
            "model_ema.diffusion_modelinput_blocks00weight": weights(4, 4),
            "model_ema.decay": torch.tensor(0.9999),
        }
        means["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
        step = {"exp_avg": weights(4, 4), "step": torch.tensor(7.0)}
        beside = {
            "epoch": 1, "global_step": 7, "pytorch-lightning_version": "1.4.2", "callbacks": {"x": {"best": 0.1}},
            "optimizer_states": [{"state": {0: step}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}],
            "lr_schedulers": [{"base_lrs": [1e-4], "lr_lambdas": [None]}],
        }  # fmt: skip
        torch.save({"state_dict": {**W, **means}, **beside}, tmp_path / "x.ckpt")
        out = tmp_path / "x.safetensors"
        report = loratool.convert_model(tmp_path / "x.ckpt", out, drop=["ema", "optimizer"], dtype="fp16")
        found = load_file(out)
        assert found.keys() == W.keys() and all(torch.equal(found[name], x.half()) for name, x in W.items())
        assert set(report.left_out) == {*means, "optimizer_states"}
        (line,) = report.warnings
        assert "epoch, global_step, pytorch-lightning_version, callbacks, lr_schedulers, which is not read" in line
