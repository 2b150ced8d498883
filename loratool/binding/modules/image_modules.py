"""Read an image adapter's modules by component and path, and detect their model family."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ...adapters.adapter import Adapter
from ...adapters.updates.update import Update, UpdateSpec
from ...architectures.components import component_of, components_of
from ...architectures.families import ENCODERS, FAMILIES
from ...architectures.families.detect import SHARED, detect, families_with, has_sizes
from ...architectures.families.lookup import locate
from ...architectures.families.table import DENOISERS, ModelFamily
from ...errors import InputError

BIGG_WIDTH = 1280  # of SDXL's second text encoder


@dataclass(frozen=True)
class SourceModule:
    """A module of the adapter to convert."""

    module: str  # its name in the adapter
    update: UpdateSpec
    component: str  # `unet`, `text_encoder`, `text_encoder_2`, ...; empty for a language model
    path: str  # dotted, in the adapter's naming


KNOWN = "loratool guide image-models lists them"  # remedy in messages on unknown image families


def read_source_modules(adapter: Adapter, kinds: Collection[type[Update]] = ()) -> tuple[list[SourceModule], list[str]]:
    """Return the modules with low-rank factors, and the names of modules that no image format can store.

    Args:
        kinds: kinds without factors that count as well.
    """
    sources, impossible = [], []
    for module, update in adapter.updates.items():
        component, path = component_of(module)
        dotted = dotted_path(path) if adapter.flattened or "." not in path else path
        is_read = update.rank or update.cls in kinds
        if not is_read or update.cls.stack or (dotted is None and adapter.flattened):
            impossible.append(module)
            continue
        dotted = dotted or path
        default = _which_clip(update, dotted) if dotted.startswith("text_model.") else "unet"
        sources.append(make_source_module(module, update, component or default, dotted))
    return sources, impossible


def dotted_path(flat: str) -> str | None:
    """Return the dotted path of a known module for its flattened path, in any naming."""
    tables = (*FAMILIES.values(), *ENCODERS.values())
    return next((located.path for table in tables if (located := locate(table, flat))), None)


def _which_clip(update: UpdateSpec, path: str) -> str:
    """Return the component of a CLIP module without one in its name: SDXL's second CLIP is wider than all others."""
    width = update.cls.flat(update)[0 if path.endswith("fc2") else 1]
    return "text_encoder_2" if width == BIGG_WIDTH else "text_encoder"


def make_source_module(module: str, update: UpdateSpec, component: str, path: str) -> SourceModule:
    """Return a SourceModule; a T5 is always the third text encoder, with any number in the adapter."""
    third = component not in DENOISERS and locate(ENCODERS["t5"], path) is not None
    return SourceModule(module, update, "text_encoder_3" if third else component, path)


def settle_components(sources: Iterable[SourceModule], family: ModelFamily) -> list[SourceModule]:
    """Return modules with the family's components, where a prefix can mean several."""
    return [replace(source, component=_settled(source, family)) for source in sources]


def _settled(source: SourceModule, family: ModelFamily) -> str:
    components = {component.name: component for component in family.components}
    if source.component in DENOISERS or source.component == "":
        return source.component
    if locate(ENCODERS["t5"], source.path):
        return next((name for name, each in components.items() if each.encoder == "t5"), source.component)
    can_be, _ = components_of(source.module)
    return (
        source.component
        if source.component in components
        else next((n for n in can_be if n in components), source.component)
    )


def detect_families(sources: Iterable[SourceModule]) -> tuple[str, ...]:
    """Return the keys of the image families that modules fit best, the likeliest first; empty for other models."""
    every = list(sources)
    if all(component_of(source.module)[0] is None and SHARED.fullmatch(source.path) for source in every):
        return ()
    return tuple(family.key for family in detect(_modules(every), _is_numbered(every)))


def fitting_families(sources: Sequence[SourceModule]) -> tuple[str, ...]:
    """Return the keys of the image families that have all modules by name, with any sizes."""
    return tuple(family.key for family in families_with(_modules(sources), _is_numbered(sources)))


def has_known_sizes(sources: Iterable[SourceModule], family: str) -> bool:
    """Return whether a known model of a family has the blocks and columns of the modules."""
    return has_sizes(FAMILIES[family], _modules(sources))


def _is_numbered(sources: Iterable[SourceModule]) -> bool:
    return any(source.module.startswith("lora_te1_") for source in sources)


def may_be_of_another(sources: Iterable[SourceModule], family: str) -> bool:
    """Return whether modules can be of another model: they have no image prefix, and sizes of no known model."""
    every = list(sources)
    prefixed = any(component_of(source.module)[0] for source in every)
    return not prefixed and not has_known_sizes(every, family)


def _modules(sources: Iterable[SourceModule]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(source.component, source.path, _matrix_shape(source.update)) for source in sources]


def _matrix_shape(update: UpdateSpec) -> tuple[int, ...]:
    """Return the shape of the matrix that an update changes, with 0 for unknown rows; empty if only they are known."""
    rows, columns = update.cls.flat(update)
    if rows is None and columns is not None:
        return 0, columns
    return update.shape if len(update.shape) > 1 and None not in (rows, columns) else ()


def detect_family(sources: Sequence[SourceModule]) -> str | None:
    """Return the likeliest image family, a key of FAMILIES; None if the modules are of another model."""
    return next(iter(detect_families(sources)), None)


def image_family(adapter: Adapter) -> str | None:
    """Return the image family of an adapter, a key of FAMILIES; None if it may be of another model."""
    sources, impossible = read_source_modules(adapter)
    if any(adapter.updates[module].rank for module in impossible):
        return None
    families = detect_families(sources)
    if len(families) != 1 or not (FAMILIES[families[0]].up_attention or has_known_sizes(sources, families[0])):
        return None
    prefixed = any(component_of(source.module)[0] for source in sources)
    return families[0] if prefixed or any(source.component in DENOISERS for source in sources) else None


def refuse_unknown_blocks(adapter: Adapter, sources: Sequence[SourceModule], family: str) -> None:
    """Raise InputError for a block that no known transformer has, even if excluded: it is another model."""
    if FAMILIES[family].up_attention:
        return
    known = {s.module for s in sources if s.component not in DENOISERS or locate(FAMILIES[family], s.path)}
    for module, update in adapter.updates.items():
        is_block = component_of(module)[0] in (None, *DENOISERS) and _in_block(module)
        if update.rank and not update.cls.stack and is_block and module not in known:
            message = f"is in no known image model ({KNOWN})"
            raise InputError(message, culprit=module, remedy=f"{adapter.name} is for another model")


def _in_block(module: str) -> bool:
    """Return whether a path goes through a block of a transformer, by the families' names for blocks."""
    stems = {s.partition(".{i}")[0] for f in FAMILIES.values() for b in f.blocks for s in (b.maker, b.diffusers)}
    flat = module.replace(".", "_")
    return any(re.search(rf"{re.escape(stem.replace('.', '_'))}_\d+_", flat) for stem in stems)


def find_unknown_modules(sources: list[SourceModule], family: str) -> list[str]:
    """Return the denoiser's modules that the family lacks."""
    return [s.module for s in sources if s.component in DENOISERS and locate(FAMILIES[family], s.path) is None]
