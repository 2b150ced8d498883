"""Try every language model of transformers, built small.

    python tests/lib/models/language_families.py [TYPE ...] [--write]

A row says of a class whether `merge`, `extract` and `init` are right by PEFT's own loading, merging and answering, are
refused, or wrong. `--write` puts the rows into the guide `families`. With `--cache FILE` rows are kept there: types
that are named are tried again, without names those that have no row. It ends with 1 if anything is wrong, which it then
names.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of matrices this small, threads are waited for
import torch
from conftest import ROOT, load_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from lib import markdown
from lib.models.tiny import NOT_BUILT, build, perturb, stacks, tables
from loratool import NeedsFlag
from loratool.binding.modules.selection import parse_patterns
from loratool.errors import LoratoolError

GUIDE = ROOT / "loratool" / "guides" / "families.md"
MARK = "<!-- from tests/lib/models/language_families.py -->\n"
VERBS = ("merge", "extract", "every", "init")
SHORT = 16  # characters of what gets no factors, if the table has it
RIGHT, WRONG, REFUSED, NONE, NOT = "right", "wrong", "refused", "none", "not built"
NEVER_TARGETED = {"experts", "convolutions"}  # by all-linear
TOKENS = torch.arange(8, 24)[None]
MAMBAS = "falcon_h1 falcon_mamba mamba mamba2 nemotron_h".split()  # PEFT raises if their out_proj is a target
Patterns = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What was found of one class; a state is `right`, `refused: why`, `wrong: what` or, of `merge`, `none: why`."""

    table: str
    type: str
    cls: str
    merge: str  # of an adapter that PEFT made of all linear layers and stacks of experts
    extract: str
    every: str  # `extract` again, of a copy of which embeddings, routers and every other matrix changed
    init: str
    compared: str = "logits"  # or "weights", if the class does not answer to token ids, with an image or not
    excluded: Patterns = ()  # what extract and init ask to leave out by --exclude
    left_out: Patterns = ()  # changed tensors that extract reports as left out, every number as N
    beside: Patterns = ()  # what stands beside the layers, by the report of init: routers, ...


def load(kind: Any, folder: Path) -> Any:
    """Load a model for its answers: the fast experts are no exact oracle."""
    return deepcopy(base_of(kind, folder)) if folder.name == "base" else loaded(kind, folder)


def loaded(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, experts_implementation="eager").eval()


base_of = lru_cache(maxsize=2)(loaded)  # that of a type is written once, and loaded a dozen times


def answer(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of some tokens."""
    with torch.no_grad():
        found = model(**inputs)
    return getattr(found, "logits", found[0])


def answerable(model: Any) -> dict[str, Tensor]:
    """Return inputs that a class answers, twice the same: token ids alone, or with an image; none if it does not."""
    accepted = inspect.signature(model.forward).parameters
    boxes = torch.rand(1, TOKENS.shape[1], 4, generator=torch.Generator().manual_seed(3)).sort().values  # of the tokens
    for more in ({}, {"pixel_values": torch.ones(1, 3, 28, 28)}, {"bbox": boxes}):
        offered = {"input_ids": TOKENS, "decoder_input_ids": TOKENS, **more}
        inputs = {name: offered[name] for name in offered if name in accepted}
        try:
            if torch.equal(answer(model, inputs), answer(model, inputs)):
                return inputs
        except Exception:  # of any kind: each class refuses in its own way
            continue
    return {}


def idle(model: Any, inputs: Mapping[str, Tensor]) -> set[str]:
    """Return the names of tied tensors whose module is not called: another that is has the same."""
    called: set[int] = set()
    hooks = [m.register_forward_hook(lambda module, *_: called.add(id(module))) for m in model.modules()]
    answer(model, inputs)
    for hook in hooks:
        hook.remove()
    tensors = model.state_dict(keep_vars=True)
    counts = Counter(map(id, tensors.values()))
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in tensors}
    return {name for name, W in tensors.items() if counts[id(W)] > 1 and id(owners[name]) not in called}


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> str:
    """Return the first tensor whose change is not the wanted one, and by how much; empty if there is none."""
    for name, W in wanted.items():
        if not W.is_floating_point():
            continue
        if name not in found:
            return f"{name} is not there"
        change = max(float((W - before[name]).norm()), 1e-2)
        error = float((found[name] - W).norm()) / change
        if not error < 1e-5:
            return f"{name} is off by {error:.1e}"
    return ""


def with_what_is_named(make: Callable[..., Any], **options: Any) -> tuple[Any, Patterns]:
    """Return the report, and the names of the refusal, which have to be enough."""
    try:
        return make(**options), ()
    except NeedsFlag as error:
        words = shlex.split(error.remedy or "")
        assert words[:2] == ["add", "--exclude"], error
        named = parse_patterns([word for flag, word in pairwise(words) if flag == "--exclude"])
        try:
            return make(exclude=named, **options), named
        except LoratoolError as second:
            raise AssertionError(f"{error.remedy} does not help: {second}") from second


def with_adapter(kind: Any, base: Path, adapter: Path) -> Any:
    """Load the model with the adapter, of which PEFT has missed nothing and left nothing."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(kind, base), adapter)
    result = model.load_adapter(adapter, "again")
    assert not result.missing_keys, f"PEFT misses {result.missing_keys[:3]}"
    assert not result.unexpected_keys, f"PEFT has no place for {result.unexpected_keys[:3]}"
    model.delete_adapter("again")
    return model.eval()


def without(kind: Any, model: Any, folder: Path, left_out: Iterable[str]) -> None:
    """Take back what the report says is not in the adapter: of the class, or of the file."""
    base, tuned, weights = folder / "base", folder / "tuned", model.state_dict()
    before = load_model(base)
    if of_class := [name for name in left_out if name not in before]:
        plain = load(kind, base).state_dict()
        for name in of_class:
            weights[name].copy_(plain[name])
        model.save_pretrained(tuned)
    tensors = load_model(tuned) | {name: before[name] for name in left_out if name in before}
    for file in tuned.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})


