"""Merge each kind of LyCORIS and PEFT and take it back: bits by `dense_oracle.py`, in every container and type.

What is refused says why and what to do instead.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few
from lib.files.lycoris_files import (
    CONTAINERS,
    KINDS,
    PEFT_KINDS,
    PEFT_REFUSED,
    REFUSED,
    SHAPES,
    Base,
    Numbers,
    Peft,
    Roles,
    base_of,
    diff_alone,
    peft_of,
    roles_of,
    write_lycoris,
)
from lib.oracles.dense_oracle import lycoris_updates, merged_codes, peft_updates
from lib.oracles.fractions_oracle import Add, Update, codes, count_wrong, finite_reals, merge_codes
from lib.oracles.mixed_oracle import told
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# the word of a kind in reports, by the first word of a test's kind
WORDS = {
    "lora": "lora",
    "rs-lora": "lora",
    "lora_mid": "tucker",
    "glora": "lycoris_glora",
    "diag-oft": "oft_blocks",
    "boft": "oft_blocks",
    "loha": "loha",
    "lokr": "lokr",
    "full": "diff",
    "diff": "diff",
    "norm": "diff",
    "ia3": "ia3",
    "dora": "dora",
    "adalora": "adalora",
    "vera": "vera",
    "miss": "miss",
    "bone": "bone",
    "gralora": "gralora",
    "c3a": "c3a",
    "pvera": "pvera",
    "randlora": "randlora",
    "shira": "shira",
    "supertuning": "supertuning",
    "unilora": "unilora",
    "tinylora": "tinylora",
    "vblora": "vblora",
    "delora": "delora",
    "beft": "beft",
    "fourierft": "fourierft",
    "waveft": "waveft",
}
# and by all words, where the first is another program's too
WORDS_OF_ALL = {"glora added": "lora", "glora added conv": "lora", "miss bat": "bat", "bone bat": "bat"}
WORDS_OF_PEFT = {each: each for each in ("oft", "boft", "road", "hra", "hira", "glora", "deft", "peanut")}


def id_of(value: object) -> str | None:
    if isinstance(value, tuple):
        return "-".join(NAMES[each] for each in value if each)
    return NAMES[value] if isinstance(value, torch.dtype) else None


def check(
    folder: Path, base: Base, adapters: Any, updates: Sequence[Mapping[str, Update]], out: torch.dtype | None = None
) -> None:
    """Merge, hold the bits against the fractions, verify, and unmerge where the type was kept."""
    model, merged = base.write(folder / "base.safetensors"), folder / "merged.safetensors"
    loratool.merge(model, adapters, merged, dtype=NAMES[out] if out else "keep", undo=out is None)
    found = load_file(merged)
    for end, tensor in (("weight", base.weight), ("bias", base.bias)):
        changes = [told(each[end], base.weight) for each in updates if end in each]
        wanted = merge_codes(tensor, out or base.dtype, changes)
        name = f"{base.path}.{end}"
        assert wanted is not None and count_wrong(found[name], wanted) == 0, name
        assert not changes or wanted != codes(tensor.to(out or base.dtype))  # it does something
    report = loratool.verify(model, adapters, merged)
    assert (report.status, report.wrong) == ("proven", 0)
    assert out or report.rounded == 0  # another type counts as a rounding
    if out is None:
        loratool.unmerge(merged, adapters, folder / "back.safetensors")
        assert (folder / "back.safetensors").read_bytes() == model.read_bytes()


def check_lycoris(folder: Path, kind: str, container: str, dtypes: tuple[Any, Any, Any], weight: float) -> None:
    """dtypes: of the base, the adapter and the output, None for the base's."""
    base, roles = base_of(KINDS[kind][0], dtypes[0]), roles_of(kind, dtypes[1])
    file = write_lycoris(folder / "adapter.safetensors", {base.path: roles}, container)
    check(folder, base, (file, weight), [lycoris_updates(roles, SHAPES[base.layer], weight)], dtypes[2])


