"""Every command on every kind of update, as the guide's table "Kinds of updates and commands" says.

Each number is compared with that of the dense change, which `dense_oracle` makes from the definition in fractions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from lib.files import lycoris_files as files
from lib.oracles import dense_oracle as oracle
from lib.oracles.fractions_oracle import Add
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratool.adapters.formats import open_adapter
from loratool.adapters.updates import UPDATES
from loratool.commands.combine.call import combine
from loratool.commands.convert.command import convert
from loratool.commands.diff.call import diff
from loratool.commands.inspect.call import inspect, spectra
from loratool.commands.merge.call import merge
from loratool.commands.resize.call import resize
from loratool.commands.unmerge.call import unmerge
from loratool.commands.verify.call import verify
from loratool.errors import InputError, NeedsFlag
from loratool.views.diff_adapters import AdapterDiff
from loratool.views.inspect_adapter import AdapterInspection

TABLE = (ROOT / "loratool" / "guides" / "formats.md").read_text().partition("## Kinds of updates and commands")[2]
ROWS = {
    re.findall(r"`(\w+)`", cells[0])[0]: cells[1:]
    for line in TABLE.partition("\n## ")[0].splitlines()
    if line.startswith("| `") and (cells := [cell.strip() for cell in line.strip("|").split(" | ")])
}
SIZE, RANK, DIFF, RESIZE, COMBINE, CONVERT = range(6)
WIDE, NARROW = torch.float32, torch.bfloat16

# row of the table -> kinds of lycoris_files, those of PEFT with a prefix
KINDS: dict[str, tuple[str, ...]] = {
    "lora": ("lora", "lora conv"),
    "tucker": ("lora_mid",),
    "loha": ("loha", "loha tucker", "peft loha", "peft loha alpha_pattern"),
    "lokr": ("lokr full", "lokr w1", "lokr both", "lokr conv full", "lokr tucker", "peft lokr full", "peft lokr w2"),
    "adalora": ("peft adalora", "peft adalora pruned"),
    "dora": ("dora", "dora lora_mid in", "dora loha in", "dora loha tucker in", "dora lokr"),
    "diff": ("full", "norm"),
    "ia3": ("ia3 in", "ia3 conv out", "peft ia3", "peft ia3 conv feedforward"),
    "vera": ("peft vera",),
    "pvera": ("peft pvera",),
    "shira": ("peft shira", "peft shira twice"),
    "supertuning": ("peft supertuning", "peft supertuning lora"),
    "randlora": ("peft randlora", "peft randlora wide"),
    "miss": ("peft miss", "peft miss remainder", "peft miss mini"),
    "bone": ("peft bone",),
    "gralora": ("peft gralora", "peft gralora hybrid"),
    "c3a": ("peft c3a",),
    "unilora": ("peft unilora",),
    "tinylora": ("peft tinylora",),
    "vblora": ("peft vblora", "peft vblora logits"),
    "delora": ("peft delora",),
    "beft": ("peft beft",),
    "oft": ("peft oft", "peft oft cayley", "peft oft conv", "peft oft 0.15", "peft oft 0.13"),
    "oft_blocks": ("diag-oft", "boft"),
    "boft": ("peft boft", "peft boft factors"),
    "bat": ("peft miss bat",),
    "road": ("peft road", "peft road 4"),
    "hra": ("peft hra", "peft hra conv GS"),
    "hira": ("peft hira", "peft hira conv"),
    "glora": ("peft glora", "peft glora constant", "peft glora weighed"),
    "lycoris_glora": ("glora", "glora conv"),
    "deft": ("peft deft", "peft deft para", "peft deft qr"),
    "peanut": ("peft peanut", "peft peanut deep"),
    "fourierft": ("peft fourierft", "peft fourierft even"),
    "waveft": ("peft waveft", "peft waveft longer", "peft waveft plain"),
}


def cases(wanted: Callable[[str, str], bool] = lambda row, kind: True) -> list[Any]:
    """Return the pairs of a row and a kind; of each row the first is tried by default."""
    found: list[Any] = []
    for row, kinds in KINDS.items():
        some = [kind for kind in kinds if wanted(row, kind)]
        found += [pytest.param(row, kind, marks=[pytest.mark.slow] if i else []) for i, kind in enumerate(some)]
    return found


class Sample:
    """An adapter of one layer, its base, and what it makes of the weight."""

    def __init__(self, kind: str, folder: Path, dtype: torch.dtype = WIDE, seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.peft = kind.startswith("peft ")
        if self.peft:
            made = files.peft_of(kind.removeprefix("peft "), dtype, seed)
            self.path, self.layer = made.write(folder / f"adapter{seed}"), made.layer
            self.updates = oracle.peft_updates(made, files.SHAPES[made.layer])
        else:
            self.layer, roles = files.KINDS[kind][0], files.roles_of(kind, dtype, seed)
            self.path = files.write_lycoris(folder / f"adapter{seed}.safetensors", {f"blocks.0.{self.layer}": roles})
            plain = {role: x for role, x in roles.items() if role != "dora_scale"}
            self.updates = oracle.lycoris_updates(plain, files.SHAPES[self.layer])  # of DoRA, before the norm
        self.model = files.base_of(self.layer, WIDE)
        self.base = self.model.write(folder / "base.safetensors")

    @cached_property
    def changes(self) -> list[Tensor]:
        """What is added to the weight and to the bias."""
        merged = oracle.merged_reals(self.model, self.updates)
        before = (self.model.weight, self.model.bias)
        return [new - old.double() for new, old in zip(merged, before, strict=True)]

    @cached_property
    def D(self) -> Tensor:
        """The change of the weight, of a kind that adds one, (out, in * kernel)."""
        update = self.updates["weight"]
        assert isinstance(update, Add)
        return torch.tensor([float(x) for x in update.change], dtype=torch.float64).reshape(len(self.model.weight), -1)


def written(path: Path) -> Tensor:
    """Return the change of the one module of a file of LoRA, by its definition."""
    if path.is_dir():
        adapter = open_adapter(path)
        config, (update,) = adapter.config.peft, adapter.updates.values()
        adapter.file.close()
        A, B = (load_file(path / "adapter_model.safetensors")[update.tensors[role]].double() for role in "AB")
        return config["lora_alpha"] / config["r"] * (B.flatten(1) @ A.flatten(1))
    roles = {key.partition(".")[2]: tensor for key, tensor in load_file(path).items()}
    (up,), (down,) = ([x for key, x in roles.items() if end in key] for end in ("lora_up", "lora_down"))
    return float(roles["alpha"]) / len(down) * (up.double().flatten(1) @ down.double().flatten(1))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> bool:
    return float((found - wanted).norm()) <= tolerance * float(wanted.norm())


def inspected(sample: Sample, base: bool) -> AdapterInspection:
    found = inspect(sample.path, base=sample.base if base else None)
    assert isinstance(found, AdapterInspection) and not found.problems
    return found


def test_the_table_lists_every_kind_of_the_files() -> None:
    assert ROWS.keys() == KINDS.keys()
    alone = {"experts", "add", "replace", "rows"}  # which formats make of what they hold beside factors, or of stacks
    assert KINDS.keys() == UPDATES.keys() - alone


@pytest.mark.parametrize(("row", "kind"), cases())
def test_inspect_gives_the_size_and_the_effective_rank(row: str, kind: str, tmp_path: Path) -> None:
    sample = Sample(kind, tmp_path)
    known = ROWS[row][SIZE] != "with a base"
    for base in (False, True):
        details = inspected(sample, base).details
        assert {each.kind for each in details} == {row}
        assert all((each.norm is not None) == (known or base) for each in details)
        if known or base:
            wanted = math.hypot(*(float(change.norm()) for change in sample.changes))
            assert math.isclose(math.hypot(*(each.norm or 0.0 for each in details)), wanted, rel_tol=1e-9)
    (rank,) = {each.effective_rank for each in details}
    assert (rank is not None) == (ROWS[row][RANK] == "yes")
    if rank is not None:
        S = torch.linalg.svdvals(sample.D)
        p = S / S.sum()
        assert math.isclose(rank, float((-torch.special.xlogy(p, p).sum()).exp()), rel_tol=1e-6)
        (spectrum,) = spectra(sample.path).modules
        assert torch.allclose(torch.tensor(spectrum.top, dtype=S.dtype), S[: len(spectrum.top)], atol=1e-9)
        merge(sample.base, sample.path, tmp_path / "merged.safetensors", undo=False)
        files_of = (load_file(path) for path in (sample.base, tmp_path / "merged.safetensors"))
        (W, tuned) = (next(x.double().flatten(1) for x in each.values() if x.dim() > 1) for each in files_of)
        before, after = (torch.linalg.svd(each, full_matrices=False).U for each in (W, tuned))
        new = (after[:, :5].T @ before).abs().amax(1) < 0.9
        (spectrum,) = spectra(sample.path, base=sample.base, top=5, threshold=0.9).modules
        assert spectrum.intruders and spectrum.intruders.new == int(new.sum()) > 0


@pytest.mark.parametrize(("row", "kind"), cases())
def test_diff_gives_the_distance(row: str, kind: str, tmp_path: Path) -> None:
    one, two = Sample(kind, tmp_path), Sample(kind, tmp_path, seed=1)
    same = diff(one.path, one.path)
    other = diff(one.path, two.path)
    assert isinstance(same, AdapterDiff) and isinstance(other, AdapterDiff)
    assert same.same and same.worst == 0 and other.worst > 0.1
    assert bool(other.modules) == ROWS[row][DIFF].startswith("changes")
    assert bool(other.values) == (not other.modules or "magnitudes" in ROWS[row][DIFF])
    if other.modules:
        assert math.isclose(other.distance, float((two.D - one.D).norm()), rel_tol=1e-6)


def outcome(act: Callable[[], Any], wanted: bool) -> Any:
    """Return what `act` returns; None where it is to refuse, and does so by name."""
    if wanted:
        return act()
    with pytest.raises((InputError, NeedsFlag)) as refused:
        act()
    assert refused.value.culprit or refused.value.remedy
    return None


@pytest.mark.parametrize(("row", "kind"), cases())
def test_resize_keeps_the_best_of_a_rank(row: str, kind: str, tmp_path: Path) -> None:
    sample = Sample(kind, tmp_path)
    out = tmp_path / ("resized" if sample.peft else "resized.safetensors")
    alone = ROWS[row][RANK] == "yes"  # what is kept along needs factors beside it
    made = outcome(lambda: resize(sample.path, out, rank=2), alone)
    if made is not None:
        U, S, Vh = torch.linalg.svd(sample.D, full_matrices=False)
        assert close(written(out), U[:, :2] * S[:2] @ Vh[:2])
        assert math.isclose(made.error, float(S[2:].norm() / S.norm()), rel_tol=1e-5, abs_tol=1e-7)
        assert any("LoRA" in line for line in made.warnings) == (kind not in ("lora", "lora conv", "dora"))


@pytest.mark.parametrize(("row", "kind"), cases())
def test_combine_adds_up(row: str, kind: str, tmp_path: Path) -> None:
    one, two = Sample(kind, tmp_path), Sample(kind, tmp_path, seed=1)
    out = tmp_path / ("sum" if one.peft else "sum.safetensors")
    act = lambda: combine([(one.path, 1.0), (two.path, 0.5)], out)  # noqa: E731
    made = outcome(act, ROWS[row][COMBINE] in ("yes", "as LoRA"))
    if made is not None:
        assert close(written(out), one.D + 0.5 * two.D)


@pytest.mark.parametrize("kind", ["loha", "lokr both", "lora_mid"])
def test_another_kind_and_lora_add_up(kind: str, tmp_path: Path) -> None:
    layer = files.KINDS[kind][0]
    one, two = Sample(kind, tmp_path / "one"), Sample("lora conv" if layer == "conv" else "lora", tmp_path / "two")
    combine([(one.path, 1.0), (two.path, -1.0)], tmp_path / "sum.safetensors")
    assert close(written(tmp_path / "sum.safetensors"), one.D - two.D)


def test_what_stands_beside_factors_is_kept_and_added_up(tmp_path: Path) -> None:
    roles = {**files.roles_of("loha", WIDE), **{k: v for k, v in files.roles_of("full", WIDE).items() if k == "diff_b"}}
    path = files.write_lycoris(tmp_path / "a.safetensors", {"blocks.0.linear": roles})
    key = "lora_unet_blocks_0_linear.diff_b"
    resize(path, tmp_path / "resized.safetensors", rank=2)
    assert torch.equal(load_file(tmp_path / "resized.safetensors")[key], roles["diff_b"])
    combine([(path, 1.0), (path, 0.5)], tmp_path / "sum.safetensors")
    assert torch.allclose(load_file(tmp_path / "sum.safetensors")[key], 1.5 * roles["diff_b"])


@pytest.mark.parametrize(("row", "kind"), cases(lambda row, kind: kind.startswith("peft ") and row != "oft"))
def test_convert_of_pefts_kinds_says_the_rank(row: str, kind: str, tmp_path: Path) -> None:
    rounds = row in ("tinylora", "vblora", "delora")  # their factors are long sums, or have powers or roots
    for dtype, exact in ((NARROW, not rounds), (WIDE, False)):
        sample, out = Sample(kind, tmp_path / str(dtype), dtype), tmp_path / f"lora {dtype}"
        made = outcome(lambda: convert(sample.path, out, to="peft"), ROWS[row][CONVERT] == "as LoRA")  # noqa: B023
        if made is None:
            continue
        (module,), (note,) = made.modules, made.notes
        exact = exact or row in ("gralora", "c3a")  # whose factors have the stored numbers, and no products of them
        assert (module.how, module.error) == ("expanded", 0) if exact else (-rounds < module.error < 1e-7)
        assert f"LoRA of rank {module.rank} " in note and close(written(out), sample.D, 1e-15 if exact else 1e-7)
        found = diff(sample.path, out)
        assert isinstance(found, AdapterDiff) and found.same and found.relative < 1e-7


@pytest.mark.parametrize(
    ("row", "kind"),
    cases(lambda row, kind: kind.startswith("peft ") and ROWS[row][CONVERT] in ("with a base", "OFT, base")),
)
def test_convert_with_a_base_keeps_the_best_of_a_rank(row: str, kind: str, tmp_path: Path) -> None:
    sample = Sample(kind, tmp_path)
    change = sample.changes[0].flatten(1)
    act = lambda: convert(sample.path, tmp_path / "lora", to="peft", plain=True, base=sample.base, rank=3)  # noqa: E731
    made = outcome(act, not sample.changes[1].any())  # no LoRA holds a changed bias
    if made is not None:
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        assert close(written(tmp_path / "lora"), U[:, :3] * S[:3] @ Vh[:3], 1e-5)
        (module,) = made.modules
        assert math.isclose(module.error, float(S[3:].norm() / S.norm()), rel_tol=1e-4, abs_tol=1e-6)


IMAGE = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32),
    "down_blocks.0.resnets.0.conv1": (32, 32, 3, 3),
}


@pytest.mark.parametrize(
    "to", ["comfy", "kohya", *(pytest.param(to, marks=pytest.mark.slow) for to in ("diffusers", "peft"))]
)
@pytest.mark.parametrize("made", [files.loha, files.lokr_two, files.dora(files.loha)], ids=["loha", "lokr", "dora"])
def test_convert_of_an_image_models_kinds_knows_the_kernels(made: Any, to: Any, tmp_path: Path) -> None:
    numbers = files.Numbers(NARROW)
    modules = {path: made(numbers, *shape) for path, shape in IMAGE.items()}
    source = files.write_lycoris(tmp_path / "a.safetensors", modules)
    report = convert(source, tmp_path / ("out" if to == "peft" else "out.safetensors"), to=to)
    assert {(row.how, row.error) for row in report.modules} == {("expanded", 0.0)}
    adapter = open_adapter(report.out)
    assert {update.shape for update in adapter.updates.values()} == {*IMAGE.values()}
    adapter.file.close()
    found = diff(source, report.out)
    assert isinstance(found, AdapterDiff) and found.same and len(found.modules) == 2


def test_diff_knows_a_fused_modules_parts_in_another_kind(tmp_path: Path) -> None:
    roles = {k: v for k, v in files.loha(files.Numbers(NARROW), 24, 8).items() if k != "alpha"}
    config = {"peft_type": "LOHA", "r": 3, "alpha": 4}
    source = files.Peft("self_attn.qkv_proj", roles, config).write(tmp_path / "fused")
    base = tmp_path / "config.json"
    base.write_text('{"num_attention_heads": 2, "head_dim": 4}')
    report = convert(source, tmp_path / "split", to="peft", layout="split", base=base)
    assert {row.how for row in report.modules} == {"split"} and len(report.modules) == 3
    found = diff(source, tmp_path / "split")
    assert isinstance(found, AdapterDiff) and found.same and len(found.modules) == 3


def test_a_convolution_whose_kernel_nothing_tells_is_refused(tmp_path: Path) -> None:
    sample = Sample("loha conv", tmp_path)
    with pytest.raises(InputError, match="kernel") as refused:
        resize(sample.path, tmp_path / "out.safetensors", rank=2)
    assert refused.value.remedy and "--exclude" in refused.value.remedy
    with pytest.raises(NeedsFlag) as flagged:
        combine([(sample.path, 1.0)], tmp_path / "out.safetensors")
    assert flagged.value.remedy == "add --exclude lora_unet_blocks_0_conv to exclude it"


@pytest.mark.parametrize("inputs", [False, True])
def test_dora_of_another_kind_becomes_the_best_lora_with_its_base(inputs: bool, tmp_path: Path) -> None:
    path, shape = "down_blocks.0.resnets.0.conv1", (10, 6, 3, 3)
    roles = files.dora(files.loha_tucker, inputs)(files.Numbers(WIDE), *shape)
    source = files.write_lycoris(tmp_path / "a.safetensors", {path: roles})
    W = files.Numbers(WIDE, 5)(*shape)
    save_file({f"{path}.weight": W}, tmp_path / "base.safetensors")
    convert(source, tmp_path / "plain", to="peft", plain=True, base=tmp_path / "base.safetensors", rank=10)
    made = merge(tmp_path / "base.safetensors", source, tmp_path / "merged.safetensors")
    assert made is not None
    change = load_file(tmp_path / "merged.safetensors")[f"{path}.weight"].double() - W.double()
    assert close(written(tmp_path / "plain"), change.flatten(1), 1e-5)


@pytest.mark.parametrize(("row", "kind"), cases())
def test_verify_proves_a_merge_and_finds_a_doubled_change(row: str, kind: str, tmp_path: Path) -> None:
    sample, merged = Sample(kind, tmp_path), tmp_path / "merged.safetensors"
    merge(sample.base, sample.path, merged)
    assert verify(sample.base, sample.path, merged).status == "proven"
    weights, base = load_file(merged), load_file(sample.base)
    other = {name: (w.double() + (w.double() - base[name].double())).float() for name, w in weights.items()}
    save_file(other, tmp_path / "other.safetensors")
    found = verify(sample.base, sample.path, tmp_path / "other.safetensors")
    assert found.status == "wrong"
    unmerge(merged, sample.path, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == sample.base.read_bytes()


@pytest.mark.parametrize(("row", "kind"), cases(lambda row, kind: ROWS[row][RANK] == "yes" and row != "dora"))
def test_verify_takes_one_rounding_of_a_float32_sum(row: str, kind: str, tmp_path: Path) -> None:
    sample = Sample(kind, tmp_path)
    base = load_file(sample.base)
    name = next(name for name in base if name.endswith(".weight"))
    base[name] = base[name] + sample.D.float().reshape(base[name].shape)
    save_file(base, tmp_path / "merged.safetensors")
    found = verify(sample.base, sample.path, tmp_path / "merged.safetensors")
    assert found.status == "proven" and {each.verdict for each in found.tensors} == {"rounding"}