def check_extract(
    kind: Any, model: Any, folder: Path, every: bool = False, **how: Any
) -> tuple[Patterns, Patterns, str]:
    """Change the model and extract the copy; return what has to be excluded, what is left out, and what was compared.

    The adapter has to make the copy of the base, merged by PEFT and by us, and to answer as the copy unmerged.
    """
    base, tuned, adapter = folder / "base", folder / "tuned", folder / "adapter"
    perturb(model, every)
    model.save_pretrained(tuned)
    paths, allow = (base, tuned, adapter), ("unrelated",)  # weights of 0 change by 1
    report, excluded = with_what_is_named(lambda **o: loratool.extract(*paths, allow=allow, **how, **o), rank=8)
    without(kind, model, folder, report.left_out)
    plain, copy = load(kind, base), load(kind, tuned)
    unmerged, inputs = with_adapter(kind, base, adapter), answerable(copy)
    if inputs:
        expected = answer(copy, inputs)
        try:
            given = answer(unmerged.base_model.model, inputs)
        except Exception as error:
            raise AssertionError(f"the model does not answer with its adapter: {told(error)}") from error
        off = float((given - expected).abs().max() / expected.abs().max())
        assert off < 1e-4, f"the logits are off by {off:.1e}"
    unused = idle(copy, inputs) if inputs else set()
    changed = {name: W for name, W in copy.state_dict().items() if name not in unused}
    wrong = difference(untied(unmerged).merge_and_unload().state_dict(), changed, plain.state_dict())
    assert not wrong, f"merged by PEFT, {wrong}"
    loratool.merge(base, adapter, folder / "merged", undo=False)
    wrong = difference(load_model(folder / "merged"), load_model(tuned), load_model(base))
    assert not wrong, f"merged by loratool, {wrong}"
    names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in report.left_out)
    return excluded, tuple(names), "logits" if inputs else "weights"


def randomize(adapter: Path) -> None:
    """Give an adapter's file random factors."""
    generator = torch.Generator().manual_seed(2)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, W in tensors.items():
        tensors[name] = torch.randn(W.shape, generator=generator) * 0.1
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def untied(model: Any) -> Any:
    """Give each layer with factors a matrix of its own: those of one side of a tie are merged into both by PEFT."""
    for module in model.modules():
        layer = getattr(module, "base_layer", None)
        for name, W in [*layer.named_parameters(recurse=False)] if isinstance(layer, torch.nn.Module) else []:
            setattr(layer, name, torch.nn.Parameter(W.detach().clone()))
    return model


def same_merge(kind: Any, base: Path, adapter: Path, out: Path) -> None:
    """Check that we merge an adapter with random factors as PEFT does."""
    loratool.merge(base, adapter, out, undo=False)
    wanted = untied(with_adapter(kind, base, adapter)).merge_and_unload().state_dict()
    wrong = difference(load(kind, out).state_dict(), wanted, load(kind, base).state_dict())
    assert not wrong, wrong