def check_peft(folder: Path, kind: str, dtypes: tuple[Any, Any, Any], weight: float) -> None:
    adapter = peft_of(kind, dtypes[1])
    base = base_of(adapter.layer, dtypes[0])
    updates = peft_updates(adapter, SHAPES[base.layer], weight)
    check(folder, base, (adapter.write(folder / "adapter"), weight), [updates], dtypes[2])


# kind, container, (types of base, adapter and output), weight
SOME = [
    ("lora", "kohya", (BF16, BF16, None), 1.0),
    ("lora_mid", "bare", (FP16, FP32, None), 0.7),
    ("loha", "lycoris", (BF16, FP16, None), 1.0),
    ("loha tucker", "kohya", (FP32, BF16, None), -0.5),
    ("lokr full", "dotted", (BF16, FP32, None), 1.0),
    ("lokr w1", "bare", (FP16, FP16, None), 0.7),
    ("lokr both", "lycoris", (FP32, FP32, None), 1.0),
    ("lokr tucker", "kohya", (BF16, BF16, FP16), 1.0),
    ("full", "lycoris", (BF16, FP32, None), 0.7),
    ("norm", "kohya", (FP16, BF16, None), 1.0),
    ("ia3 in", "lycoris", (BF16, BF16, None), 1.0),
    ("ia3 conv out", "kohya", (FP32, FP16, None), -0.5),
    ("dora loha", "kohya", (BF16, FP32, None), 1.0),
    ("dora lokr tucker in", "lycoris", (FP32, BF16, None), 0.7),
    ("glora added", "dotted", (BF16, FP16, None), 1.0),
    ("glora", "kohya", (BF16, FP32, None), 0.7),
    ("glora conv", "lycoris", (FP32, BF16, None), 1.0),
    ("diag-oft", "lycoris", (BF16, FP32, None), 1.0),
    ("diag-oft bound", "bare", (FP32, FP32, None), 0.7),
    ("diag-oft conv", "kohya", (FP16, BF16, None), -0.5),
    ("boft", "dotted", (BF16, BF16, None), 1.0),
]
SOME_PEFT = [
    ("loha", (BF16, FP32, None), 1.0),
    ("lokr full", (FP16, BF16, None), 0.7),
    ("ia3", (BF16, FP32, None), 1.0),
    ("ia3 feedforward", (FP32, FP16, None), -0.5),
    ("adalora pruned", (BF16, FP32, None), 1.0),
    ("vera", (BF16, FP32, None), 0.7),
    ("miss", (BF16, FP32, None), 1.0),
    ("miss remainder", (FP32, BF16, None), 0.7),
    ("miss mini", (FP16, FP32, None), -0.5),
    ("bone", (BF16, BF16, None), 1.0),
    ("gralora hybrid", (BF16, FP32, None), 0.7),
    ("c3a", (BF16, FP32, None), -0.5),
    ("pvera", (FP16, FP32, None), 1.0),
    ("shira", (BF16, BF16, None), 1.0),
    ("shira twice", (FP16, FP32, None), 0.7),
    ("supertuning", (FP32, FP32, None), -0.5),
    ("supertuning lora", (BF16, FP32, None), 1.0),
    ("randlora", (BF16, FP32, None), 0.7),
    ("randlora wide", (FP32, FP32, None), 1.0),
    ("unilora", (BF16, FP32, None), 1.0),
    ("tinylora", (FP32, FP32, None), 0.7),
    ("vblora", (BF16, FP32, None), -0.5),
    ("vblora logits", (BF16, FP32, None), 1.0),
    ("delora", (FP32, BF16, None), 1.0),
    ("beft", (BF16, FP32, None), 0.7),
    ("oft", (BF16, FP32, None), 1.0),
    ("oft shared", (FP32, BF16, None), 0.7),
    ("oft conv", (FP16, FP32, None), 1.0),
    ("oft 0.15", (BF16, FP32, None), -0.5),
    ("oft 0.13", (BF16, BF16, None), 1.0),
    ("boft factors", (BF16, FP32, None), 1.0),
    ("miss bat", (BF16, FP32, None), 0.7),
    ("road", (BF16, FP32, None), 1.0),
    ("hra", (BF16, FP32, None), 1.0),
    ("hira", (BF16, FP32, None), 0.7),
    ("glora", (BF16, FP32, None), 1.0),
    ("glora constant", (FP32, FP16, None), -0.5),
    ("glora weighed", (BF16, FP32, None), 0.7),
    ("glora weighed vector", (FP32, FP16, None), -0.5),
    ("deft", (BF16, FP32, None), 0.7),
    ("peanut deep", (BF16, FP32, None), 1.0),
    ("fourierft", (BF16, FP32, None), 1.0),
    ("fourierft even", (FP32, BF16, None), 0.7),
    ("waveft", (BF16, FP32, None), 0.7),
    ("waveft longer", (FP16, FP32, None), 1.0),
    ("waveft plain", (FP32, BF16, None), -0.5),
]
TYPES = [(BF16, FP32, None), (FP16, BF16, None), (FP32, FP16, None), (FP32, FP32, BF16), (BF16, BF16, FP32)]
WEIGHTS = itertools.cycle([1.0, 0.7, -0.5, 1.0, 2.0, 1 / 3, 1.0])  # none of the lengths that it is zipped with
EVERY = [(kind, container, dtypes, next(WEIGHTS)) for kind in KINDS for container in CONTAINERS for dtypes in TYPES]
EVERY_PEFT = [(kind, dtypes, next(WEIGHTS)) for kind in PEFT_KINDS for dtypes in TYPES]


