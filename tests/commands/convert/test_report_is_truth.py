"""Hold each report of `convert` to the file that it is of: the file does what the report says.

The cases are the product of the project's own tables: formats that are written, runtimes, kinds of updates, --dtype,
--rank, --plain, --layout and image families. The adapter and what was made of it are merged into one float64 base
(other tests hold merges to fractions), and what the report says is compared with the difference:

- error: ||D' - D|| / ||D|| of the tensors that a row's sources change, to 5 %,
- how: `truncated` where directions were cut off, `rounded` where numbers were, another word where the error is 0,
- rank: that and the alpha as the file is read again; --rank raises none,
- dtype: --dtype is the type of every factor in the file,
- count: each row is a module of the file, and each module there that changes anything has a row; so are the sizes,
- rest: what has no row is merged as before, or is named in `dropped`,
- warning: there is one where a module loses more than 5 %, and what it says is lost in all is,
- card: it says "equal bit for bit" where no row has an error, and only there.

A conversion that is refused by name says nothing that could be untrue. What fails today is in EXPECTED, and a case
that stops failing is a failure until its entry goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import any_widths, load_model, only_families
from lib.models.converted_sources import IMAGE, LANGUAGE, NEED_WEIGHTS, Source, split, write_family, write_image
from lib.models.image_layouts import MODELS
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import FORMATS, loaded_by, open_adapter, usual_format, written_formats
from loratool.adapters.stacked import stack_factors
from loratool.adapters.updates import UPDATES
from loratool.adapters.updates.diff import Diff
from loratool.adapters.updates.dora import DoRA
from loratool.adapters.updates.oft import OFT
from loratool.architectures.families import FAMILIES
from loratool.architectures.runtimes.table import RUNTIMES
from loratool.commands.choices import QKV_LAYOUTS
from loratool.commands.convert.adapter import CONVERT_DTYPES
from loratool.errors import LoratoolError, NeedsFlag
from loratool.files.dtypes import FACTOR_DTYPES, SAFETENSORS
from loratool.files.output.output import CONTAINERS
from loratool.views.convert import ConvertReport, ModuleConvert

WHOLE = (Diff, OFT)  # kinds without factors that are carried over
CUT = 0.02  # an error that rounding does not reach here, and cutting directions always passes
FLOOR = 3e-7  # of float32, in which what is made of DoRA is computed
HERE = "model.layers.0.self_attn.o_proj"  # a module that every adapter of a language model has, but for experts


NUMBERED = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}  # names of experts' matrices in Mixtral's files


@dataclass(frozen=True)
class Way:
    """Options of `convert`."""

    to: str  # a key of FORMATS
    options: Mapping[str, Any]
    base: bool = False


@dataclass(frozen=True)
class Case:
    """A conversion."""

    source: str
    way: str
    dtype: str = "keep"
    rank: int | None = None

    def __str__(self) -> str:
        dtype, rank = f" --dtype {self.dtype}" * (self.dtype != "keep"), f" --rank {self.rank}" * bool(self.rank)
        return f"{self.source} | {self.way}{dtype}{rank}"


def language_ways() -> dict[str, Way]:
    one = {key: format.can for key, format in written_formats().items() if format.can.components == "one"}
    peft = usual_format("model").key
    ways = {f"to {key}": Way(key, {"to": key}, can.depends_on_base) for key, can in one.items()}
    ways |= {f"{name} --plain": Way(way.to, {**way.options, "plain": True}, way.base) for name, way in ways.items()}
    ways[f"to {peft} --base"] = Way(peft, {"to": peft}, True)
    ways |= {f"to {peft} --layout {each}": Way(peft, {"to": peft, "layout": each}, True) for each in QKV_LAYOUTS}
    ways[f"to {peft} --exclude"] = Way(peft, {"to": peft, "exclude": HERE})
    return ways | {f"for {key}": Way(loaded_by(key).key, {"runtime": key}, True) for key in RUNTIMES}


def image_ways() -> dict[str, Way]:
    ways = {f"to {key}": Way(key, {"to": key}) for key in written_formats()}
    return ways | {f"{name} --plain": Way(way.to, {**way.options, "plain": True}) for name, way in ways.items()}


LANGUAGE_WAYS, IMAGE_WAYS = language_ways(), image_ways()
DTYPES = tuple({dtype: name for name, dtype in reversed(CONVERT_DTYPES.items())}.values())
RANKS = (1, 64)  # below and above the rank of every adapter
IMAGES = [f"{model} {kind}" for model in MODELS for kind in IMAGE]
FAMILY = [f"family {key}" for key, family in FAMILIES.items() if family.components[0].kohya]


def ways_of(source: str) -> dict[str, Way]:
    return LANGUAGE_WAYS if source in LANGUAGE else IMAGE_WAYS


SHAPES = ("lora", "lora experts", "dora")  # of language models' adapters


def cases() -> Iterator[Any]:
    """Yield the product; by default all sources in all ways, and in each way each type and each rank."""
    for source in (*LANGUAGE, *IMAGES, *FAMILY):
        for name, way in ways_of(source).items():
            cuts = way.options.get("plain") or "runtime" in way.options
            for dtype in DTYPES:
                for rank in (None, *RANKS) if cuts else (None,):
                    case = Case(source, name, dtype, rank)
                    yield pytest.param(case, id=str(case), marks=() if is_representative(case) else pytest.mark.slow)


def is_representative(case: Case) -> bool:
    """Return whether a case is of the default run, in which shapes take turns at options, kinds at runtimes, and two
    image models at kinds and ways.
    """
    kind = case.source.partition(" ")[2]
    way = [*ways_of(case.source)].index(case.way)
    if case.source in FAMILY:
        return case == Case(case.source, "to diffusers") and [*FAMILY].index(case.source) % 3 == 0
    if case.dtype != "keep" or case.rank is not None:
        turn = way + DTYPES.index(case.dtype) + (case.rank == RANKS[0])
        alone = case.dtype == "keep" or case.rank is None
        return alone and case.source in ("flux lora", SHAPES[turn % len(SHAPES)])
    if case.source in LANGUAGE:
        every = case.source in SHAPES or not case.way.startswith("for ")
        return (way + [*LANGUAGE].index(case.source)) % (4 if every else 12) == 0
    return case.source == f"{('flux', 'sdxl')[(way + [*IMAGE].index(kind)) % 2]} {kind}"


# The number of an issue, an expression of cases, and the checks that fail there
EXPECTED: tuple[tuple[str, str, str], ...] = ()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("truth")


@cache
def source_of(name: str, folder: Path) -> Source:
    if name in LANGUAGE:
        return LANGUAGE[name].write(folder / name)
    if name in FAMILY:
        return write_family(folder / name, name.removeprefix("family "))
    model, _, kind = name.partition(" ")
    return write_image(folder / name, model, kind)


def merged(source: Source, adapter: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    """Return the tensors of the merge, into the base in the layout that the adapter has, with nothing fused in it."""
    out = out if source.family is None else out.with_suffix(".safetensors")
    for base in (source.base, *source.others):
        try:
            loratool.merge(base, adapter, out, undo=False, force=True, card=False, **options)
            break
        except LoratoolError:
            if base == (source.base, *source.others)[-1]:
                raise
    return split(load_model(out)) if source.family is None else load_model(out)


@cache
def merged_source(name: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the base, and the source's merge."""
    source = source_of(name, folder)
    base = load_model(source.base)
    return split(base) if source.family is None else base, merged(source, source.adapter, folder / "one")


