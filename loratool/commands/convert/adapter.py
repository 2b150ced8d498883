"""Convert an adapter to another format, or so that a given program applies it in full.

Each tensor is converted exactly, or its error is reported, or it is refused by name. `transform.plan` has the steps.
Tensors are computed one module at a time, when they are written.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS, holds_adapter, loaded_by, open_adapter, written_formats
from ...adapters.formats.content import AdapterContent
from ...adapters.formats.single_file import write_card
from ...adapters.image_metadata import about_training, former_metadata
from ...architectures.runtimes.image_programs import IMAGE_RUNTIMES
from ...architectures.runtimes.runtime import Runtime
from ...architectures.runtimes.table import RUNTIMES
from ...binding.modules.selection import Selection, parse_patterns
from ...durable.fileio import write_file
from ...durable.partial import partial_folder
from ...errors import NeedsFlag, UsageError, shell_word
from ...files.dtypes import FACTOR_DTYPES
from ...files.folder.side_files import MODELFILE
from ...files.hub.cache import place_named
from ...files.output.model_card import code, shown_name
from ...files.output.output import CONTAINERS, naming_output
from ...files.output.paths import check_output_path
from ...files.weights_file import paths_of
from ...numerics.forms import FORMS
from ...streaming.ranks import current_job
from ...streaming.threads import one_thread
from ...transform.lazy import size_of_change, start
from ...transform.numbers import Settled
from ...transform.output import content, rows, unused_modules
from ...transform.plan import plan_convert
from ...transform.rename import new_paths
from ...transform.request import ConvertRequest
from ...views.convert import ConvertReport, ModuleConvert
from ...views.parts.numbers import KEPT_ENOUGH, plural, share
from ...views.parts.writing import command_line
from ..arguments import StrPath, dtype_word, parse_words
from ..cards import adapter_card, error_share, input_word, options_of, source_facts
from ..inputs import given_base, leave_out, open_base, open_initial, refuse_own_names, without_base_option
from . import adapter as modelfile
from .call import Convert

_UNKNOWN = """# FROM the model that the adapter was trained on, by its name in Ollama or as a GGUF file:
# FROM {base}
"""


_WEIGHTS = "*.safetensors"  # of a folder that Ollama reads


def base_of_modelfile(path: Path, base: StrPath | None) -> str | None:
    """Return what a Modelfile at `path` has after FROM: the way to a base with weights that Ollama reads, or None."""
    if base is None or not ((os.path.isfile(base) and str(base).endswith(".gguf")) or any(Path(base).glob(_WEIGHTS))):
        return None
    try:
        way = Path(os.path.relpath(os.path.abspath(base), os.path.realpath(path))).as_posix()
    except ValueError:  # on another drive
        return None
    return way if re.fullmatch(r"\.\./[\w./@+=-]+", way) else None


def write(path: Path, content: AdapterContent, to: str, source: Adapter, base: str | None) -> None:
    """Write the folder, whole or not at all.

    Args:
        to: the format of the adapter, a key of FORMATS.
        base: what `base_of_modelfile` returns.
    """
    name, model = f"adapter.{to}", source.config.base_model
    named = model if isinstance(model, str) and model.isprintable() and model else "MODEL"
    head = f"FROM {base}\n" if base else _UNKNOWN.format(base=named)
    with partial_folder(path) as folder:
        FORMATS[to].write(folder / name, True, content, [source.file])
        write_file(folder / MODELFILE, f"{head}ADAPTER ./{name}\n".encode())
        write_card(folder, content)


CONVERT_DTYPES = {"keep": None, **{word: FORMS[name] for word, name in FACTOR_DTYPES.items()}}


def run_convert(call: Convert) -> ConvertReport:
    """Convert an adapter to another format, or to what a program loads and applies in full."""
    if not (call.from_format or holds_adapter(call.source)):
        raise UsageError("is a model; convert takes adapters", culprit=str(call.source), remedy="call convert_model")
    to = call.to if call.runtime is None else _format_for(call.runtime, call.to, call.layout, call.architecture)
    if to is None:
        raise needs_format(call.source, to)
    if (call.initial is not None or call.rank is not None) and not (call.plain or call.runtime):
        raise UsageError("--initial and --rank need --plain or --for")
    if call.layout is not None and call.plain:
        raise UsageError("--layout and --plain cannot be combined: run `loratool convert` twice")
    current_job().exit_unless_rank0()
    with ExitStack() as opened:
        model = None if call.base is None else given_base(call.base, opened)
        if model and not model.config:
            if Path(model.path).name != "config.json":
                refuse_own_names(open_base(model.path, "--base must be the model under it", opened))
            opened.enter_context(without_base_option(model.path))
        opened.enter_context(_whole_base(call.runtime if call.runtime in RUNTIMES else None))
        opened.enter_context(one_thread())
        request = ConvertRequest(
            to=to,
            exclude=parse_patterns(call.exclude),
            dtype=CONVERT_DTYPES[dtype_word(call.dtype)],
            plain=call.plain,
            initial=None if call.initial is None else partial(open_initial, initial=call.initial, opened=opened),
            rank=call.rank,
            layout=call.layout,
            base=model,
            architecture=call.architecture,
            runtime=call.runtime,
            rename=parse_words(call.rename),
        )
        adapter = open_adapter(
            call.source, call.alpha, False, call.from_format, tuple(call.enable_lora), model.config if model else None
        )
        opened.callback(adapter.file.close)
        (adapter,) = leave_out([adapter], parse_words(call.drop))
        return _convert(adapter, call, request, opened)


def files_given(*inputs: StrPath | None) -> Iterator[Path]:
    """Yield the inputs besides the adapter: files, folders and the files in them."""
    for given in inputs:
        if given is not None and (place := place_named(given)).exists():
            yield place
            yield from (path for path in place.glob("*") if path.is_file())


def needs_format(source: StrPath, to: str | None) -> UsageError:
    """Return the error for an adapter without --to, or with one that is for models."""
    what = "needs --to, one" if to is None else f"{to!r} is none"
    message = f"is an adapter, and {what} of {', '.join(written_formats())}"
    remedy = "name a format, like --to peft, or a program that loads the output, like --for vllm"
    return UsageError(message, culprit=os.fspath(source), remedy=remedy)


def _format_for(runtime: str, to: str | None, layout: str | None, architecture: str | None) -> str:
    """Return the format that a runtime reads. Raise UsageError for options that exclude it."""
    if to is not None:
        raise UsageError("--for and --to exclude each other: a runtime determines the format")
    for option, value in (("layout", layout), ("architecture", architecture)):
        if value is not None and not (runtime in IMAGE_RUNTIMES and option == "architecture"):
            raise UsageError(f"--{option} and --for exclude each other: a runtime determines what it reads")
    return loaded_by(runtime).key


def _convert(source: Adapter, call: Convert, request: ConvertRequest, opened: ExitStack) -> ConvertReport:
    """Plan and write the output of an open adapter. `opened` closes the files that the plan opens."""
    to = FORMATS[request.to]
    if to.key != source.format:  # before --rename and --exclude, which go by these names
        source = FORMATS[source.format].with_standard_names(source)
    runtime = RUNTIMES.get(request.runtime or "")
    path, is_file = _served_output(runtime, call.out) if runtime else to.output(call.out, "converted")
    read = [*paths_of([source.file]), *files_given(call.base, call.initial)]
    exists = check_output_path(path, is_file, read, call.force, dry_run=call.dry_run)
    named = new_paths(source.updates, request.rename).values()
    Selection(request.exclude).require_used([*named], source.name, "--exclude")
    settled = plan_convert(start(source), request, path.absolute().parent, opened)
    written, modules = content(settled, request.model), rows(settled)
    dropped = (*source.excluded, *unused_modules(source, settled))
    known = base_of_modelfile(path, call.base) if runtime and runtime.modelfile else None
    if not call.dry_run:
        opened.enter_context(naming_output(path))
        words = (input_word(source.name), *options_of(call))
        card = partial(_card, source, words, to.key, modules, dropped) if call.card else None
        training = about_training(former_metadata(source.file.metadata or {}, request.rank is not None))
        carded = replace(written, metadata={**training, **written.metadata}, card=card)
        if runtime and runtime.modelfile:
            modelfile.write(path, carded, to.key, source, known)
        else:
            to.write(path, is_file, carded, [source.file])
    specs = to.as_file(written).specs.values()
    return ConvertReport(
        adapter=source.name,
        source_format=source.format,
        out=str(path),
        to=to.key,
        family=settled.family if settled.is_certain else None,
        dry_run=call.dry_run,
        modules=modules,
        dropped=dropped,
        parameters=sum(spec.size for spec in specs),
        nbytes=sum(spec.nbytes for spec in specs),
        notes=(*source.notes, *settled.notes),
        runtime=request.runtime,
        warnings=tuple(_large_losses(settled, modules)),
        exists=exists,
        next=f"ollama create NAME -f {shell_word(path / MODELFILE)}" if known and not call.dry_run else "",
    )


def _large_losses(settled: Settled, modules: Sequence[ModuleConvert]) -> Iterator[str]:
    """Yield a warning if modules lose more of their change than `merge` accepts without one.

    The total loss is weighted by the size of the changes.
    """
    modules = [row for row in modules if row.rank]
    weak = [row for row in modules if row.error > 1 - KEPT_ENOUGH]
    if not weak:
        return
    losses, adapter = {row.name: settled.log[row.name].loss for row in modules}, settled.adapter
    sizes = [losses[row.name].total or size_of_change(adapter, row.name) for row in modules]
    squared_loss = sum(row.error**2 * size for row, size in zip(modules, sizes, strict=True))
    worst = max(weak, key=lambda row: row.error)
    is_cut = any(loss.cut for loss in losses.values())
    remedy = "a higher --rank loses less, a merge nothing" if is_cut else "--dtype fp32 loses less"
    yield (
        f"{len(weak):,} of {plural(len(modules), 'module')} lose more than {1 - KEPT_ENOUGH:.0%} of their change: "
        f"{share(math.sqrt(squared_loss / sum(sizes)))} is lost in all, {share(worst.error)} in {worst.name}; {remedy}"
    )


def _card(
    source: Adapter, words: Sequence[str], to: str, modules: Sequence[ModuleConvert], left_out: Sequence[str]
) -> bytes:
    """Return the output's model card. `words` are those of its command."""
    how = [f"{count} {word}" for word, count in Counter(module.how for module in modules).items()]
    worst = max((module.error for module in modules), default=0.0)
    change = f", each within {error_share(worst)} of its norm" if worst else ", equal bit for bit"
    facts = [*source_facts([(source, f"the adapter in {source.format}'s format")])]
    facts += [f"{len(modules)} modules, {', '.join(how)}{change}"]
    commands = (command_line("convert", *words, "-o", "converted"), command_line("inspect", "converted", "--strict"))
    title = f"{code(shown_name(source.name))} in {to}'s format"
    return adapter_card(title, to, [source], facts, commands, left_out)


def _served_output(runtime: Runtime, out: str | os.PathLike[str] | None) -> tuple[Path, bool]:
    """Return the path of an output for a runtime, and whether it is a file. Raise UsageError for the wrong kind."""
    to = loaded_by(runtime.key)
    if not runtime.modelfile and not to.can.folder:
        return to.output(out, "converted")
    path = Path("converted" if out is None else out)
    if any(path.suffix in endings for endings in CONTAINERS.values()):
        message = f"is the name of a file, but {runtime.title} needs a folder"
        raise UsageError(message, culprit=str(path), remedy="name a folder")
    return (path, False) if runtime.modelfile else to.output(path, "converted")


@contextmanager
def _whole_base(runtime: str | None) -> Iterator[None]:
    """Require the full base for a runtime that serves it. Its config.json is enough only for names."""
    try:
        yield
    except NeedsFlag as error:
        if runtime and error.asks_for("--base"):
            raise NeedsFlag(
                error.message, culprit=error.culprit, flags="--base BASE", why="with the served model"
            ) from error
        raise
