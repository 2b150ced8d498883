"""Let changes in place fail, stop, and lose their power at every call; then end them forward, and take them back.

Whatever happens, the model's name means the old model or the new one, bit for bit, or nothing while the model waits
for `recover`, which leads to the new one, or to the old one with --back. The default run takes a seeded sample of the
points, `slow` all of them, and kills a process at random times.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from cases import AtOnce
from conftest import factors, weights, write_model, write_peft
from faulty_disk import FAILURES, STOPS, Faulty, Stopped, applies, no_fault, replaced
from power_loss import FATES, Recorder
from safetensors.torch import load_file, save_file
from scenarios import Files, call, done, files_of, put

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="folders can be synced on POSIX alone")
SAMPLE = 12  # points of a way in the default run
LAYER = "model.layers.0.self_attn"
TORN = {**FATES, "torn": lambda number, step: "kept" if step.names else "torn"}


@dataclass(frozen=True)
class Way:
    """A change in place. old: the commands that make the model. back: whether it can be taken back."""

    command: str
    old: tuple[str, ...]
    model: str = "m"
    back: bool = True


FILE = "m.safetensors"
MERGES = {
    "merge": Way("merge m adapter", ("copy base m",)),
    "merge, second": Way("merge m dora", ("merge base adapter -o m",)),
    "merge, file": Way(f"merge {FILE} adapter", (f"copy base.safetensors {FILE}",), FILE),
    "merge, file, second": Way(f"merge {FILE} dora", (f"merge base.safetensors adapter -o {FILE}",), FILE),
    "unmerge": Way("unmerge m dora", ("merge base adapter -o m", "merge m dora --in-place")),
    "unmerge, file": Way(
        f"unmerge {FILE} adapter", (f"copy base.safetensors {FILE}", f"merge {FILE} adapter --in-place"), FILE
    ),
}
MERGES |= {
    "swap": Way("merge m dora --replace adapter", ("merge base adapter -o m",)),
    "swap, second": Way(
        "merge m dora:0.5 --replace dora", ("copy base m", "merge m adapter --in-place", "merge m dora --in-place")
    ),
    "swap, file": Way(
        f"merge {FILE} both --replace adapter",
        (f"copy base.safetensors {FILE}", f"merge {FILE} adapter --in-place"),
        FILE,
    ),
}
WAYS = {
    **{
        f"{name}, {by}": Way(f"{way.command} --in-place --by {by}", way.old, way.model)
        for by in ("shard", "window")
        for name, way in MERGES.items()
    },
    "unmerge, other headers": Way(
        f"unmerge {FILE} adapter --in-place", (f"merge base.safetensors adapter -o {FILE}",), FILE
    ),
    "apply": Way("apply m once.patch twice.patch --in-place", ("copy base m",)),
    "apply, reverse": Way("apply m once.patch --reverse --in-place", ("copy once m",)),
    "apply, file": Way(f"apply {FILE} file.patch --in-place", (f"copy base.safetensors {FILE}",), FILE),
    "apply, of slime": Way("apply m delta --in-place", ("copy base m",), back=False),
}


@pytest.fixture(scope="module")
def stage() -> Iterator[Files]:
    """Make the inputs in memory, and be in their folder."""
    before, threads, memory = os.getcwd(), torch.get_num_threads(), Path("/dev/shm")
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("loratool.streaming.parallel.MAX_WORKERS", 1)
        patch.setattr("loratool.streaming.in_place.WINDOW", 400)
        for module in ("parallel", "workers"):
            patch.setattr(f"loratool.streaming.{module}.ThreadPoolExecutor", AtOnce)
        os.chdir(folder)
        try:
            make_inputs(Path(folder), 12, 10)
            for ending in ("", ".safetensors"):
                done(f"merge base{ending} adapter -o once{ending} --no-undo --no-card")
            done("merge once adapter:0.5 -o twice --no-undo --no-card")
            done("patch base once -o once.patch")
            done("patch once twice -o twice.patch")
            shutil.copy("base.safetensors", "same.safetensors")  # whose header stays, so that its tensors do
            done("merge same.safetensors adapter --in-place --no-card")
            done("patch base.safetensors same.safetensors -o file.patch")
            done("patch base once --to disk-delta --step 1 -o delta")
            yield files_of(Path.cwd())
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)


def make_inputs(folder: Path, out: int, width: int) -> None:
    names = ("q_proj", "k_proj", "v_proj")
    tensors = {f"{LAYER}.{n}.weight": weights(out, width, seed=s, dtype=torch.bfloat16) for s, n in enumerate(names)}
    write_model(folder / "base", tensors, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, shards=2)
    save_file(tensors, folder / "base.safetensors", metadata={"format": "pt"})
    pairs = {f"{LAYER}.{name}": factors(out, width, 3, seed) for seed, name in enumerate(("q_proj", "v_proj"))}
    write_peft(folder / "adapter", pairs, base_model_name_or_path="base")
    write_peft(folder / "both", {f"{LAYER}.{name}": factors(out, width, 1, 9) for name in names[:2]})
    dora = write_peft(folder / "dora", {f"{LAYER}.k_proj": factors(out, width, 2, 7)}, use_dora=True)
    magnitude = {f"base_model.model.{LAYER}.k_proj.lora_magnitude_vector": weights(out).abs() + 0.5}
    tensors = load_file(dora / "adapter_model.safetensors")
    save_file({**tensors, **magnitude}, dora / "adapter_model.safetensors")


class Change:
    """A change in place, what is there before it, and what an undisturbed run makes of that."""

    def __init__(self, way: Way, stage: Files) -> None:
        self.way, self.folder = way, Path.cwd()
        put(self.folder, stage)
        for command in way.old:
            verb, first, last, *_ = command.split()
            if verb == "copy":
                shutil.copytree(first, last) if Path(first).is_dir() else shutil.copy(first, last)
            else:
                done(command)
        self.before = files_of(self.folder)
        run = self.run(no_fault())
        assert run.code == 0, run.said
        self.calls, self.after = run.names, files_of(self.folder)
        assert self.after != self.before
        self.sound: set[frozenset[tuple[str, bytes]]] = set()

    def run(self, faulty: Faulty) -> Faulty:
        put(self.folder, self.before)
        with replaced(faulty):
            faulty.code, faulty.said = call(self.way.command)
        return faulty

    def check(self, now: Files) -> None:
        """Check what a death left, and that it can be ended both ways."""
        if (state := frozenset(now.items())) in self.sound:
            return
        place = f"{self.way.model}.loratool-in-place"
        if not any(name.split("/")[0] == place for name in now):
            left = {name: data for name, data in now.items() if "loratool-ended" not in name}
            assert left in (self.before, self.after), "neither old nor new"
            self.sound.add(state)
            return
        is_away = any(name.startswith(f"{place}/{self.way.model}") for name in now)
        assert is_away is not any(name.split("/")[0] == self.way.model for name in now), "it has two names, or none"
        for flags, expected in (((), self.after), (("--back",), self.before))[: 1 + self.way.back]:
            put(self.folder, now)
            code, said = call(f"recover {self.way.model}", *flags)
            found = {name: data for name, data in files_of(self.folder).items() if "loratool-ended" not in name}
            if is_away:
                assert code == 0, f"recover {flags}: {said}"
                assert found == expected, f"recover {flags} makes something else"
            else:
                assert found in (self.before, self.after), f"recover {flags}: neither old nor new"
        if is_away:
            put(self.folder, now)
            code, said = call(self.way.command)
            assert code == 0 and files_of(self.folder) == self.after, f"the same call does not go on: {said}"
        self.sound.add(state)

    def fail(self, kind: str, at: int) -> None:
        run = self.run(Faulty(kind, at))
        assert run.code in (0, 3, 5), run.said
        assert kind != "short" or run.code == 0, run.said
        now = files_of(self.folder)
        if run.code and any(name.startswith(f"{self.way.model}.loratool-in-place/{self.way.model}") for name in now):
            assert "loratool recover" in run.said, run.said
        self.check(now)

    def stop(self, kind: str, at: int) -> None:
        with pytest.raises(Stopped):
            self.run(Faulty(kind, at))
        self.check(files_of(self.folder))

    def points(self) -> list[tuple[str, int]]:
        return [(kind, at) for at, name in enumerate(self.calls) for kind in (*FAILURES, *STOPS) if applies(kind, name)]

    def visit(self, kind: str, at: int) -> None:
        try:
            self.stop(kind, at) if kind in STOPS else self.fail(kind, at)
        except AssertionError as error:
            raise AssertionError(f"{kind} at {at} ({self.calls[at]}): {error}") from error

    def lose_power(self, draw: Random | None = None) -> int:
        """Let the power fail after each step, with each fate of what is not safe, or in a sample of these."""
        put(self.folder, self.before)
        recorder = Recorder(self.folder)
        with replaced(recorder):
            assert call(self.way.command)[0] == 0
        fates = {**recorder.ways(len(recorder.steps), 3), **TORN}
        points = [(step, fate) for step in range(recorder.start, len(recorder.steps) + 1) for fate in fates]
        for step, fate in draw.sample(points, SAMPLE) if draw else points:
            try:
                self.check(recorder.after(step, fates[fate]))
            except AssertionError as error:
                raise AssertionError(
                    f"power lost after {step} of {len(recorder.steps)} steps, {fate}: {error}"
                ) from error
        return len(points)


@pytest.mark.parametrize("way", WAYS)
def test_a_sample_of_calls_and_of_losses_of_power(stage: Files, way: str) -> None:
    draw, change = Random(way), Change(WAYS[way], stage)
    for kind, at in draw.sample(change.points(), SAMPLE):
        change.visit(kind, at)
    change.lose_power(draw)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_call_and_loss_of_power(stage: Files, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    change = Change(WAYS[way], stage)
    points = change.points()
    for kind, at in points:
        change.visit(kind, at)
    losses = change.lose_power()
    with capsys.disabled():
        print(f"\n{way}: {len(change.calls)} calls, {len(points)} faults, {losses} losses of power")


KILLED_AT_RANDOM = 1000  # processes, in the slow run


def run_apart(command: str) -> int:
    """Begin a command in a process of its own, and return the process's number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = call(command)[0]
        finally:
            os._exit(code)
    return child