def convert(case: Case, folder: Path, out: Path, **more: Any) -> ConvertReport:
    way, source = ways_of(case.source)[case.way], source_of(case.source, folder)
    options = {**way.options, "dtype": case.dtype, "force": True, **more}
    options |= {"rank": case.rank} if case.rank else {}
    if way.base or (options.get("plain") and NEED_WEIGHTS & {*case.source.split()}):
        options["base"] = source.base
    report: Any = loratool.convert(source.adapter, out, **options)
    assert isinstance(report, ConvertReport)
    return report


@cache
def natural_ranks(case: Case, folder: Path) -> dict[str, int]:
    """Return the rank of each module without --rank, or where it needs one, at most."""
    out = output_of(case, folder)
    try:
        report = convert(case, folder, out, dry_run=True)
    except NeedsFlag as error:
        assert "--rank R" in str(error.remedy)
        report = convert(case, folder, out, dry_run=True, rank=1 << 20)
    return {row.name: row.rank for row in report.modules}


def output_of(case: Case, folder: Path) -> Path:
    way = ways_of(case.source)[case.way]
    is_folder = FORMATS[way.to].can.folder or ("runtime" in way.options and RUNTIMES[way.options["runtime"]].modelfile)
    return folder / ("out" if is_folder else "out" + CONTAINERS[FORMATS[way.to].container][0])