@pytest.mark.parametrize(("kind", "container", "dtypes", "weight"), SOME, ids=id_of)
def test_lycoris(tmp_path: Path, kind: str, container: str, dtypes: Any, weight: float) -> None:
    check_lycoris(tmp_path, kind, container, dtypes, weight)


@pytest.mark.parametrize(("kind", "dtypes", "weight"), SOME_PEFT, ids=id_of)
def test_peft(tmp_path: Path, kind: str, dtypes: Any, weight: float) -> None:
    check_peft(tmp_path, kind, dtypes, weight)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "container", "dtypes", "weight"), EVERY, ids=id_of)
def test_every_kind_of_lycoris(tmp_path: Path, kind: str, container: str, dtypes: Any, weight: float) -> None:
    check_lycoris(tmp_path, kind, container, dtypes, weight)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtypes", "weight"), EVERY_PEFT, ids=id_of)
def test_every_kind_of_peft(tmp_path: Path, kind: str, dtypes: Any, weight: float) -> None:
    check_peft(tmp_path, kind, dtypes, weight)


class TestSeveral:
    """Additive updates of one weight are summed before the rounding; others do not add up."""

    def test_kinds_that_add(self, tmp_path: Path) -> None:
        base, weights = base_of("linear", BF16), {"loha": 0.7, "lokr both": 1.0, "full": -0.5, "lora": 1 / 3}
        made = {kind: roles_of(kind, FP32, seed=i) for i, kind in enumerate(weights)}
        adapters = [
            (write_lycoris(tmp_path / f"{i}.safetensors", {base.path: roles}, "kohya"), weights[kind])
            for i, (kind, roles) in enumerate(made.items())
        ]
        updates = [lycoris_updates(roles, SHAPES["linear"], weights[kind]) for kind, roles in made.items()]
        check(tmp_path, base, adapters, updates)

    @pytest.mark.parametrize("kind", few(["loha", "lokr both", "full"], "loha"))
    def test_one_that_adds_and_one_that_multiplies(self, tmp_path: Path, kind: str) -> None:
        """Both are of W, so that the multiplied part has nothing of the other's change."""
        base, made = base_of("linear", FP32), [roles_of(kind, FP32), roles_of("ia3 in", FP32)]
        adapters = [
            (write_lycoris(tmp_path / f"{i}.safetensors", {base.path: roles}, "lycoris"), weight)
            for i, (roles, weight) in enumerate(zip(made, (0.7, 1.0), strict=True))
        ]
        updates = [
            lycoris_updates(roles, SHAPES["linear"], weight) for roles, weight in zip(made, (0.7, 1.0), strict=True)
        ]
        check(tmp_path, base, adapters, updates)

    @pytest.mark.parametrize("kinds", [("ia3 in", "ia3 out"), ("dora loha", "ia3 in"), ("dora", "dora lokr")])
    def test_two_that_multiply_are_refused(self, tmp_path: Path, kinds: tuple[str, str]) -> None:
        base = base_of("linear", FP32)
        adapters = [
            write_lycoris(tmp_path / f"{i}.safetensors", {base.path: roles_of(kind, FP32)}, "lycoris")
            for i, kind in enumerate(kinds)
        ]
        with pytest.raises(InputError, match="do not add up"):
            loratool.merge(base.write(tmp_path / "base.safetensors"), adapters, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    def test_one_file_of_many_kinds(self, tmp_path: Path) -> None:
        """A module for each kind, as LyCORIS's presets mix them."""
        tensors, modules, wanted = {}, {}, {}
        for i, (kind, (layer, _)) in enumerate(KINDS.items()):
            base, roles = base_of(layer, BF16, seed=i), roles_of(kind, FP16, seed=i)
            found = merged_codes(base, lycoris_updates(roles, SHAPES[layer]))
            for end, tensor in (("weight", base.weight), ("bias", base.bias)):
                tensors[f"blocks.{i}.{layer}.{end}"] = tensor
                wanted[f"blocks.{i}.{layer}.{end}"] = found[f"{base.path}.{end}"]
            modules[f"blocks.{i}.{layer}"] = roles
        save_file(tensors, tmp_path / "base.safetensors")
        adapter = write_lycoris(tmp_path / "adapter.safetensors", modules, "kohya")
        loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
        merged = load_file(tmp_path / "out.safetensors")
        assert [name for name, tensor in merged.items() if count_wrong(tensor, wanted[name])] == []
        loratool.unmerge(tmp_path / "out.safetensors", adapter, tmp_path / "back.safetensors")
        assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


class TestScales:
    @pytest.mark.parametrize("alpha", [None, 0.0])
    @pytest.mark.parametrize("kind", few(["loha", "lokr both", "lokr tucker", "lora_mid", "dora lokr"], "loha"))
    def test_no_alpha_is_the_rank(self, tmp_path: Path, kind: str, alpha: float | None) -> None:
        base, roles = base_of(KINDS[kind][0], FP32), roles_of(kind, FP32)
        roles = {role: tensor for role, tensor in roles.items() if role != "alpha"}
        if alpha is not None:
            roles["alpha"] = torch.tensor(alpha)
        file = write_lycoris(tmp_path / "adapter.safetensors", {base.path: roles}, "kohya")
        check(tmp_path, base, file, [lycoris_updates(roles, SHAPES[base.layer])])

    @pytest.mark.parametrize("alpha", few([1.0, 16.0, 1e10], 16.0))
    @pytest.mark.parametrize("kind", few(["lokr full", "lokr conv full"], "lokr full"))
    def test_lycoris_has_none_with_both_matrices_whole(self, tmp_path: Path, kind: str, alpha: float) -> None:
        base, roles = base_of(KINDS[kind][0], FP32), {**roles_of(kind, FP32), "alpha": torch.tensor(alpha)}
        file = write_lycoris(tmp_path / "adapter.safetensors", {base.path: roles}, "kohya")
        check(tmp_path, base, file, [lycoris_updates({**roles, "alpha": torch.tensor(1.0)}, SHAPES[base.layer])])

    @pytest.mark.parametrize("ranks", [(2, 3), (3, 2)])
    def test_factors_that_disagree_are_refused(self, tmp_path: Path, ranks: tuple[int, int]) -> None:
        """LyCORIS takes that of w1 for the scale, ComfyUI that of w2; neither writes such a file."""
        n, base = Numbers(FP32), base_of("linear", FP32)
        roles = {
            "lokr_w1_a": n(5, ranks[0]),
            "lokr_w1_b": n(ranks[0], 2),
            "lokr_w2_a": n(5, ranks[1]),
            "lokr_w2_b": n(ranks[1], 3),
            "alpha": n.number(1.0),
        }
        file = write_lycoris(tmp_path / "adapter.safetensors", {base.path: roles}, "kohya")
        with pytest.raises(InputError, match="rank"):
            loratool.merge(base.write(tmp_path / "base.safetensors"), file, tmp_path / "out.safetensors")


class TestHardNumbers:
    """Sums on and beside midpoints, signs of zero, and what cancels."""

    @pytest.mark.parametrize("weight", few([1.0, 0.5], 0.5))
    @pytest.mark.parametrize("dtype", few([BF16, FP16], BF16), ids=id_of)
    def test_ties_of_a_difference(self, tmp_path: Path, dtype: torch.dtype, weight: float) -> None:
        """Half a step of W's, and the same with a bit beside it."""
        base, generator = base_of("linear", dtype), torch.Generator().manual_seed(0)
        step = (
            torch.nextafter(base.weight.abs(), torch.tensor(torch.inf, dtype=dtype)).float() - base.weight.abs().float()
        )
        near = torch.randint(-1, 2, base.weight.shape, generator=generator) * 2.0**-20
        roles = {"diff": step * (0.5 + near) / weight}
        file = write_lycoris(tmp_path / "adapter.safetensors", {base.path: roles}, "lycoris")
        check(tmp_path, base, (file, weight), [lycoris_updates(roles, SHAPES["linear"], weight)])

    @pytest.mark.parametrize("dtype", few([BF16, FP32], BF16), ids=id_of)
    def test_ties_of_a_product_of_products(self, tmp_path: Path, dtype: torch.dtype) -> None:
        """LoHa and LoKr of small integers, with a last bit that only an exact sum sees, beside W on a grid."""
        g = torch.Generator().manual_seed(1)
        unit = float(torch.finfo(dtype).eps) / 2

        def integers(*shape: int) -> torch.Tensor:
            return torch.randint(-3, 4, shape, generator=g).float()

        W = (1 + torch.randint(0, 100, SHAPES["linear"], generator=g) * unit * 2).to(dtype)
        base = Base("linear", dtype, W, W[:, 0].clone())
        ones = {"hada_w2_a": torch.ones(25, 1), "hada_w2_b": torch.ones(1, 6)}
        tiny = torch.tensor([[1.0], [2.0**-30]])
        loha: Roles = {
            "hada_w1_a": torch.cat([integers(25, 1) * unit, integers(25, 1) * unit], 1),
            "hada_w1_b": integers(2, 6) * tiny,
            "hada_w2_a": torch.cat([ones["hada_w2_a"]] * 2, 1) * 0.5,
            "hada_w2_b": torch.cat([ones["hada_w2_b"]] * 2),
        }
        lokr: Roles = {"lokr_w1": integers(5, 2) * unit, "lokr_w2": integers(5, 3) * (1 + 2.0**-20)}
        for roles in (loha, lokr):
            folder = tmp_path / next(iter(roles))
            folder.mkdir()
            file = write_lycoris(folder / "adapter.safetensors", {base.path: roles}, "lycoris")
            check(folder, base, file, [lycoris_updates(roles, SHAPES["linear"])])

    @pytest.mark.parametrize("side", ["ia3 in", "ia3 out"])
    def test_factors_that_are_zero_and_one(self, tmp_path: Path, side: str) -> None:
        """A factor of 1 keeps W's bits, those of -0.0 too; what becomes 0 is +0.0, and still comes back."""
        W = base_of("linear", BF16).weight.clone()
        W[:, 0], W[1] = 0.0, -0.0
        base, roles = Base("linear", BF16, W, W[:, 2].clone()), roles_of(side, FP32)
        roles["weight"][::2] = 0.0
        roles["weight"][1] = -1.0
        file = write_lycoris(tmp_path / "adapter.safetensors", {base.path: roles}, "lycoris")
        check(tmp_path, base, file, [lycoris_updates(roles, SHAPES["linear"])])

    def test_differences_that_take_all_away(self, tmp_path: Path) -> None:
        base = base_of("linear", FP16)
        roles = diff_alone(Numbers(FP32), *SHAPES["linear"])
        roles["diff"][::2] = -base.weight[::2].float()
        file = write_lycoris(tmp_path / "adapter.safetensors", {base.path: roles}, "lycoris")
        check(tmp_path, base, file, [lycoris_updates(roles, SHAPES["linear"])])


TRANSPOSED = [
    "ia3",
    "ia3 feedforward",
    "adalora",
    "vera",
    "unilora",
    "tinylora",
    "vblora",
    "vblora logits",
    "fourierft",
]


class TestTransposed:
    """GPT-2's layers store (in, out); PEFT's factors of them are those of (out, in)."""

    @pytest.mark.parametrize(
        "kind",
        few(
            [*TRANSPOSED, "gralora hybrid", "pvera", "randlora", "waveft", "waveft longer", "waveft plain"],
            "ia3",
            "fourierft",
            "waveft longer",
        ),
    )
    def test_layers_of_gpt2(self, tmp_path: Path, kind: str) -> None:
        adapter = peft_of(kind, FP32)
        base = base_of(adapter.layer, BF16)
        path = "h.0.attn.c_attn"
        fields = {**adapter.config, "fan_in_fan_out": True, "target_modules": ["c_attn"]}
        if fields.get("feedforward_modules"):
            fields["feedforward_modules"] = ["c_attn"]
        folder = Peft(adapter.layer, adapter.roles, fields, adapter.shared).write(tmp_path / "adapter")
        file = folder / "adapter_model.safetensors"
        save_file({name.replace(base.path, path): x for name, x in load_file(file).items()}, file)
        model = tmp_path / "base"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        tensors = {f"{path}.weight": base.weight.T.contiguous(), f"{path}.bias": base.bias}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        loratool.merge(model, folder, tmp_path / "out")
        merged = load_file(tmp_path / "out" / "model.safetensors")
        wanted = merged_codes(base, peft_updates(adapter, SHAPES[base.layer]))
        assert count_wrong(merged[f"{path}.weight"].T, wanted[f"{base.path}.weight"]) == 0
        assert count_wrong(merged[f"{path}.bias"], wanted[f"{base.path}.bias"]) == 0
        loratool.unmerge(tmp_path / "out", folder, tmp_path / "back")
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


class TestInspect:
    def check(self, adapter: Path, kind: str, modules: int = 1) -> None:
        report = loratool.inspect(adapter)
        assert report.kind == "adapter", report
        kinds = [module.kind for module in report.details]
        of_peft = WORDS_OF_PEFT if adapter.is_dir() else {}
        word = WORDS_OF_ALL.get(kind) or {**WORDS, **of_peft}[kind.split()[0]]
        assert set(kinds) == {word} and not report.problems

    @pytest.mark.parametrize("kind", few(list(KINDS), "lora_mid", "loha", "lokr w2", "norm", "ia3 in", "dora loha in"))
    def test_says_the_kind(self, tmp_path: Path, kind: str) -> None:
        path = base_of(KINDS[kind][0], FP32).path
        self.check(write_lycoris(tmp_path / "a.safetensors", {path: roles_of(kind, BF16)}, "kohya"), kind)

    @pytest.mark.parametrize("kind", few(list(PEFT_KINDS), "loha", "ia3", "adalora", "vera"))
    def test_says_the_kind_of_peft(self, tmp_path: Path, kind: str) -> None:
        self.check(peft_of(kind, BF16).write(tmp_path / "a"), kind)

    @pytest.mark.parametrize(
        "kind", few(["loha", "loha tucker", "lokr both", "lokr tucker", "lora_mid", "diff"], "loha", "lokr tucker")
    )
    def test_measures_the_change(self, tmp_path: Path, kind: str) -> None:
        """||D||, with alpha / r in it, by fractions."""
        base, roles = base_of(KINDS[kind][0], FP32), roles_of(kind, FP32)
        file = write_lycoris(tmp_path / "a.safetensors", {base.path: roles}, "kohya")
        change = lycoris_updates(roles, SHAPES[base.layer])["weight"]
        assert isinstance(change, Add)
        size = float(sum(d * d for d in change.change)) ** 0.5
        against = float(sum(x * x for x in finite_reals(base.weight))) ** 0.5
        (found, *_) = loratool.inspect(file, base=base.write(tmp_path / "base.safetensors")).details
        assert found.norm == pytest.approx(size, rel=1e-6)
        assert found.relative == pytest.approx(size / against, rel=1e-6)


# what a refusal must say: the reason, and the remedy
REASONS = {
    "t-lora": ("T-LoRA", "extract"),
    "supertuning": ("places of its numbers", "save_precomputed_indices=True"),
    "randlora": ("random matrices", "save_projection=True"),
    "pvera": ("projection", "save_projection=True"),
    "vera": ("projection", "save_projection=True"),
    "unilora": ("for modules that the file does not have", "save_indices=True"),
    "tinylora": ("random matrices", "save_projection=True"),
    "xlora": ("X-?LoRA", ""),
    "lokr": (r"lokr_w2 of \(5, 3, 3\)", ""),
}


class TestRefusals:
    def refuse(self, run: Callable[..., Any], tmp_path: Path, kind: str, adapter: Path, base: Base) -> None:
        reason, remedy = REASONS[kind.split()[0]]
        model, out = base.write(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
        result, inspected = run("merge", model, adapter, "-o", out), run("inspect", adapter)
        said, told = (text.replace(str(tmp_path), "") for text in (result.stderr, inspected.stdout))
        assert result.exit_code == 3 and not out.exists(), said
        assert re.search(reason, said, re.IGNORECASE) and remedy in said, said
        assert inspected.exit_code == 0 and re.search(reason, told, re.IGNORECASE), told

    @pytest.mark.parametrize("container", few(list(CONTAINERS), "lycoris"))
    @pytest.mark.parametrize("kind", REFUSED)
    def test_of_lycoris(self, run: Callable[..., Any], tmp_path: Path, kind: str, container: str) -> None:
        base = base_of(REFUSED[kind][0], FP32)
        file = write_lycoris(tmp_path / "a.safetensors", {base.path: roles_of(kind, FP32)}, container)
        self.refuse(run, tmp_path, kind, file, base)

    @pytest.mark.parametrize("kind", PEFT_REFUSED)
    def test_of_peft(self, run: Callable[..., Any], tmp_path: Path, kind: str) -> None:
        adapter = peft_of(kind, FP32)
        self.refuse(run, tmp_path, kind, adapter.write(tmp_path / "a"), base_of(adapter.layer, FP32))

    def test_one_beside_others(self, run: Callable[..., Any], tmp_path: Path) -> None:
        """LoRA in the same file does not hide it, nor is the rest merged without it."""
        base = base_of("linear", FP32)
        modules = {base.path: roles_of("lora", FP32), "blocks.1.linear": roles_of("t-lora", FP32)}
        file = write_lycoris(tmp_path / "a.safetensors", modules, "kohya")
        self.refuse(run, tmp_path, "t-lora", file, base)

    @pytest.mark.parametrize(
        ("kind", "role", "shape"),
        [
            ("loha", "hada_w1_a", (24, 3)),
            ("loha", "hada_w2_b", (4, 6)),
            ("loha tucker", "hada_t1", (3, 2, 3, 2)),
            ("lokr both", "lokr_w2_b", (3, 3)),
            ("lokr full", "lokr_w1", (5, 3)),
            ("lokr tucker", "lokr_w2_a", (2, 4)),
            ("lora_mid", "lora_mid.weight", (3, 2, 3, 2)),
            ("diff", "diff", (6, 25)),
            ("norm", "w_norm", (24,)),
            ("ia3 in", "weight", (25,)),
            ("dora loha", "dora_scale", (24, 1)),
            ("dora loha tucker in", "dora_scale", (1, 5, 1, 1)),
        ],
    )
    def test_shapes_that_contradict_each_other(
        self, tmp_path: Path, kind: str, role: str, shape: tuple[int, ...]
    ) -> None:
        base, roles = base_of(KINDS[kind][0], FP32), roles_of(kind, FP32)
        roles[role] = torch.ones(shape)
        file = write_lycoris(tmp_path / "a.safetensors", {base.path: roles}, "kohya")
        with pytest.raises(InputError) as caught:
            loratool.merge(base.write(tmp_path / "base.safetensors"), file, tmp_path / "out.safetensors")
        assert "supported" not in str(caught.value)

    @pytest.mark.parametrize(
        ("kind", "role"),
        [
            ("loha", "hada_w2_b"),
            ("loha tucker", "hada_t2"),
            ("lokr both", "lokr_w1_b"),
            ("lokr w2", "lokr_w2_a"),
            ("lokr full", "lokr_w1"),
            ("lora_mid", "lora_down.weight"),
            ("ia3 in", "weight"),
        ],
    )
    def test_tensors_that_are_missing(self, tmp_path: Path, kind: str, role: str) -> None:
        base, roles = base_of(KINDS[kind][0], FP32), roles_of(kind, FP32)
        del roles[role]
        file = write_lycoris(tmp_path / "a.safetensors", {base.path: roles}, "kohya")
        with pytest.raises(InputError) as caught:
            loratool.merge(base.write(tmp_path / "base.safetensors"), file, tmp_path / "out.safetensors")
        assert "supported" not in str(caught.value)
        assert loratool.inspect(file).kind  # it can be looked at all the same


def test_the_formulas_themselves() -> None:
    """Two numbers each, worked out by hand."""
    two, half = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    base = Base("linear", FP32, torch.tensor([[3.0]]), torch.tensor([1.0]))

    def merged(roles: Roles, weight: float = 1.0) -> float:
        (code,) = merged_codes(base, lycoris_updates(roles, (1, 1), weight))["blocks.0.linear.weight"]
        return float(torch.tensor(code, dtype=torch.int32).view(FP32))

    loha = {"hada_w1_a": two, "hada_w1_b": two, "hada_w2_a": half, "hada_w2_b": two, "alpha": torch.tensor(0.5)}
    assert merged(loha) == 3 + 0.5 * (2 * 2) * (0.5 * 2)
    assert merged({"lokr_w1": two, "lokr_w2": half, "alpha": torch.tensor(7.0)}, 2.0) == 3 + 2 * (2 * 0.5)
    assert merged({"lokr_w1": two, "lokr_w2_a": half, "lokr_w2_b": two, "alpha": torch.tensor(7.0)}) == 3 + 7 * 2
    assert merged({"weight": torch.tensor([0.5]), "on_input": torch.tensor(1)}, 0.5) == 3 * (1 + 0.25)
    assert merged({**loha, "dora_scale": two}, 0.5) == 3 + 0.5 * (2 - 3)  # 5 / |5| * 2
