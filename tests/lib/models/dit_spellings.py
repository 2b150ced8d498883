"""Write one small image model and one adapter of it in every naming and spelling, and say what each verb must give.

Diffusers' own model is the truth: its class has the names, its linear layers get the adapter by PEFT, and PEFT's merge
is the expected result. A maker's file has the same numbers in other rows, by the family's table; that the table is
right is for `test_dit_families` to hold against converters that we did not write.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from lib.models import dit_models
from loratool.architectures.families import FAMILIES
from loratool.architectures.families.table import Block, Fused, ModelFamily, Run, Width

peft = pytest.importorskip("peft")

RANK, ALPHA = 4, 2.0
SCALE = ALPHA / RANK  # a power of two: folded into B or told by an alpha, the change has the same bits
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a tensor of diffusers'."""

    name: str
    start: int
    stop: int


Naming = Mapping[str, tuple[Piece, ...]]  # a tensor's name -> its rows, one after the other
Shapes = Mapping[str, tuple[int, ...]]


def whole(name: str, shapes: Shapes) -> tuple[Piece, ...]:
    shape = shapes[name]
    return (Piece(name, 0, shape[0] if shape else 1),)


def filled(stem: str, name: str, i: str) -> str:
    return ".".join(part for part in (stem.replace("{i}", i), name) if part)


def numbers(stems: tuple[str, ...], shapes: Shapes) -> list[str]:
    """Return which numbers the blocks have whose names start with one of the stems; one empty one if none is asked."""
    if not any("{i}" in stem for stem in stems):
        return [""]
    patterns = [re.compile(re.escape(stem).replace(r"\{i\}", r"(\d+)") + r"\.") for stem in stems]
    found = {m[1] for name in shapes for pattern in patterns if (m := pattern.match(name))}
    return sorted(found, key=int)


def pieces_of(rows: str | Fused, stem: str, i: str, leaf: str, shapes: Shapes) -> tuple[Piece, ...]:
    """Return the rows that a maker's module is, of the tensors with this leaf; none where the model has not all."""
    runs = [run if isinstance(run, Run) else Run(run) for run in (rows.runs if isinstance(rows, Fused) else (rows,))]
    found = []
    for run in runs:
        name = f"{filled(stem, run.module, i)}.{leaf}"
        if name not in shapes:
            return ()
        size, rest = divmod(shapes[name][0], run.parts)
        assert not rest, (name, shapes[name], run)
        found.append(Piece(name, run.part * size, (run.part + 1) * size))
    return tuple(found)


def block_rows(block: Block, shapes: Shapes) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Yield the tensors of a stack of blocks in the maker's naming."""
    for i in numbers((block.diffusers,), shapes):
        ends = {
            filled(block.maker, name, i): filled(block.diffusers, theirs, i) for name, theirs in block.tensors.items()
        }
        for name, rows in {**block.names, **{each: each for each in block.alike}}.items():
            for leaf in ("weight", "bias"):
                pieces = pieces_of(rows, block.diffusers, i, leaf, shapes)
                if name in block.by_ratio:
                    ratio, other = block.by_ratio[name]
                    weight = shapes.get(f"{filled(block.diffusers, modules_of(other)[0], i)}.weight", (0, 1))
                    if weight[0] == ratio * weight[1]:
                        pieces = pieces_of(other, block.diffusers, i, leaf, shapes)
                if pieces and pieces[0].name not in ends.values():
                    yield f"{filled(block.maker, name, i)}.{leaf}", pieces
        yield from ((name, whole(theirs, shapes)) for name, theirs in ends.items() if theirs in shapes)


def modules_of(rows: str | Fused) -> list[str]:
    return [run.module if isinstance(run, Run) else run for run in rows.runs] if isinstance(rows, Fused) else [rows]


def maker_rows(family: ModelFamily, shapes: Shapes) -> dict[str, tuple[Piece, ...]]:
    """Return a model's tensors in the maker's naming, each row of diffusers' once."""
    outside = Block("", "", family.outside, alike=family.alike, tensors=family.outside_tensors)
    found = dict(row for block in (*family.blocks, outside) for row in block_rows(block, shapes))
    return each_once(found, shapes)