@pytest.mark.parametrize("case", [*cases()])
def test_the_file_does_what_the_report_says(case: Case, folder: Path) -> None:
    problems = problems_of(case, folder)
    if problems is None:
        return
    expected = {
        check: number
        for number, cases, checks in EXPECTED
        if re.fullmatch(cases, str(case))
        for check in checks.split()
    }
    said = "".join(f"\n{check}: {text}" for check, text in problems)
    found = {check for check, _ in problems}
    assert found <= expected.keys(), f"{case}{said}"
    assert found == expected.keys(), f"{case}: {expected} is mended in part or all: take it out of EXPECTED{said}"
    if expected:
        pytest.xfail(f"issue 42, {expected}{said}")


def problems_of(case: Case, folder: Path) -> list[tuple[str, str]] | None:
    """Return each check that fails, with the module, what is said of it, and the truth; None if convert refuses."""
    with ExitStack() as opened:
        if case.source not in LANGUAGE:
            key = source_of(case.source, folder).family or ""
            opened.enter_context(only_families(key))
            opened.enter_context(any_widths(*(() if case.source in FAMILY else (key,))))
        try:
            report = convert(case, folder, output_of(case, folder))
        except LoratoolError:
            return None
        return list(Comparison(case, folder, report).problems())


class Comparison:
    """What a report says, beside what its file does."""

    def __init__(self, case: Case, folder: Path, report: ConvertReport) -> None:
        self.case, self.folder, self.report = case, folder, report
        self.source, self.path = source_of(case.source, folder), Path(report.out)
        self.file = next(self.path.glob("*.gguf"), self.path) if self.path.is_dir() else self.path
        self.to = FORMATS[report.to]
        self.W, self.one = merged_source(case.source, folder)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield each check that fails, with the module, what is said of it, and the truth."""
        alphas = {row.alpha for row in self.report.modules} if self.to.can.alpha == "none" else set()
        if len(alphas) < 2:  # else no one alpha, as readers of such files ask for, is of all modules
            options = {"alpha": alphas.pop()} if alphas else {}
            with ExitStack() as opened:
                read = open_adapter(self.file, **options, model=self._model(), runtime=self.report.runtime or "")
                opened.callback(read.file.close)
                yield from self._ranks(read)
                yield from self._counts(read)
                yield from self._errors(read, merged(self.source, self._of_files(), self.folder / "two", **options))
        yield from self._stored()
        yield from self._card()

    def _model(self) -> dict[str, Any]:
        """Return the base's config.json, but for a format whose modules a report names as its own files do."""
        config = self.source.base / "config.json"
        return json.loads(config.read_text()) if config.is_file() and not self.to.can.named_by_model else {}

    def _of_files(self) -> Path:
        """Return the output, its experts' matrices under the names of the base's files if a runtime has others."""
        if not self.case.way.startswith("for ") or self.file.suffix == ".gguf":
            return self.file
        tensors = load_model(self.file)
        names = {name: re.sub(r"(?<=\.experts\.)(\d+)\.w([123])\.", _by_name, name) for name in tensors}
        if names.keys() == {*names.values()}:
            return self.file
        copy = self.folder / "renamed"
        copy.mkdir(exist_ok=True)
        save_file({names[name]: tensor for name, tensor in tensors.items()}, copy / "adapter_model.safetensors")
        config = (self.file / "adapter_config.json").read_text()
        for number, name in NUMBERED.items():
            config = re.sub(rf"\bw{number}\b", name, config)
        (copy / "adapter_config.json").write_text(config)
        return copy

    def _ranks(self, read: Adapter) -> Iterator[tuple[str, str]]:
        rows, cut = self.report.modules, self.case.rank
        natural = natural_ranks(Case(self.case.source, self.case.way), self.folder) if cut else {}
        for row in rows:
            update = read.updates.get(row.name)
            if update is None:
                continue
            if not update.rank and (row.rank, row.alpha) == (0, 0.0):
                continue
            rank = max(each.rank for each in rows) if self.to.can.one_scale else row.rank
            if update.rank != rank:
                yield "rank", f"{row.name}: said rank {row.rank}, is {update.rank}"
            if abs(update.scale - row.alpha / row.rank) > 1e-6 * abs(update.scale):
                yield "rank", f"{row.name}: said scale {row.alpha} / {row.rank}, is {update.scale}"
            if cut and row.rank > natural[row.name] and "dora" not in self.case.source:
                yield "rank", f"{row.name}: --rank {cut} raised {natural[row.name]} to {row.rank}"

    def _counts(self, read: Adapter) -> Iterator[tuple[str, str]]:
        named = {row.name for row in self.report.modules}
        factors = {module: update for module, update in read.updates.items() if update.rank or update.cls in WHOLE}
        for module in named - factors.keys():
            yield "count", f"{module}: said to be there, is not among {sorted(factors)[:3]}, ..."
        for module in factors.keys() - named:
            loaded = read.load(factors[module])
            if isinstance(loaded, WHOLE) or any(side.any() for side in stack_factors(loaded)[:1]):
                yield "count", f"{module}: is there, said nowhere"

    def _errors(self, read: Adapter, two: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        groups: dict[tuple[str, ...], list[ModuleConvert]] = {}
        for row in self.report.modules:
            groups.setdefault(row.sources, []).append(row)
            if bool(row.error) != (row.how in ("rounded", "truncated")):
                yield "how", f"{row.name}: said {row.how} with an error of {row.error:.2e}"
        under = self.W | weights_under(self.source.adapter)
        seen, parts = set(), list[tuple[Tensor, Tensor]]()
        for sources, rows in groups.items():
            names = [name for module in sources for name in self.source.touched(module)]
            seen |= {*names}
            if any(row.error and self._keeps_norm(read, row) for row in rows):
                true = self._before_norm(read, rows[0])
                if true is None:
                    continue
            else:
                D, new = (torch.cat([(x[n] - under[n]).flatten() for n in names]) for x in (self.one, two))
                true = float((new - D).norm() / D.norm())
                parts.append((D, new))
            least, most = min(row.error for row in rows), max(row.error for row in rows)
            if not 0.95 * least - FLOOR <= true <= most / 0.95 + FLOOR:
                yield "error", f"{rows[0].name}: said {most:.2e} ({rows[0].how}), is {true:.2e}"
            for row in rows:
                size = true if len(rows) == 1 else row.error
                if (size > CUT) != (row.how == "truncated"):
                    yield "how", f"{row.name}: said {row.how}, is {size:.2e} off"
        yield from self._warnings(parts)
        dropped = {name for module in self.report.dropped for name in (module, *self.source.touched(module))}
        for name, tensor in two.items():
            if name in seen:
                continue
            wanted = (self.W if name in dropped else self.one)[name]
            if float((tensor - wanted).norm()) > FLOOR * float(wanted.norm()):
                yield (
                    "rest",
                    f"{name}: said nothing of it, is {float((tensor - wanted).norm() / wanted.norm()):.2e} off",
                )

    def _warnings(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, str]]:
        weak = any(float((new - D).norm()) > 0.05 * float(D.norm()) for D, new in parts)
        said = [re.search(r"([\d.]+)% is lost in all", warning) for warning in self.report.warnings]
        if weak != bool(said):
            yield "warning", f"{len(said)} warnings, modules {'' if weak else 'do not '}lose more than 5 %"
        if weak and said and said[0]:
            D, new = (torch.cat(each) for each in zip(*parts, strict=True))
            true = float((new - D).norm() / D.norm())
            if abs(float(said[0][1]) / 100 - true) > 0.05 * true:
                yield "warning", f"said {said[0][1]} % is lost in all, is {100 * true:.3g} %"

    def _keeps_norm(self, read: Adapter, row: ModuleConvert) -> bool:
        return row.name in read.updates and read.updates[row.name].cls is DoRA

    def _before_norm(self, read: Adapter, row: ModuleConvert) -> float | None:
        """Return the error of DoRA's factors alone, which is what is said where a file keeps the magnitudes.

        It is None where their rows are others, those of a module that was split or fused, or whose halves are swapped.
        """
        with ExitStack() as opened:
            source = open_adapter(self.source.adapter)
            opened.callback(source.file.close)
            updates = (source, source.updates[row.sources[0]]), (read, read.updates[row.name])
            one, two = (stack_factors(a.load(u.cls.without_norm(u))) for a, u in updates)
        D, new = (B @ A for B, A in (one, two))
        true = float(np.linalg.norm(new - D) / np.linalg.norm(D)) if D.shape == new.shape else 1.0
        return true if true < 1.0 else None

    def _stored(self) -> Iterator[tuple[str, str]]:
        found = dict(stored(self.file))
        if self.case.dtype != "keep":
            asked = FACTOR_DTYPES[self.case.dtype]
            for name, (dtype, _) in found.items():
                if is_factor(name) and dtype != asked:
                    yield "dtype", f"{name}: asked for {asked}, is {dtype}"
        sizes = sum(size for _, size in found.values())
        if sizes != self.report.parameters:
            yield "count", f"said {self.report.parameters} parameters, are {sizes}"

    def _card(self) -> Iterator[tuple[str, str]]:
        card = self.path / "README.md"
        if self.path.is_dir() and card.is_file():
            exact = not any(row.error for row in self.report.modules)
            if ("equal bit for bit" in card.read_text()) != exact:
                yield "card", f"README.md: said {'no ' * exact}loss to the bit, rows are {'' if exact else 'not '}exact"


