"""Set what a caller's process may have set for itself: it changes no byte of ours, and is unchanged afterwards."""

from __future__ import annotations

import inspect
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, spread, weights, write_model, write_peft
from lib.harness.interrupted import interrupted
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import loratool
from loratool.commands.arguments import arguments_of
from loratool.commands.machine import flushes, require_ieee
from loratool.errors import MachineError

MODULES = {"model.layers.0.self_attn.q_proj": (96, 64), "model.layers.0.mlp.up_proj": (160, 64)}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


@contextmanager
def flushing() -> Iterator[None]:
    """Flush denormals to zero, also in those of torch's threads that start now."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def on_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


# What a caller may have set -> how, and whether it is set
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], bool]]] = {
    "denormals are flushed": (flushing, flushes),
    "float64": (in_float64, lambda: torch.get_default_dtype() is torch.float64),
    "with meta": (lambda: torch.device("meta"), lambda: torch.empty(0).is_meta),
    "meta by default": (on_meta, lambda: torch.empty(0).is_meta),
    "fake tensors": (FakeTensorMode, lambda: isinstance(torch.empty(0), FakeTensor)),
    "inference": (torch.inference_mode, torch.is_inference_mode_enabled),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base, a tuned model and adapters of which half the rows are denormal."""
    folder = tmp_path_factory.mktemp("models")
    small = torch.tensor([1.0, 2.0**-126])
    base = {
        f"{name}.weight": weights(*shape, seed=n) * small.repeat(shape[0] // 2)[:, None]
        for n, (name, shape) in enumerate(MODULES.items())
    }
    pairs = {name: factors(*shape, 4, seed=n) for n, (name, shape) in enumerate(MODULES.items())}
    rows = {name: (A, B * small.repeat(len(B) // 2)[:, None]) for name, (A, B) in pairs.items()}
    tuned = {f"{name}.weight": base[f"{name}.weight"] + B @ A for name, (A, B) in rows.items()}
    write_model(folder / "base", base, CONFIG)
    write_model(folder / "tuned", tuned, CONFIG)
    write_peft(folder / "one", rows)
    write_peft(folder / "two", {name: (-A.flip(0), B.flip(1)) for name, (A, B) in rows.items()})
    write_peft(folder / "begun", pairs)
    coded = {"up.weight": weights(16, 16).to(torch.float8_e4m3fn), "up.weight_scale_inv": torch.tensor([[2.0**-140]])}
    fields = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    write_model(folder / "coded", coded, CONFIG | fields)
    loratool.merge(folder / "base", folder / "one", folder / "merged")
    loratool.patch(folder / "base", folder / "merged", folder / "merged.patch")
    return folder


def opened_as_text(opened: Any) -> str:
    """Return the bits of what an opened adapter or model computes, as text."""
    with opened:
        tensors = [each.delta() if hasattr(each, "delta") else each for each in opened.values()]
    with ThreadPoolExecutor(1) as apart:  # in whose thread torch makes plain tensors again
        return " ".join(
            apart.map(lambda tensor: tensor.contiguous().view(torch.uint8).numpy().tobytes().hex(), tensors)
        )


def write_recipe(models: Path, out: Path) -> Path:
    recipe = {"command": "resize", "adapter": str(models / "one"), "rank": 2, "out": str(out)}
    out.with_name("recipe.json").write_text(json.dumps(recipe))
    return out.with_name("recipe.json")


# A verb and what it is called for -> the call; `m` has the inputs, and what is written goes to `out`.
CALLS: dict[str, Callable[[Path, Path], Any]] = {
    "merge": lambda m, out: loratool.merge(m / "base", [m / "one", (m / "two", 0.5)], out, workers=2),
    "merge narrower": lambda m, out: loratool.merge(m / "base", m / "one", out, dtype="bf16", undo=False),
    "unmerge": lambda m, out: loratool.unmerge(m / "merged", m / "one", out),
    "unmerge approximate": lambda m, out: loratool.unmerge(m / "merged", m / "one", out, approximate=True),
    "patch": lambda m, out: loratool.patch(m / "base", m / "merged", out),
    "apply": lambda m, out: loratool.apply(m / "base", m / "merged.patch", out),
    "verify": lambda m, out: loratool.verify(m / "base", m / "one", m / "merged"),
    "recover": lambda m, out: loratool.recover(interrupted(m / "base", m / "one", out)),
    "extract": lambda m, out: loratool.extract(m / "base", m / "tuned", out, rank=4),
    "extract by energy": lambda m, out: loratool.extract(m / "base", m / "tuned", out, energy=0.9, certify=True),
    "diff": lambda m, out: loratool.diff(m / "one", m / "two"),
    "diff models": lambda m, out: loratool.diff(m / "base", m / "tuned"),
    "spectra": lambda m, out: loratool.spectra(m / "one"),
    "spectra beside a base": lambda m, out: loratool.spectra(m / "one", base=m / "base"),
    "diff spectra": lambda m, out: loratool.diff_spectra(m / "base", m / "tuned"),
    "diff headers": lambda m, out: loratool.diff_headers(m / "base", m / "tuned"),
    "inspect": lambda m, out: loratool.inspect(m / "one", base=m / "base"),
    "resize": lambda m, out: loratool.resize(m / "one", out, rank=2),
    "convert": lambda m, out: loratool.convert(m / "one", out, to="peft", dtype="bf16"),
    "delta": lambda m, out: opened_as_text(loratool.open_adapter(m / "one")),
    "save": lambda m, out: str(
        loratool.save_adapter(out, {"up": (torch.full((2, 16), 3e-39), torch.ones(16, 2), 0.3)}, to="kohya")
    ),
    "weights": lambda m, out: opened_as_text(loratool.open_checkpoint(m / "coded")),
    "iter merged": lambda m, out: [
        (name, x.view(-1).view(torch.uint8).tolist()) for name, x in loratool.iter_merged(m / "base", m / "one")
    ],
    "count": lambda m, out: loratool.count(m / "base", rank=4),
    "demo": lambda m, out: loratool.demo(out),
    "inspect for a program": lambda m, out: loratool.inspect_for(m / "one", runtime="vllm", base=m / "base"),
    "run": lambda m, out: loratool.run(write_recipe(m, out)),
    "convert model": lambda m, out: loratool.convert_model(m / "base", out, dtype="bf16"),
    "metadata": lambda m, out: loratool.edit_metadata(m / "one", out.with_suffix(".safetensors"), set={"a": "b"}),
    **{
        f"combine {method}": lambda m, out, method=method: loratool.combine(  # type: ignore[misc]
            [m / "one", (m / "two", 0.5)], out, method=method, **({} if method == "cat" else {"density": 0.5})
        )
        for method in ("cat", "ties", "dare-ties")
    },
    **{
        f"init {method}": lambda m, out, method=method: loratool.init(  # type: ignore[misc]
            m / "base", out, method=method, rank=4, residual=out.with_name("rest") if method in STARTED else None
        )
        for method in ("lora", "pissa", "olora", "mica")
    },
}
STARTED = ("pissa", "olora")


def outcome(call: Callable[[Path, Path], Any], models: Path, folder: Path) -> tuple[str, dict[str, bytes]]:
    folder.mkdir()
    report = call(models, folder / "out")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder)
    return report if isinstance(report, str) else json.dumps(report.to_dict()), files


@pytest.mark.parametrize("name", spread(CALLS, 12))
def test_no_byte_depends_on_what_the_caller_set(name: str, models: Path, tmp_path: Path) -> None:
    plain = outcome(CALLS[name], models, tmp_path / "here")
    for setting, is_set in SETTINGS.values():
        with setting():
            assert outcome(CALLS[name], models, tmp_path / "here") == plain
            assert is_set()
        assert not is_set()


def test_every_verb_is_called() -> None:
    """But for what only writes and reads, of which no number is computed."""
    verbs = {name for name in loratool.__all__ if inspect.isfunction(getattr(loratool, name))}
    assert verbs - {name for call in CALLS.values() for name in call.__code__.co_names} == {
        "env",
        "inspect_files",
        "read_report",
        "verify_attestation",
        "write_report",
    }


def layers(verb: Any) -> Iterator[Any]:
    """The function and those that its decorators wrap."""
    while verb is not None:
        yield verb
        verb = getattr(verb, "__wrapped__", None)


def test_every_verb_requires_ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what only writes and reads."""
    verbs = [each for name in loratool.__all__ if inspect.isfunction(each := getattr(loratool, name))]
    assert len(verbs) == 31
    decorated = require_ieee(len).__code__  # type: ignore[attr-defined]
    without = [verb for verb in verbs if all(each.__code__ is not decorated for each in layers(verb))]
    monkeypatch.setattr("loratool.commands.calls.require_ieee", lambda work: lambda: f"required by {work.__self__}")
    for verb in without:
        if verb.__name__ not in ("read_report", "write_report"):
            required = [each.name for each in arguments_of(verb).values() if each.required]
            words = {name: "vllm" if name == "runtime" else "a" for name in required}
            assert verb(**words).startswith("required by")


def test_an_error_is_the_callers_and_so_is_an_interrupt() -> None:
    left: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell runs this aside

    @require_ieee
    def fail() -> None:
        raise KeyError(float(torch.tensor(2.0**-140) * 1))

    @require_ieee
    def wait() -> None:
        try:
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            left.append(threading.current_thread().name)
            raise

    with flushing():
        with pytest.raises(KeyError) as error:
            fail()
        threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            wait()
    signal.signal(signal.SIGINT, before)
    assert error.value.args == (2.0**-140,)
    assert len(left) == 1 and left[0] != threading.main_thread().name
    assert sys.float_info.min / 2 > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the C library's fesetround")
def test_another_rounding_is_refused() -> None:
    """Upward, downward, toward zero; in a process of its own, since a mode changes whatever runs in its thread."""
    code = (
        "import ctypes, ctypes.util, sys, loratool\n"
        "from loratool.errors import MachineError\n"
        "modes = {'x86_64': 0x400, 'aarch64': 0x400000}[__import__('platform').machine()]\n"
        "c = ctypes.CDLL(ctypes.util.find_library('m'))\n"
        "merge = loratool.merge\n"
        "for mode in (1, 2, 3):\n"
        "    assert c.fesetround(mode * modes) == 0\n"
        "    try:\n        merge('base', 'adapter', 'out')\n"
        "    except MachineError as error:\n        c.fesetround(0)\n        print(error, error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.endswith(" 5") and "nearest" in line for line in lines), done


def test_a_big_endian_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(MachineError, match="big-endian"):
        loratool.verify("base", "adapter", "merged")
