"""Report how a runtime would apply an unconverted adapter: what it would ignore, misread or refuse, with remedies.

The facts are the rows of `architectures.runtimes.table`. The names are those that `convert --for` would write.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext

from ...adapters.adapter import Adapter
from ...adapters.formats import loaded_by, open_adapter
from ...adapters.formats.peft import Peft
from ...adapters.formats.peft_config import CONFIG_NAME, base_mutating_init
from ...adapters.updates.dora import DoRA
from ...adapters.updates.update import UpdateSpec
from ...architectures.classes import text_model_at
from ...architectures.runtimes.image_programs import IMAGE_RUNTIMES
from ...architectures.runtimes.runtime import FEATURES, OUTCOMES, Runtime
from ...architectures.runtimes.table import RUNTIMES
from ...files.checkpoint import Checkpoint, read_config
from ...files.codecs.quantized import declared_method, find_declared
from ...files.hub.cache import reading_little, resolve
from ...transform.expand import kinds_to_expand
from ...transform.for_runtime import serve_modules, unset_module
from ...transform.lazy import start
from ...transform.runtime_limits import refusals, require_served
from ...transform.to_class import to_class
from ...views.inspect_runtime import Finding, RuntimeInspection
from ..inputs import open_model, without_base_option
from .call import InspectFor
from .for_image_program import inspect_for_image_program

# What the language models of wrappers were named before transformers 4.52
_OLD = "language_model.model."


@reading_little()
def run_inspect_for(call: InspectFor) -> RuntimeInspection:
    """Report from headers what a runtime does with an adapter."""
    if program := IMAGE_RUNTIMES.get(call.runtime):
        return inspect_for_image_program(call, program)
    row = RUNTIMES[call.runtime]
    with ExitStack() as opened:
        config = read_config(call.base) if call.base is not None else {}
        limited = bool(row.limited) and declared_method(find_declared(config)) == row.limited
        in_full = call.base is not None and not limited  # codes that nothing here reads tell no names
        model = open_model(call.base or "", "--base must be the served model", opened) if in_full else None
        with without_base_option(call.base) if call.base is not None and not config else nullcontext():
            adapter = open_adapter(call.path, call.alpha, model=config, runtime=call.runtime)
        opened.callback(adapter.file.close)
        require_served(row, model)
        refused = refusals(adapter, row, model, adapter.updates)
        unsupported = {module for each in refused for module in each.modules}
        supported = {module: update for module, update in adapter.updates.items() if module not in unsupported}
        findings = [*_of_format(call.path, adapter, row), *_of_config(adapter, row), *refused]
        if model and any(update.rank for update in supported.values()) and loaded_by(call.runtime).key == Peft.key:
            findings += _of_names(adapter, row, model, supported, opened)
        if limited:
            limit, _, remedy = row.limit.partition(": ")
            findings.append(Finding("limit", "ignores", limit, remedy))
        notes = [] if model else [f"add --base {'in 16 bits ' * limited}to compare the names of its modules"]
        notes += [row.limit] if row.limit and not limited else []
        return RuntimeInspection(
            path=os.fspath(call.path),
            runtime=call.runtime,
            version=row.version,
            checked=row.checked,
            base=None if call.base is None else os.fspath(call.base),
            modules=len(adapter.updates),
            findings=tuple(findings),
            notes=tuple(notes),
        )


def _of_format(path: str | os.PathLike[str], adapter: Adapter, runtime: Runtime) -> Iterator[Finding]:
    """Yield the findings on the files."""
    wanted = loaded_by(runtime.key)
    if adapter.format != wanted.key:
        says = f"the format is {adapter.format}, but it reads {wanted.key}"
        yield Finding("format", "refuses", says, "convert --for writes this format")
    elif (
        wanted.can.folder
        and (folder_file := resolve(path)).is_file()
        and not folder_file.with_name(CONFIG_NAME).exists()
    ):
        says = f"it is a single file, but must be in a folder with its {CONFIG_NAME}"
        yield Finding("format", "refuses", says, "convert --for writes a folder")


def _of_config(adapter: Adapter, runtime: Runtime) -> Iterator[Finding]:
    """Yield the findings on kinds of updates and the config."""
    ranks, reads = {update.rank for update in adapter.updates.values() if update.rank}, runtime.reads
    dora = tuple(module for module, update in adapter.updates.items() if update.cls is DoRA)
    if dora and reads["dora"] != "yes":
        yield _feature("dora", reads["dora"], "convert --for with --base makes it plain LoRA", dora)
    if runtime.names != "whole" and (others := kinds_to_expand(adapter)):
        says = f"it is {' and '.join(dict.fromkeys(others.values()))}, but only LoRA is supported"
        yield Finding("kind", "refuses", says, "convert --for makes it LoRA", tuple(others))
    if adapter.config.use_rslora and reads["rslora"] != "yes":
        times = " to ".join(f"{math.sqrt(rank):g}" for rank in sorted({min(ranks, default=1), max(ranks, default=1)}))
        says = f"rsLoRA would be {OUTCOMES[reads['rslora']]}: the change would be {times} times too small"
        yield Finding("rslora", reads["rslora"], says, "convert --for multiplies the scale into the factors")
    if len(ranks) > 1 and reads["rank_pattern"] != "yes":
        yield _feature("rank_pattern", reads["rank_pattern"], "convert --for pads them with zeros")
    scaled = tuple(m for m, update in adapter.updates.items() if update.rank and not _has_alpha(adapter, update))
    if scaled and reads["alpha_pattern"] != "yes":
        remedy = "convert --for multiplies the scales into the factors"
        yield _feature("alpha_pattern", reads["alpha_pattern"], remedy, scaled)
    init = base_mutating_init(adapter.config)
    if init and runtime.names != "whole":
        says = f"{init} subtracted the initial factors from the base, and it would not"
        yield Finding("start", "misreads", says, "convert --for with --initial subtracts them from the adapter")
    targets = adapter.config.peft.get("target_modules")
    if runtime.targets == "last names" and isinstance(targets, str) and targets not in ("all", "all-linear"):
        says = "target_modules is an expression, but it reads a list of names"
        yield Finding("targets", "refuses", says, "convert --for writes a list")
    if runtime.max_ranks and max(ranks, default=0) > max(runtime.max_ranks):
        says = f"rank {max(ranks)} is above its limit, {max(runtime.max_ranks)}"
        yield Finding("rank", "refuses", says, f"loratool resize --rank {max(runtime.max_ranks)}")


def _has_alpha(adapter: Adapter, update: UpdateSpec) -> bool:
    """Return whether an update's scale comes from the alpha of its config, without a pattern."""
    alpha, divisor = adapter.config.alpha, math.sqrt(update.rank) if adapter.config.use_rslora else update.rank
    return alpha is None or math.isclose(update.scale * divisor, alpha, rel_tol=1e-6)