def each_once(naming: dict[str, tuple[Piece, ...]], shapes: Shapes) -> dict[str, tuple[Piece, ...]]:
    """Return a naming that has every row of diffusers' once."""
    rows = [(piece.name, i) for pieces in naming.values() for piece in pieces for i in range(piece.start, piece.stop)]
    expected = {(name, i) for name, shape in shapes.items() for i in range(shape[0] if shape else 1)}
    twice = {name for (name, _), count in Counter(rows).items() if count > 1}
    none = {name for name, _ in expected ^ set(rows)}
    assert not twice and not none, f"under several names: {sorted(twice)}, under none: {sorted(none)}"
    return naming


def comfy_rows(family: ModelFamily, shapes: Shapes) -> dict[str, tuple[Piece, ...]]:
    """Return a model's tensors in ComfyUI's naming, which is the maker's where the table has no other name."""
    own: dict[str, tuple[Piece, ...]] = {}
    outside = Block("", "", {}, comfy=family.outside_comfy)
    for block in (*family.blocks, outside):
        for i in numbers((block.diffusers,), shapes):
            for name, rows in block.comfy.items():
                for leaf in ("weight", "bias"):
                    if pieces := pieces_of(rows, block.diffusers, i, leaf, shapes):
                        own[f"{filled(block.comfy_stem or block.maker, name, i)}.{leaf}"] = pieces
    covered = {piece.name for pieces in own.values() for piece in pieces}
    rest = {n: p for n, p in maker_rows(family, shapes).items() if not covered & {piece.name for piece in p}}
    return each_once({**rest, **own}, shapes)


@dataclass(frozen=True)
class Spelling:
    """How a writer of adapters names the tensors of a module."""

    prefix: str
    naming: str  # `maker`, `diffusers` or `comfy`
    ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
    alpha: str = ""  # `tensor` or `config`; else it is folded into B

    @property
    def flat(self) -> bool:
        return self.prefix.endswith("_")