def _by_name(found: re.Match[str]) -> str:
    return f"{found[1]}.{NUMBERED[found[2]]}."


def weights_under(adapter: Path) -> dict[str, Tensor]:
    """Return the weights that a language model's adapter has under factors, which are no part of their change."""
    mark, found = ".base_layer.weight", load_model(adapter)
    names = {key: key.removeprefix("base_model.model.").replace(mark, ".weight") for key in found if key.endswith(mark)}
    return {name: found[key].double() for key, name in names.items()}


def is_factor(name: str) -> bool:
    return "lora" in name and not any(
        mark in name for mark in ("magnitude", "dora_scale", ".alpha", ".bias", "base_layer")
    )


def stored(path: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield each tensor of a file, by its own library as far as there is one, with its type and size."""
    if path.suffix == ".gguf":
        for tensor in gguf.GGUFReader(path).tensors:
            yield tensor.name, (tensor.tensor_type.name, tensor.n_elements)
    elif path.suffix in (".bin", ".pt"):
        for name, value in torch.load(path, weights_only=True).items():
            yield name, (SAFETENSORS[str(value.dtype).removeprefix("torch.")], value.numel())
    else:
        for name, value in load_model(path).items():
            yield name, (SAFETENSORS[str(value.dtype).removeprefix("torch.")], value.numel())


def test_every_kind_of_update_is_tried(folder: Path) -> None:
    found = set()
    for name in (*LANGUAGE, *(each for each in IMAGES if each.startswith("sdxl"))):
        adapter = open_adapter(source_of(name, folder).adapter)
        found |= {update.kind for update in adapter.updates.values()}
        adapter.file.close()
    assert found == {*UPDATES}


@pytest.mark.parametrize("way", LANGUAGE_WAYS)
def test_every_way_writes_something(way: str, folder: Path) -> None:
    source = "lora fused" if way.endswith("--layout split") else "lora"
    assert problems_of(Case(source, way), folder) == []


@pytest.mark.parametrize("way", IMAGE_WAYS)
def test_every_way_writes_an_image_models(way: str, folder: Path) -> None:
    found = problems_of(Case("flux lora", way), folder)
    assert (found is None) == FORMATS[IMAGE_WAYS[way].to].can.depends_on_base, "only those of language models refuse it"
    assert not found


def test_what_is_expected_to_fail_is_tried() -> None:
    tried = [str(each.values[0]) for each in cases()]
    unused = [cases for _, cases, _ in EXPECTED if not any(re.fullmatch(cases, case) for case in tried)]
    assert not unused