def _feature(feature: str, outcome: str, remedy: str, modules: tuple[str, ...] = ()) -> Finding:
    return Finding(feature, outcome, f"{FEATURES[feature]} would be {OUTCOMES[outcome]}", remedy, modules)


def _of_names(
    adapter: Adapter, runtime: Runtime, base: Checkpoint, supported: Mapping[str, UpdateSpec], opened: ExitStack
) -> Iterator[Finding]:
    """Yield the findings on names, and on modules that must be present together."""
    written, added, rotated = _written(adapter, runtime, base, supported, opened)
    stacks = require_served(runtime, base).stacks
    experts = [m for m, u in supported.items() if u.rank and ".experts." in f"{m}." and u.cls.stack is not stacks]
    if experts:
        how = "a stack, but it needs single ones" if not stacks else "single ones, but it needs a stack"
        outcome = runtime.miss if _is_renamed(written, experts) else "refuses"
        yield Finding("experts", outcome, f"experts are {how}", "convert --for converts them", tuple(experts))
    others = [m for m in written if m not in experts and not _is_found(runtime, base, m, written[m])]
    if others:
        says = f"modules would be {OUTCOMES[runtime.miss]}, as it looks for {written[others[0]][0]}"
        yield Finding("names", runtime.miss, says, "convert --for writes its names", tuple(others))
    if rotated and not adapter.only_for:
        says = "the rows of queries and keys are in pairs for the rotary embedding, but it expects halves"
        yield Finding("rows", "misreads", says, "convert --for reorders them", tuple(rotated))
    paths = {path for each in written.values() for path in each} | {*added}
    if unset := unset_module(runtime, base, paths):
        says = f"it matches modules by their last names, so it would use uninitialized memory for {unset}"
        yield Finding("missing", "misreads", says, "merge the adapter into the base")
    elif added:
        outcome = runtime.reads["towers"] if runtime.every_layer else "refuses"
        says = f"it also needs {len(added)} modules that are missing, like {added[0]}"
        yield Finding("missing", outcome, says, "convert --for adds zeros for them")


def _written(
    adapter: Adapter, runtime: Runtime, base: Checkpoint, supported: Mapping[str, UpdateSpec], opened: ExitStack
) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Return the paths for each module, the paths that need zeros, and the modules with reordered rows."""
    paths: dict[str, list[str]] = {}
    if runtime.names == "whole" or require_served(runtime, base).stacks:
        state = to_class(start(adapter.only(supported)), base, None)
        for path, update in state.adapter.updates.items():
            for module in state.log[path].sources if update.rank else ():
                paths.setdefault(module, []).append(path)
        return paths, [], []
    served_modules, added = serve_modules(runtime, base, adapter, supported)
    for path, served in served_modules.items():
        for module in served.sources:
            paths.setdefault(module, []).append(path)
    rotated = [module for served in served_modules.values() if served.heads for module in served.sources]
    return paths, [each.path for each in added], rotated


def _is_renamed(written: Mapping[str, Sequence[str]], experts: Sequence[str]) -> bool:
    """Return whether the served class has the experts at other paths."""
    owners = {module.partition(".experts")[0] for module in experts}
    return any(path.partition(".experts")[0] not in owners for module in experts for path in written.get(module, ()))


def _is_found(runtime: Runtime, base: Checkpoint, module: str, written: Sequence[str]) -> bool:
    """Return whether a runtime finds a module by its name in the adapter."""
    if module in written:
        return True
    if runtime.prefixes == "any":
        return len(written) == 1 and re.fullmatch(runtime.modules, module) is not None
    if runtime.prefixes == "longer":
        return any(module.endswith(f".{path}") for path in written)
    if runtime.prefixes == "exact" or len(written) != 1:
        return False
    (path,) = written
    if module.startswith(_OLD):
        is_mapped = re.fullmatch(runtime.old_names, base.model_type or "") is not None
        return is_mapped and path.endswith(f".{module.removeprefix(_OLD)}")
    body, *_ = (*text_model_at(base.config), "")
    return runtime.names != "whole" and bool(body) and module == f"model.{path.removeprefix(body)}"