def check_init(kind: Any, folder: Path) -> tuple[Patterns, Patterns]:
    """Make a new adapter; return what has to be excluded, and what else gets no factors.

    PEFT has to load it, and to use each of its tensors.
    """
    base, start = folder / "base", folder / "start"
    report, excluded = with_what_is_named(lambda **o: loratool.init(base, start, **o), rank=1)
    if "experts" in report.left_out.values():
        with_adapter(kind, base, start)
        options = {"target": ("all-linear", "experts"), "rank": 2, "force": True}
        _, more = with_what_is_named(lambda **o: loratool.init(base, start, **o), **options)
        excluded = tuple(dict.fromkeys((*excluded, *more)))
    with_adapter(kind, base, start)
    randomize(start)
    same_merge(kind, base, start, folder / "merged-start")
    return excluded, tuple(sorted({*report.left_out.values()} - NEVER_TARGETED))


def check_merge(kind: Any, folder: Path) -> str:
    """Merge PEFT's own adapter of all linear layers and stacks of experts; return why it makes none, or nothing."""
    from peft import LoraConfig, get_peft_model

    model = load(kind, folder / "base")
    targets: str | list[str] = "all-linear"
    if model.config.model_type in MAMBAS:
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = [name for name in linear if not name.endswith(("out_proj", "lm_head"))]
    try:
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, target_parameters=stacks(model) or None)
        get_peft_model(model, config).save_pretrained(folder / "peft", save_embedding_layers=False)
        randomize(folder / "peft")
        with_adapter(kind, folder / "base", folder / "peft")
    except AssertionError:
        return "PEFT does not find all of its own adapter again"
    except Exception as error:  # PEFT's, of any kind
        return f"PEFT makes no adapter ({type(error).__name__})"
    same_merge(kind, folder / "base", folder / "peft", folder / "merged-peft")
    return ""


def told(error: BaseException) -> str:
    text = error.message if isinstance(error, LoratoolError) else f"{type(error).__name__}: {error}"
    return " ".join(re.sub(r"/tmp/\S*?/", "", text).split())[:300]


def state(check: Callable[[], Any]) -> tuple[str, Any]:
    """Return whether a check is right, refused or wrong, and what it returned."""
    try:
        return RIGHT, check()
    except LoratoolError as error:
        return f"{REFUSED}: {told(error)}", None
    except AssertionError as error:
        return f"{WRONG}: {error}", None
    except Exception as error:
        return f"{WRONG}: {told(error)}", None


def made(table: str, model_type: str, folder: Path) -> tuple[Any, Any]:
    """Write the base of a type; return its class, which has to read its own file back, and the model.

    It is not loaded: of some types transformers reads no more file right in a process that saved a loaded model.
    """
    kind, model = build(table, model_type)
    model.save_pretrained(folder / "base")
    again = load(kind, folder / "base")
    wrong = difference(again.state_dict(), model.state_dict(), again.state_dict())
    assert not wrong, f"transformers does not read its own file back: {wrong}"
    return kind, model