DOWN = (".lora_down.weight", ".lora_up.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
# what writes it -> how
SPELLINGS: Mapping[str, Spelling] = {
    "diffusers": Spelling("transformer.", "diffusers"),
    "save_lora_adapter": Spelling("", "diffusers", alpha="metadata"),
    "kohya, maker's": Spelling("lora_unet_", "maker", DOWN, "tensor"),
    "kohya, diffusers'": Spelling("lora_unet_", "diffusers", DOWN, "tensor"),
    "ComfyUI, maker's": Spelling("diffusion_model.", "maker"),
    "ComfyUI, alpha": Spelling("diffusion_model.", "maker", DOWN, "tensor"),
    "ai-toolkit, diffusers'": Spelling("diffusion_model.", "diffusers"),
    "SimpleTuner LyCORIS": Spelling("lycoris_", "diffusers", DOWN, "tensor"),
    "OneTrainer legacy": Spelling("lora_transformer_", "diffusers", DOWN, "tensor"),
    "OneTrainer original": Spelling("", "maker", alpha="tensor"),
    "PEFT": Spelling("base_model.model.", "diffusers", alpha="config"),
    "DiffSynth": Spelling("", "diffusers", DEFAULT),
    "DiffSynth, maker's": Spelling("", "maker", DEFAULT),
    "Lightning": Spelling("", "diffusers", DOWN, "tensor"),
    "Genmo": Spelling("", "maker", (".lora_A", ".lora_B")),
    "diffusion-pipe": Spelling("transformer.", "maker"),
    "VideoX-Fun": Spelling("lora_unet__", "maker", DOWN, "tensor"),
    "kohya, ComfyUI's": Spelling("lora_unet_", "comfy", DOWN, "tensor"),
    "ComfyUI": Spelling("diffusion_model.", "comfy"),
}


@dataclass(frozen=True)
class Layout:
    """How a file of a base names its tensors: naming, prefix, and whether it is a folder."""

    naming: str
    prefix: str = ""
    folder: str = ""  # below the base, of a pipeline's component; `.` is a component's own folder


LAYOUTS: Mapping[str, Layout] = {
    "component": Layout("diffusers", folder="."),
    "pipeline": Layout("diffusers", folder="transformer"),
    "bare": Layout("maker"),
    "bare, diffusers'": Layout("diffusers"),
    "model.diffusion_model.": Layout("maker", "model.diffusion_model."),
    "diffusion_model.": Layout("maker", "diffusion_model."),
    "net.": Layout("maker", "net."),
    "model.model.": Layout("comfy", "model.model."),
}
OF_NET = ("cosmos1", "cosmos_predict2", "anima")


@cache
def columns_of(key: str) -> tuple[int, ...]:
    """Return every number of columns in a family's tiny models, the telling one first."""
    argument, telling = dit_models.TELLING[key]
    found = {telling: None}
    for case, (name, config) in dit_models.MODELS.items():
        if dit_models.family_of(case) == key:
            with torch.device("meta"):
                model = getattr(dit_models.diffusers, name)(**{**config, argument: telling})
            found |= dict.fromkeys(tensor.shape[1] for tensor in model.state_dict().values() if tensor.ndim > 1)
    return tuple(found)


@contextmanager
def telling_widths() -> Iterator[None]:
    """Let the tables' widths be those of the tiny models: by the real ones, none of them is of its family."""
    families = [FAMILIES[key] for key in dit_models.TELLING]
    before = [family.widths for family in families]
    for family in families:
        object.__setattr__(family, "widths", (Width("unet", ("",), columns_of(family.key)),))
    yield
    for family, widths in zip(families, before, strict=True):
        object.__setattr__(family, "widths", widths)


class WrongError(Exception):
    """Says what a verb gave that is not right: neither the expected numbers nor a refusal."""


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    """Raise WrongError where tensors differ by more than the tolerance, relative to the largest number."""
    if found.keys() != expected.keys():
        raise WrongError(f"other tensors: {sorted(found.keys() ^ expected.keys())[:6]}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise WrongError(f"{name}: {tuple(found[name].shape)} {found[name].dtype}, not {tuple(tensor.shape)}")
        if tolerance:
            if (found[name] - tensor).abs().max() > tolerance * tensor.abs().max():
                raise WrongError(f"{name}: off by {(found[name] - tensor).abs().max():.2e}")
        elif not torch.equal(found[name], tensor):
            raise WrongError(f"{name}: other bits, off by {(found[name] - tensor).abs().max():.2e}")


@dataclass(eq=False)
class Subject:
    """A model with an adapter: its numbers in diffusers' naming, and the same in the others.

    With `apart` no two layers have the same A, and their ranks differ: what is fused has a change of all their ranks.
    """

    case: str
    folder: Path
    apart: bool = False
    written: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def family(self) -> ModelFamily:
        return FAMILIES[dit_models.family_of(self.case)]

    @cached_property
    def base(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in dit_models.build(self.case).state_dict().items()}

    @cached_property
    def shapes(self) -> Shapes:
        return {name: tuple(tensor.shape) for name, tensor in self.base.items()}

    @cached_property
    def namings(self) -> Mapping[str, Naming]:
        own = any(block.comfy for block in self.family.blocks) or self.family.outside_comfy
        return {
            "diffusers": {name: whole(name, self.shapes) for name in self.shapes},
            "maker": maker_rows(self.family, self.shapes),
            **({"comfy": comfy_rows(self.family, self.shapes)} if own else {}),
        }

    @cached_property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of every linear layer; layers that are one in another naming have the same A, as if trained there."""
        g = torch.Generator().manual_seed(1)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        first = {path: path for path in dit_models.linears(dit_models.build(self.case))}
        for naming in () if self.apart else self.namings.values():
            for pieces in naming.values():
                paths = [piece.name.removesuffix(".weight") for piece in pieces]
                if len(set(paths)) > 1 and set(paths) <= first.keys():
                    old = {first[path] for path in paths}
                    first |= {path: min(old) for path, one in first.items() if one in old}
        shared: dict[str, Tensor] = {}
        for path, one in first.items():
            rows, columns = self.shapes[f"{path}.weight"]
            rank = RANK - len(found) % 3 if self.apart else RANK
            if one not in shared:
                shared[one] = torch.randn(rank, columns, generator=g)
            found[path] = (shared[one], torch.randn(rows, rank, generator=g) * 0.1)
        return found

    @cached_property
    def other(self) -> Subject:
        folder = self.folder / "apart"
        folder.mkdir()
        return Subject(self.case, folder, apart=True)

    def injected(self) -> Any:
        """Return the model with the adapter as PEFT injects it."""
        model = dit_models.build(self.case)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=sorted(self.factors), init_lora_weights=False)
        if hasattr(model, "add_adapter"):
            model.add_adapter(config)
        else:
            peft.inject_adapter_in_model(config, model)
        for path, (A, B) in self.factors.items():
            layer = model.get_submodule(path)
            layer.lora_A["default"].weight.data.copy_(A)
            layer.lora_B["default"].weight.data.copy_(B)
        return model

    @cached_property
    def fused(self) -> dict[str, Tensor]:
        """The base with the adapter merged by PEFT, or where ranks differ by its formula, in diffusers' naming."""
        if not self.apart:
            return merged_by_peft(self.injected())
        changes = {f"{path}.weight": ALPHA / len(A) * (B @ A) for path, (A, B) in self.factors.items()}
        return {name: W + changes[name] if name in changes else W for name, W in self.base.items()}

    def renamed(self, naming: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return diffusers' tensors in another naming."""
        return {
            name: self.shaped(name, pieces, torch.cat([tensors[p.name].reshape(-1)[:1] if not tensors[p.name].dim()
                                                       else tensors[p.name][p.start : p.stop] for p in pieces]))
            for name, pieces in self.namings[naming].items()
        }  # fmt: skip

    def shaped(self, name: str, pieces: tuple[Piece, ...], tensor: Tensor) -> Tensor:
        """Return a tensor in the maker's shape, where that is another than diffusers'."""
        own = self.shapes[pieces[0].name]
        flat = any(re.search(each.replace("{i}", "[0-9]+") + "$", pieces[0].name) for each in self.family.reshaped)
        if flat and name not in self.namings["diffusers"]:
            return tensor.reshape(-1)
        return tensor if own else tensor.reshape(own)

    def adapter(self, name: str) -> Path:
        """Write the adapter in a spelling, once."""
        if name in self.written:
            return self.written[name]
        spelling = SPELLINGS[name]
        path = self.folder / f"a{len(self.written)}.safetensors"
        if spelling.alpha == "metadata" and hasattr(model := self.injected(), "save_lora_adapter"):
            model.save_lora_adapter(path.with_suffix(""))
            path = path.with_suffix("") / "pytorch_lora_weights.safetensors"
        else:
            tensors = dict(self.adapter_tensors(spelling))
            if spelling.alpha == "config":
                path = path.with_suffix("")
                path.mkdir()
                fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(self.factors)}
                (path / "adapter_config.json").write_text(json.dumps(fields))
                save_file(tensors, path / "adapter_model.safetensors")
            else:
                save_file(tensors, path)
        self.written[name] = path
        return path

    def adapter_tensors(self, spelling: Spelling) -> Iterator[tuple[str, Tensor]]:
        for name, pieces in self.namings[spelling.naming].items():
            paths = [piece.name.removesuffix(".weight") for piece in pieces]
            if not set(paths) <= self.factors.keys():
                continue
            module = name.removesuffix(".weight")
            module = spelling.prefix + (module.replace(".", "_") if spelling.flat else module)
            A = self.factors[paths[0]][0]
            B = torch.cat([self.factors[path][1][p.start : p.stop] for path, p in zip(paths, pieces, strict=True)])
            folded = spelling.alpha not in ("tensor", "config")
            yield module + spelling.ends[0], A.clone()
            yield module + spelling.ends[1], (B * (ALPHA / len(A)) if folded else B).contiguous()
            if spelling.alpha == "tensor":
                yield f"{module}.alpha", torch.tensor(ALPHA)

    def base_in(self, name: str) -> Path:
        """Write the base in a layout, once."""
        key = f"base {name}"
        if key in self.written:
            return self.written[key]
        layout = LAYOUTS[name]
        path = self.folder / f"b{len(self.written)}"
        tensors = {f"{layout.prefix}{n}": t.contiguous() for n, t in self.renamed(layout.naming, self.base).items()}
        if not layout.folder:
            path = path.with_suffix(".safetensors")
            save_file(tensors, path)
        else:
            dit_models.build(self.case).save_pretrained(path / layout.folder)
            if layout.folder != ".":
                class_name = dit_models.MODELS[self.case][0]
                index = {"_class_name": "Pipeline", layout.folder: ["diffusers", class_name]}
                (path / "model_index.json").write_text(json.dumps(index))
        self.written[key] = path
        return path

    def read(self, path: Path, name: str) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint in a layout, without its prefix; other names raise WrongError."""
        layout = LAYOUTS[name]
        tensors = load_model(path / layout.folder if layout.folder else path)
        if strange := [each for each in tensors if not each.startswith(layout.prefix)]:
            raise WrongError(f"names without {layout.prefix}: {strange[:3]}")
        return {each.removeprefix(layout.prefix): tensor for each, tensor in tensors.items()}

    def place(self, suffix: str = "") -> Path:
        """Return a path in this subject's folder that nothing is at."""
        self.written[f"place {len(self.written)}"] = path = self.folder / f"p{len(self.written)}{suffix}"
        return path

    def merged(self, adapter: Path | list[Path], layout: str, **options: Any) -> Path:
        out = self.place(".safetensors" if not LAYOUTS[layout].folder else "")
        loratool.merge(self.base_in(layout), adapter, out, undo=False, **options)
        return out

    @cached_property
    def usual(self) -> dict[str, Tensor]:
        """What the plainest spelling gives in the plainest layout, in diffusers' naming; PEFT's numbers to 1e-6."""
        found = self.read(self.merged(self.adapter("diffusers"), "component"), "component")
        same(found, self.fused, 1e-6)
        return found

    def changed(self, layout: str) -> list[str]:
        """Return the tensors of a layout that the adapter changes."""
        naming = self.namings[LAYOUTS[layout].naming].items()
        return [n for n, pieces in naming if any(p.name.removesuffix(".weight") in self.factors for p in pieces)]

    def layouts(self) -> list[str]:
        names = [n for n, layout in LAYOUTS.items() if layout.naming in self.namings]
        return [n for n in names if n != "net." or self.family.key in OF_NET]

    def spellings(self) -> list[str]:
        return [n for n, spelling in SPELLINGS.items() if spelling.naming in self.namings]


def merged_by_peft(model: Any) -> dict[str, Tensor]:
    """Return a model's tensors with its adapters merged by PEFT, under the model's own names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    state = model.state_dict().items()
    return {name.replace(".base_layer.", "."): tensor.clone() for name, tensor in state if "lora_" not in name}


def check_merge(subject: Subject, spelling: str, layout: str) -> None:
    """Merge a spelling onto a layout: the bits of the plainest, and so PEFT's numbers."""
    found = subject.read(subject.merged(subject.adapter(spelling), layout), layout)
    same(found, subject.renamed(LAYOUTS[layout].naming, subject.usual))


def check_verify(subject: Subject, spelling: str, layout: str) -> None:
    """What was merged is proven."""
    adapter = subject.adapter(spelling)
    found = loratool.verify(subject.base_in(layout), adapter, subject.merged(adapter, layout))
    if found.status != "proven" or found.exact != len(subject.changed(layout)):
        raise WrongError(f"{found.status}, {found.exact} exact")


def check_verify_wrong(subject: Subject, spelling: str, layout: str) -> None:
    """The base itself is wrong, in every tensor that has a change."""
    base = subject.base_in(layout)
    found = loratool.verify(base, subject.adapter(spelling), base)
    if found.status != "wrong" or found.wrong != len(subject.changed(layout)):
        raise WrongError(f"{found.status}, {found.wrong} wrong")


def check_unmerge(subject: Subject, spelling: str, layout: str) -> None:
    """The base's files come back byte for byte."""
    base, adapter = subject.base_in(layout), subject.adapter(spelling)
    suffix = "" if LAYOUTS[layout].folder else ".safetensors"
    merged, back = subject.place(suffix), subject.place(suffix)
    loratool.merge(base, adapter, merged)
    loratool.unmerge(merged, adapter, back)
    if files_of(back) != files_of(base):
        raise WrongError("other bytes than the base's")


def files_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {each.relative_to(path).as_posix() if each != path else "": each.read_bytes() for each in files}


def check_inspect(subject: Subject, spelling: str, layout: str) -> None:
    """Every module binds and nothing is called a problem."""
    report = loratool.inspect(subject.adapter(spelling), base=subject.base_in(layout))
    if report.problems or report.coverage is None or report.coverage.unbound:
        raise loratool.InputError(f"{report.problems} {report.coverage}")
    if report.rank != RANK:
        raise WrongError(f"rank {report.rank}")


def check_diff(subject: Subject, spelling: str) -> None:
    """A spelling is at no distance from the plainest, and both have the change's norm."""
    report = loratool.diff(subject.adapter(spelling), subject.adapter("diffusers"))
    norm = sum((SCALE * B @ A).double().square().sum() for A, B in subject.factors.values()) ** 0.5
    if report.only_a or report.only_b or report.relative > 1e-6 or abs(report.norm_a / norm - 1) > 1e-5:
        raise WrongError(f"relative distance {report.relative}, norm {report.norm_a}, not {norm}, {report.only_a[:3]}")


def check_apart(subject: Subject, spelling: str, layout: str) -> None:
    """Layers with factors and ranks of their own, into what is one matrix in the layout."""
    other = subject.other
    found = other.read(other.merged(other.adapter(spelling), layout), layout)
    same(found, other.renamed(LAYOUTS[layout].naming, other.fused), 1e-6)


def check_convert_apart(subject: Subject, spelling: str, to: str) -> None:
    """The same in another format, where what is fused has the ranks of all its parts."""
    other, out = subject.other, subject.place(suffix_of(to))
    loratool.convert(other.adapter(spelling), out, to=to)
    for layout in ("component", "bare"):
        found = other.read(other.merged(out, layout), layout)
        same(found, other.renamed(LAYOUTS[layout].naming, other.fused), 1e-6)


def suffix_of(to: str) -> str:
    return "" if to == "peft" else ".safetensors"


def check_convert(subject: Subject, spelling: str, to: str) -> None:
    """The output makes the same change in a folder and in the maker's file, and so does what it becomes after it.

    Names of diffusers' in its own format are exactly those of its layers.
    """
    out, back = subject.place(suffix_of(to)), subject.place(".safetensors")
    loratool.convert(subject.adapter(spelling), out, to=to)
    loratool.convert(out, back, to="diffusers")
    same(subject.read(subject.merged(out, "component"), "component"), subject.usual)
    same(subject.read(subject.merged(back, "bare"), "bare"), subject.renamed("maker", subject.usual))
    names = {f"transformer.{path}.lora_{x}.weight" for path in subject.factors for x in "AB"}
    if (found := set(load_model(back))) != names:
        raise WrongError(f"other names: {sorted(found ^ names)[:4]}")


def check_format_names(subject: Subject, to: str) -> None:
    """The modules of a written file are those that its readers look for: each tensor of a base is found once."""
    out = subject.place(suffix_of(to))
    loratool.convert(subject.adapter("diffusers"), out, to=to)
    if to == "peft":
        prefix, naming, flat = "base_model.model.", "diffusers", False
    elif to == "diffusers":
        prefix, naming, flat = "transformer.", "diffusers", False
    elif to == "comfy":
        prefix, naming, flat = "diffusion_model.", "comfy" if "comfy" in subject.namings else "maker", False
    else:
        prefix, naming, flat = "lora_unet_", subject.family.kohya.name.lower(), True
    modules = {
        name.removesuffix(".weight")
        for name, pieces in subject.namings[naming].items()
        if {piece.name.removesuffix(".weight") for piece in pieces} <= subject.factors.keys()
    }
    expected = {prefix + (name.replace(".", "_") if flat else name) for name in modules}
    ends = r"\.(lora_(A|B|up|down)\.weight|alpha)$"
    if (found := {re.sub(ends, "", name) for name in load_model(out)}) != expected:
        raise WrongError(f"other modules in {to}: {sorted(found ^ expected)[:4]}")


def check_load(subject: Subject, spelling: str) -> None:
    """Diffusers loads what `--to diffusers` writes: every tensor in its layer, and the change is the same."""
    out = subject.place(".safetensors")
    loratool.convert(subject.adapter(spelling), out, to="diffusers")
    same(merged_by_peft(loaded(subject, out)), subject.fused, 1e-6)


def loaded(subject: Subject, path: Path) -> Any:
    """Return the model with a file of diffusers' format; a tensor that no layer took raises WrongError."""
    model, tensors = dit_models.build(subject.case), load_file(path)
    with safe_open(path, "pt") as file:
        fields = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if hasattr(model, "load_lora_adapter"):
        # With a name of a file it reads the metadata, which has the alphas; of a path alone it does not.
        model.load_lora_adapter(path.parent, weight_name=path.name, prefix="transformer", adapter_name="default")
    else:  # its pipelines load none, and PEFT does
        own = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        config = {name.removeprefix("transformer."): value for name, value in fields.items()}
        rank = next(iter(own.values())).shape[0]
        config = config or {
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({n.split(".lora_")[0] for n in own}),
        }
        peft.inject_adapter_in_model(peft.LoraConfig(**config), model, state_dict=own)
        peft.set_peft_model_state_dict(model, own)
    state = model.state_dict()
    for name, tensor in tensors.items():
        own_name = name.removeprefix("transformer.").replace(".weight", ".default.weight")
        if own_name not in state or not torch.equal(state[own_name], tensor):
            raise WrongError(f"{name} is in no layer of diffusers'")
    if extra := sum("lora_" in name for name in state) - len(tensors):
        raise WrongError(f"{extra} layers of diffusers' have factors that the file has not")
    return model


def check_convert_base(subject: Subject, layout: str, to: str) -> None:
    """The denoiser in the other layout is the one that was written there, bit for bit; the folder is diffusers' own."""
    kept, suffix = ("component", "") if to == "diffusers" else ("bare", ".safetensors")
    out = subject.place(suffix)
    loratool.convert_model(subject.base_in(layout), out, to=to)
    same(subject.read(out, kept), subject.renamed(LAYOUTS[kept].naming, subject.base))


def check_extract(subject: Subject, layout: str, to: str) -> None:
    """The change of a merge comes back, to float32's rounding, in the same layout and in diffusers' folder."""
    out = subject.place(suffix_of(to))
    merged = subject.merged(subject.adapter("diffusers"), layout)
    loratool.extract(subject.base_in(layout), merged, out, rank=RANK, to=to)
    for each in dict.fromkeys((layout, "component")):
        found = subject.read(subject.merged(out, each), each)
        same(found, subject.renamed(LAYOUTS[each].naming, subject.usual), 1e-5)
    if to == "diffusers":
        same(merged_by_peft(loaded(subject, out)), subject.fused, 1e-5)


def check_init(subject: Subject, layout: str, to: str) -> None:
    """A new adapter changes nothing, has every layer's factors, and diffusers loads its own format."""
    out = subject.place(suffix_of(to))
    loratool.init(subject.base_in(layout), out, rank=1, to=to)
    for each in dict.fromkeys((layout, "component")):
        same(subject.read(subject.merged(out, each), each), subject.renamed(LAYOUTS[each].naming, subject.base))
    report = loratool.inspect(out, base=subject.base_in("component"))
    if report.coverage is None or report.coverage.unbound or report.coverage.bound != len(report.details):
        raise WrongError(f"{report.coverage}")
    if to == "diffusers":
        loaded(subject, out)


def check_combine(subject: Subject, spelling: str, to: str) -> None:
    """The sum of the plainest spelling and another, of which half is taken off, is half the change more."""
    out = subject.place(suffix_of(to))
    loratool.combine([(subject.adapter("diffusers"), 1.0), (subject.adapter(spelling), 0.5)], out, to=to)
    found = subject.read(subject.merged(out, "component"), "component")
    same(found, {n: W + 1.5 * (subject.fused[n] - W) for n, W in subject.base.items()}, 1e-5)


def check_resize(subject: Subject, spelling: str, to: str) -> None:
    """At its own rank the change stays, in another format too."""
    out = subject.place(suffix_of(to))
    loratool.resize(subject.adapter(spelling), out, rank=RANK, to=to)
    same(subject.read(subject.merged(out, "component"), "component"), subject.usual, 1e-5)


def check_truncate(subject: Subject, spelling: str) -> None:
    """At half its rank each module of the spelling's naming has the best of that rank, by an SVD in float64."""
    out, rank = subject.place(".safetensors"), RANK // 2
    loratool.resize(subject.adapter(spelling), out, rank=rank)
    expected = {name: tensor.clone() for name, tensor in subject.base.items()}
    for pieces in subject.namings[SPELLINGS[spelling].naming].values():
        paths = [piece.name.removesuffix(".weight") for piece in pieces]
        if set(paths) <= subject.factors.keys():
            B = torch.cat([subject.factors[path][1][p.start : p.stop] for path, p in zip(paths, pieces, strict=True)])
            U, S, V = torch.linalg.svd((SCALE * B @ subject.factors[paths[0]][0]).double(), full_matrices=False)
            rows = ((U[:, :rank] * S[:rank]) @ V[:rank]).split([p.stop - p.start for p in pieces])
            for piece, part in zip(pieces, rows, strict=True):
                expected[piece.name][piece.start : piece.stop] += part
    same(subject.read(subject.merged(out, "component"), "component"), expected, 1e-5)


@dataclass(frozen=True)
class Cell:
    """One check of a subject, with the row and column that it counts for; an `apart` at the end is no argument."""

    verb: str
    spelling: str  # empty where no adapter is read
    check: Callable[..., None]
    args: tuple[str, ...]


FORMATS = ("kohya", "diffusers", "comfy", "peft")
# The spellings that differ in what a verb after reading could mistake: all are read by the same code.
READ = ("diffusers", "kohya, maker's", "ComfyUI, maker's", "kohya, ComfyUI's", "PEFT")


def cells(subject: Subject) -> Iterator[Cell]:
    """Yield every check of a subject: each spelling with each layout for merge, and a few of them for the rest."""
    layouts, spellings = subject.layouts(), subject.spellings()
    for spelling in spellings:
        for layout in layouts:
            yield Cell("merge", spelling, check_merge, (spelling, layout))
        yield Cell("inspect", spelling, check_inspect, (spelling, "component"))
        yield Cell("diff", spelling, check_diff, (spelling,))
        yield Cell("convert", spelling, check_load, (spelling,))
    for spelling in [each for each in READ if each in spellings]:
        for layout in ("component", "bare"):
            yield Cell("verify", spelling, check_verify, (spelling, layout))
            yield Cell("unmerge", spelling, check_unmerge, (spelling, layout))
        for to in FORMATS:
            yield Cell("convert", spelling, check_convert, (spelling, to))
            yield Cell("combine", spelling, check_combine, (spelling, to))
            yield Cell("resize", spelling, check_resize, (spelling, to))
        yield Cell("resize", spelling, check_truncate, (spelling,))
    for spelling in ("diffusers", "kohya, diffusers'"):
        for layout in [each for each in layouts if each in ("component", "bare", "model.model.")]:
            yield Cell("merge", spelling, check_apart, (spelling, layout, "apart"))
        for to in FORMATS:
            yield Cell("convert", spelling, check_convert_apart, (spelling, to, "apart"))
    for layout in layouts:
        if LAYOUTS[layout].naming != "diffusers" or layout == "component":
            to = "single-file" if layout == "component" else "diffusers"
            yield Cell("convert a base", "", check_convert_base, (layout, to))
    yield Cell("verify", "", check_verify_wrong, ("kohya, maker's", "component"))
    for to in FORMATS:
        yield Cell("convert", "", check_format_names, (to,))
        # PEFT's adapters are of one model, and none of a pipeline's is chosen for the user
        for layout in [each for each in layouts if (each, to) != ("pipeline", "peft")]:
            if to == "diffusers" or layout in ("component", "bare", "model.model."):
                yield Cell("extract", "", check_extract, (layout, to))
                yield Cell("init", "", check_init, (layout, to))


def outcome(subject: Subject, cell: Cell) -> tuple[str, str]:
    """Return (`right`, `refused` or `wrong`, the message)."""
    try:
        cell.check(subject, *(each for each in cell.args if each != "apart"))
    except loratool.LoratoolError as e:
        return "refused", f"{e}"
    except WrongError as e:
        return "wrong", f"{e}"
    except Exception as e:
        return "wrong", f"{type(e).__name__}: {e}"
    return "right", ""


# part of a refusal's message -> the formats that it is right for
REASONS: Mapping[str, tuple[str, ...]] = {
    "PEFT cannot tell": ("peft",),  # its config cannot name a layer whose whole name ends another's
    "whose maker uses diffusers' names": ("single-file",),  # FramePack's
    "has no files for it": ("kohya", "comfy"),  # Bria's LoRAs are diffusers' alone
}


# Families whose maker's names begin as a language model's do (`transformer.layers.`, `llm.layers.`), and the spellings
# that leave them bare: nobody writes these, and their alpha is asked for, or their modules are not found.
LIKE_LANGUAGE = ("cogvideox", "cogview4", "omnigen")
BARE = ("OneTrainer original", "DiffSynth, maker's", "Genmo")


def known_refusal(subject: Subject, cell: Cell, message: str) -> bool:
    """Return whether a refusal is right: of what a format cannot say, or of names that no one writes."""
    if subject.family.key in LIKE_LANGUAGE and cell.spelling in BARE:
        return True
    return any(reason in message and not set(to).isdisjoint(cell.args) for reason, to in REASONS.items())