@pytest.fixture
def larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder on the disk, with models that take a tenth of a second to change."""
    monkeypatch.setattr("loratool.streaming.in_place.WINDOW", 1 << 18)
    monkeypatch.setattr("loratool.streaming.parallel.MAX_WORKERS", 1)
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path, 1024, 512)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("times", [8, pytest.param(KILLED_AT_RANDOM, marks=pytest.mark.slow)])
def test_processes_killed_at_random_times(larger: Path, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    """On real files: whatever is there then is ended forward or taken back, and is the new or the old model."""
    draw, found = Random(times), Counter[str]()
    kinds = [(name, by) for name in ("merge", "merge, file") for by in ("shard", "window")]
    for name, by in kinds:
        way = MERGES[name]
        origin = Path(way.old[0].split()[1])
        back = f"un{way.command.replace('dora', 'adapter')} --in-place"
        model = Path(way.model)
        shutil.copytree(origin, model) if origin.is_dir() else shutil.copy(origin, model)
        old, start = model_bytes(model), time.monotonic()
        os.waitpid(run_apart(f"{way.command} --in-place --by {by}"), 0)
        took, new = time.monotonic() - start, model_bytes(model)
        assert new != old
        done(back)
        for _ in range(times // len(kinds)):
            child = run_apart(f"{way.command} --in-place --by {by}")
            time.sleep(draw.uniform(0.4, 1.1) * took)  # before, it plans
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if model.exists():
                found["it had its name"] += 1
                call(f"recover {model}")  # removes what is left
            else:
                flags = draw.choice(((), ("--back",)))
                found["back" if flags else "forward"] += 1
                code, said = call(f"recover {model}", *flags)
                assert code == 0, said
                assert model_bytes(model) == (old if flags else new)
            assert model_bytes(model) in (old, new)
            if model_bytes(model) == new:
                done(back)
            assert model_bytes(model) == old
        shutil.rmtree(model) if model.is_dir() else model.unlink()
    assert times < KILLED_AT_RANDOM or (found["forward"] and found["back"])
    with capsys.disabled():
        print(f"\nkilled: {dict(found)}")


def model_bytes(model: Path) -> dict[str, bytes]:
    """The weights of a model, and its undo file."""
    places = (
        [model, model.with_suffix(".undo")]
        if model.is_file()
        else [*model.glob("*.safetensors"), *model.glob("*.undo")]
    )
    return {place.name: hashlib.sha256(place.read_bytes()).digest() for place in places if place.is_file()}


@pytest.mark.parametrize("by", ["shard", "window"])
def test_who_loads_the_model_by_its_name_sees_no_mixture(larger: Path, by: str) -> None:
    """The old one, the new one, or no file."""
    shutil.copy("base.safetensors", FILE)
    old = hashlib.sha256(Path(FILE).read_bytes()).digest()
    seen, stop = Counter[bytes](), threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                with open(FILE, "rb") as file:
                    seen[hashlib.sha256(file.read()).digest()] += 1
            except FileNotFoundError:
                seen[b""] += 1
            time.sleep(0.002)  # in which the file is open nowhere

    reader = threading.Thread(target=read)
    reader.start()
    try:
        new = set()
        for _ in range(2):
            for command in (f"merge {FILE} adapter", f"unmerge {FILE} adapter"):
                code, said = call(f"{command} --in-place --by {by}")
                while by == "window" and "is open in another program" in said:  # the reader's
                    code, said = call(f"{command} --in-place --by {by}")
                assert code == 0, said
                new.add(hashlib.sha256(Path(FILE).read_bytes()).digest())
    finally:
        stop.set()
        reader.join()
    assert len(new) == 2 and old in new
    assert seen.keys() <= {*new, b""} and len(seen) > 1, "a mixture was read"