def row(table: str, model_type: str) -> Row:
    """Run the checks of a class."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            kind, model = made(table, model_type, folder)
        except Exception as error:
            known = NOT_BUILT.get(model_type)
            reason = f"{NOT}: {known}" if known else f"{WRONG}: it is not built, {told(error)}"
            return Row(table, model_type, "", reason, reason, reason, reason)
        assert model_type not in NOT_BUILT, f"{model_type} is built, though `NOT_BUILT` says that it is not"
        merge, reason = state(lambda: check_merge(kind, folder))
        extract, extracted = state(lambda: check_extract(kind, model, folder))
        every, again = state(
            lambda: check_extract(*made(table, model_type, folder / "every"), folder / "every", every=True)
        )
        init, started = state(lambda: check_init(kind, folder))
        excluded, left_out, compared = extracted or ((), (), "")
        too, also, _ = again or ((), (), "")
        asked, beside = started or ((), ())
        return Row(
            table,
            model_type,
            kind.__name__,
            f"{NONE}: {reason}" if reason else merge,
            extract,
            every,
            init,
            compared,
            tuple(dict.fromkeys((*excluded, *too, *asked))),
            tuple(dict.fromkeys((*left_out, *also))),
            beside,
        )


def quiet() -> None:
    import transformers

    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def tried(family: tuple[str, str]) -> Row:
    quiet()
    return row(*family)


def is_wrong(each: Row) -> bool:
    return any(getattr(each, verb).startswith(WRONG) for verb in VERBS)


def read(cache: Path | None) -> dict[tuple[str, str], Row]:
    if cache is None or not cache.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in cache.read_text().splitlines()]
    return {(each.table, each.type): each for each in rows}


def named(rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
    """Return name -> cells: a type, with its table in brackets if the classes of a type differ."""
    rows = list(rows)
    outcomes: dict[str, set[tuple[str, ...]]] = {}
    for each in rows:
        outcomes.setdefault(each.type, set()).add(outcome(each))
    return {
        f"`{each.type}`" if len(outcomes[each.type]) == 1 else f"`{each.type}` ({each.table})": outcome(each)
        for each in rows
    }


def report(rows: Iterable[Row]) -> str:
    """Return what was found as Markdown."""
    import peft
    import transformers

    rows = list(rows)
    head = f"transformers {transformers.__version__}, PEFT {peft.__version__}, {len(rows)} classes:"
    return f"{head}\n\n{laid_out(named(rows))}"


def laid_out(cells: Mapping[str, tuple[str, ...]]) -> str:
    """Return a table with a row for each name, and below it the reasons and long cells, those that are the same once.

    Args:
        cells: name -> the cells of `outcome`.
    """
    lines, reasons, long = [], {}, {}
    for name, (*states, without) in sorted(cells.items(), key=lambda item: item[0].replace("`", "")):
        lines.append((name, *map(short, states), without if len(without) <= SHORT else "below"))
        by_text: dict[str, list[str]] = {}
        for column, text in zip(VERBS, states, strict=True):
            if ": " in text:
                by_text.setdefault(text, []).append(column)
        for text, columns in by_text.items():
            which = "" if text.startswith(NOT) else f"{', '.join(columns)} "
            reasons.setdefault(f"{which}{text}", []).append(name)
        if len(without) > SHORT:
            long.setdefault(without, []).append(name)
    parts = [markdown.table(("type", *VERBS, "no factors"), lines)]
    for title, items in (("Refused, none and not built:", reasons), ("No factors, where the table has *below*:", long)):
        parts.append(
            f"{title}\n\n" + "".join(markdown.bullet(f"{', '.join(names)}: {text}") for text, names in items.items())
        )
    return "\n".join(parts)


def short(state: str) -> str:
    """Return a state as the table has it. Its reason is below the table."""
    word = state.partition(":")[0].replace(f"{RIGHT} for the rest", "rest").replace(" (weights)", "*")
    return "-" if word in (NOT, "") else word


def outcome(each: Row) -> tuple[str, ...]:
    """Return the cells that a class has in the table, without what only its own names are in a message."""
    if each.merge.startswith(NOT):
        return (each.merge, "", "", "", "")
    states = [re.sub(r"\w+(\.\w+)+|\d+", "N", getattr(each, verb)) for verb in VERBS]
    short = [": ".join(text.split(": ")[:2]) for text in states]
    if each.excluded:
        short[1:] = [f"{RIGHT} for the rest" if text == RIGHT else text for text in short[1:]]
    if each.compared == "weights" and each.extract == RIGHT:
        short[1] += " (weights)"
    paths = [pattern.removesuffix("$").replace("\\", "") for pattern in each.excluded] + [*each.left_out]
    ends = dict.fromkeys(re.sub(r"(\.(weight|N|\d+))+$", "", path).rpartition(".")[2] for path in paths)
    return (*short, ", ".join([*each.beside, *(f"`{end}`" for end in ends)]))


def main(arguments: list[str]) -> int:
    cache = Path(arguments.pop(arguments.index("--cache") + 1)) if "--cache" in arguments else None
    chosen = [each for each in arguments if each not in ("--write", "--cache")]
    rows, start = read(cache), time.monotonic()
    todo = [family for family in tables() if (family[1] in chosen if chosen else family not in rows)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for found in pool.map(tried, todo):
            rows[found.table, found.type] = found
            print(f"{found}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            if cache:
                cache.write_text("".join(json.dumps(asdict(each)) + "\n" for each in rows.values()))
    if "--write" in arguments:
        markdown.put(GUIDE, MARK, report(rows.values()))
    else:
        print(report(rows.values()))
    wrong = [each for each in rows.values() if is_wrong(each)]
    for each in wrong:
        print(f"wrong: {each}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
