"""Write small models and adapters for all tests, by the official safetensors and never by loratool."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's: pytest's processes have the cores

import pytest
import torch
from click.testing import CliRunner
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratool.architectures.families import FAMILIES
from loratool.architectures.families.table import ModelFamily
from loratool.numerics.passes.native import describe_native

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# else each command that a test starts compiles the whole package again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: threads that wait for each other's cores take twice the time
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples each time: a run of CI says what the commit changed, on a machine of any speed. To search for new
# ones: pytest --hypothesis-profile=default
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
SHARED = ROOT.parent / "shared" / "data"
FOLDERS = itertools.count()
MOST_CASES = 2  # of one test in the default run, which is to take less than five minutes on two cores

# Runs the command line and ends with its peak RSS in kB on stderr. (What wait4 tells of a child includes its
# parent's RSS at the fork, which here is pytest's.)
MEASURED = [
    sys.executable,
    "-c",
    "import os, sys; leave = os._exit\n"
    "def report(code):\n"
    "    peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
    "    print(peak.split()[1], file=sys.stderr, flush=True)\n"
    "    leave(code)\n"
    "os._exit = report\n"
    "from loratool.cli import main; main()",
]

# folders of packages that can not be installed beside the others: `pip install --no-deps --target FOLDER/NAME PACKAGES`
ORACLES = Path(os.environ.get("LORATOOL_ORACLES", ROOT.parent / "oracles"))

# checkouts of programs that load adapters of image models, by their names; their README has the commits
PROGRAMS = Path(os.environ.get("LORATOOL_PROGRAMS", ROOT.parent / "programs"))

needs_passes = pytest.mark.skipif(describe_native().startswith("none"), reason="compiled passes: " + describe_native())
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data (real adapters) is not here")


def oracle_folder(name: str, packages: str) -> str:
    """Return the folder of an oracle that has one of its own, to be put first in a process's path; else skip."""
    folder = ORACLES / name
    if not folder.is_dir():
        pytest.skip(f"needs `pip install --no-deps --target {folder} {packages}`")
    return str(folder)


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model folder as transformers does: `model.safetensors`, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else metadata
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata=dict(metadata))
        return folder
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata=dict(metadata))
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_peft(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """Write a PEFT adapter folder; `factors` maps a module path to (A, B)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (A, B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = len(next(iter(factors.values()))[0])
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(factors), **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def write_kohya(
    file: Path, factors: Mapping[str, tuple[Tensor, Tensor]], alpha: Tensor | None = None, prefix: str = "lora_unet"
) -> Path:
    tensors = {}
    for module, (A, B) in factors.items():
        name = f"{prefix}_{module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = A.contiguous()
        tensors[f"{name}.lora_up.weight"] = B.contiguous()
        if alpha is not None:
            tensors[f"{name}.alpha"] = alpha.clone()
    save_file(tensors, file, metadata={"ss_network_module": "networks.lora"})
    return file


def load_model(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a file or a folder, by the official library."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def factors(out: int, inp: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, inp, generator=g) / inp**0.5
    return A.to(dtype), (torch.randn(out, rank, generator=g) * 0.02).to(dtype)


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000)) * 0.02).to(dtype)


def bits(x: Tensor) -> Tensor:
    """Return the bytes of a tensor, for comparisons that tell -0.0 from 0.0 and one nan from another."""
    return x.contiguous().view(torch.uint8)


def run_command(*argv: object) -> Any:
    """Run the command line in this process through its error boundary: `.exit_code`, `.stdout`, `.stderr`."""
    import click

    from loratool.cli import _run

    @click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
    @click.argument("argv", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def boundary(ctx: click.Context, argv: tuple[str, ...]) -> None:
        ctx.exit(_run(list(argv)))

    return CliRunner().invoke(boundary, [str(a) for a in argv], catch_exceptions=False)


def slow(*case: Any) -> Any:
    """Return a parameter that the default run leaves to `-m slow`."""
    return pytest.param(*case, marks=pytest.mark.slow)


def few(every: Iterable[Any], *default: Any) -> list[Any]:
    """Return all values of a parameter, slow but for those that are named."""
    every = [*every]
    assert set(default) <= set(every)
    return [each if each in default else slow(each) for each in every]


def spread(every: Iterable[Any], count: int) -> list[Any]:
    """Return all cases (a tuple is one of several parameters), slow but for so many that lie evenly among them."""
    every = [*every]
    default = {round(i * (len(every) - 1) / max(1, count - 1)) for i in range(count)}
    return [
        each if i in default else slow(*(each if isinstance(each, tuple) else (each,))) for i, each in enumerate(every)
    ]


def covering(*dimensions: Iterable[Any], never: Callable[..., bool] = lambda *case: False) -> list[Any]:
    """Return the product as parameters, slow but for a few in which any two values of two dimensions meet.

    never: tells the cases that are always slow.
    """
    cases = [*itertools.product(*map(list, dimensions))]
    pairs = {i: {*itertools.combinations(enumerate(map(repr, cases[i])), 2)} for i in range(len(cases))}
    some = [i for i, case in enumerate(cases) if not never(*case)]
    left, few = set[Any]().union(*(pairs[i] for i in some)), set[int]()
    while left:
        few.add(best := max(some, key=lambda i: len(pairs[i] & left)))
        left -= pairs[best]
    ids = ["-".join(map(str, case)) for case in cases]
    return [pytest.param(*c, id=ids[i], marks=() if i in few else pytest.mark.slow) for i, c in enumerate(cases)]


@contextmanager
def any_widths(*keys: str) -> Iterator[None]:
    """Let these families have any widths: by those of their known models, narrow ones are of no family."""
    before = {key: FAMILIES[key] for key in keys if key in FAMILIES}
    FAMILIES.update({key: without_widths(family) for key, family in before.items()})
    try:
        yield
    finally:
        FAMILIES.update(before)


@cache
def without_widths(family: ModelFamily) -> ModelFamily:
    """Return a table whose index is kept for all tests."""
    return replace(family, widths=())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while tests are collected, half of whose time that takes, nor later in what was collected,
    and while they run seldom: what they import, and each looks through, are millions of objects.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to `-m slow` all cases of a test but MOST_CASES that lie evenly among them, where more are not slow yet.

    Not of the modules that stand beside the folders: they hold the whole project, and each case is a rule.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("slow") and item.path.parent != ROOT / "tests":
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for some in cases.values():
        kept = {round(i * (len(some) - 1) / (MOST_CASES - 1)) for i in range(MOST_CASES)}
        for i, item in enumerate(some):
            if len(some) > MOST_CASES and i not in kept:
                item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "the fuzzers of tests/fuzz: pytest -m fuzz --fuzz-seconds 60")
    group.addoption("--fuzz-seconds", type=float, default=0.0, help="how long each runs; a few seeds without it")
    group.addoption("--fuzz-seed", type=int, help="the only seed to run")


@pytest.fixture(scope="session")
def case_server() -> Iterator[Any]:
    from fuzzing import Server  # beside the fuzzers, and of them alone

    server = Server()
    yield server
    server.close()


@pytest.fixture
def fuzz(
    request: pytest.FixtureRequest, case_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Any]:
    """Give the `Fuzzer` of a test, and print how many cases a long run tried."""
    from fuzzing import Fuzzer

    if sys.platform != "linux":
        pytest.skip("the server of cases needs Linux: pidfd, memfd, and the peak of a process's memory")
    option, name = request.config.getoption, request.node.name.removeprefix("test_")
    fuzzer = Fuzzer(name, case_server, tmp_path, option("--fuzz-seconds"), option("--fuzz-seed"))
    yield fuzzer
    if fuzzer.seconds:
        with capsys.disabled():
            print(f"\n{name}: {fuzzer.ran:,} seeds")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from lib.browser.page_files import Made  # beside the tests of pages in a browser, and of them alone

    return Made(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")  # playwright's loop of events would be in the way of other modules'
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install '.[browser]'")
    from lib.browser.watching import chromium

    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(**chromium())
        yield opened
        opened.close()


@pytest.fixture
def watch(browser: Any) -> Iterator[Any]:
    """Open pages in the browser, and hold after the test that none complained or reached for the network."""
    from lib.browser.watching import Watch

    watch = Watch(browser)
    yield watch
    watch.close()


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("module")


@pytest.fixture
def tmp_path(module_folder: Path, request: pytest.FixtureRequest) -> Path:
    """Return a new folder. pytest's own fixture reads the names of all tests' folders each time, thousands of them."""
    folder = module_folder / f"{next(FOLDERS)}-{request.node.originalname}"[:60]
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same numbers in every run, also in tests that draw from torch's own generator.

    `torch.manual_seed` would format a stack for each kind of accelerator, which no test draws on before it seeds it.
    """
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def templates_compiled_once() -> Iterator[None]:
    """Keep what jinja2 makes of a template: PEFT compiles that of its cards each time that it saves an adapter."""
    import jinja2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", lru_cache(maxsize=8)(jinja2.Environment.compile))
        yield


@pytest.fixture
def narrow() -> Iterator[None]:
    with any_widths("sd1", "sdxl", "flux", "hunyuan_video"):
        yield


@pytest.fixture
def few_families(narrow: None) -> Iterator[None]:
    """Know few image families, for modules so small or so few that others have them too."""
    with only_families("sd1", "sd2", "sdxl", "sd3", "flux"):
        yield


@contextmanager
def only_families(*keys: str) -> Iterator[None]:
    """Know these image families only; the table's order, which counts, comes back with the others."""
    importlib.import_module("loratool.adapters.formats")  # reads the table when it is imported
    every = dict(FAMILIES)
    for key in every.keys() - {*keys}:
        del FAMILIES[key]
    try:
        yield
    finally:
        FAMILIES.clear()
        FAMILIES.update(every)


@pytest.fixture(scope="session", autouse=True)
def no_variable_of_tests() -> Iterator[None]:
    """Hide from the command line what ORACLES and PROGRAMS were read from: they set no option, which it warns of."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LORATOOL_ORACLES", "LORATOOL_PROGRAMS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def run() -> Callable[..., Any]:
    return run_command


@pytest.fixture
def types_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the library's calls again in a test that adds a row: their types are read from the tables once."""
    for name, module in [*sys.modules.items()]:
        package, _, last = name.rpartition(".")
        if package.startswith("loratool.commands") and last in ("call", "namings"):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.setattr(sys.modules[package], last, module)
