"""Map every name of an image model's module to rows of the base's tensors.

A module has a component (`unet` for any denoiser, `text_encoder`, `text_encoder_2`, ...) and a path in it. The path can
have any naming of the tables in `families`. If one naming fuses modules that the other splits, a name means rows of one
tensor or of several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from .components import DENOISER_PREFIXES, FOLDERS, PREFIXES
from .families import ENCODERS, FAMILIES
from .families.detect import family_of_names
from .families.lookup import Located, locate, names_maker, parts_of
from .families.table import DENOISERS, ModelFamily
from .families.unet import diffusers_to_sgm, sgm_to_diffusers

Shape = tuple[int, ...]

SCALE = ".scale"  # suffix of makers' names for the weights of some norms

CLIP_STARTS = ("text_model.", "embeddings.token_embedding.")  # prefixes in a file of only a CLIP


@dataclass(frozen=True)
class ModuleRows:
    """Rows of a tensor that are rows of a module."""

    tensor: str
    start: int  # rows [start, stop) of the tensor
    stop: int
    skip: int  # the number of row `start` in the module
    module_rows: int  # number of rows of the module


@dataclass(frozen=True)
class _Part:
    """The modules of one component of a base."""

    table: ModelFamily | None
    tensors: Mapping[str, str]  # path in the base's naming -> tensor of its weight
    shapes: Mapping[str, Shape]  # of all tensors of the base

    def rows(self, path: str, flat: bool) -> tuple[ModuleRows, ...]:
        """Return the rows of a module's weight under any name; empty if it is missing."""
        full_path = self._spellings_flat.get(path) if flat else self._spellings.get(path)
        if full_path is not None:
            return (_all_rows(self.tensors[full_path], self.shapes),)
        if self.table is None:
            end, paths = ("_", self._spellings_flat) if flat else (".", self._spellings)
            ending = [each for name, each in paths.items() if name.endswith(end + path)]
            return (_all_rows(self.tensors[ending[0]], self.shapes),) if len(ending) == 1 else ()
        located = None if self.table.up_attention else locate(self.table, path)
        present = [module for module in located.diffusers if module in self._complete] if located else []
        return (
            _rows_in_base(located, self._columns[present[0]], self._complete, self._pieces)
            if located and present
            else ()
        )

    @cached_property
    def _spellings(self) -> dict[str, str]:
        """Every name of a full tensor of the base -> its path."""
        spellings = {path: path for path in self.tensors}
        for path in self.tensors:
            others: tuple[str, ...] = ()
            if self.table is ENCODERS["clip"] and not names_maker(self.table, path):
                others = (path.removeprefix("text_model."), f"text_model.{path.removeprefix('text_model.')}")
            elif self.table and self.table.up_attention:
                plain = sgm_to_diffusers(path)
                others = (plain,) if plain != path else (diffusers_to_sgm(path), diffusers_to_sgm(path, False))
            for other in others:
                spellings.setdefault(other, path)
        return spellings

    @cached_property
    def _spellings_flat(self) -> dict[str, str]:
        return {name.replace(".", "_"): path for name, path in self._spellings.items()}

    @cached_property
    def _pieces(self) -> dict[str, list[ModuleRows]]:
        """diffusers' module -> its rows in the base's tensors."""
        pieces: dict[str, list[ModuleRows]] = {}
        for path, name in self.tensors.items():
            located = locate(self.table, path) if self.table else None
            rows, width, *_ = (*self.shapes[name], 1)
            for span in (parts_of(located, width, rows) if located else None) or ():
                piece = ModuleRows(name, span.start, span.stop, span.skip, span.module_rows)
                pieces.setdefault(span.module, []).append(piece)
        return pieces

    @cached_property
    def _complete(self) -> dict[str, int]:
        """diffusers' module -> its number of rows, if all of them are in the base."""
        counts = {module: rows[0].module_rows for module, rows in self._pieces.items()}
        return {m: counts[m] for m, rows in self._pieces.items() if sum(r.stop - r.start for r in rows) == counts[m]}

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {module: (*self.shapes[rows[0].tensor], 1)[1] for module, rows in self._pieces.items()}


@dataclass(frozen=True)
class ImageModules:
    """The modules of an image model, under all their names."""

    shapes: Mapping[str, Shape]
    parts: Mapping[str, _Part] = field(default_factory=dict)  # by component; empty for other models

    def __bool__(self) -> bool:
        return bool(self.parts)

    @property
    def family(self) -> ModelFamily | None:
        """The family of the denoiser; None without a denoiser or for an unknown family."""
        return next((part.table for name, part in self.parts.items() if name in DENOISERS), None)

    @property
    def has_maker_names(self) -> bool:
        """True if the denoiser's names are not diffusers'."""
        parts = [part for name, part in self.parts.items() if name in DENOISERS]
        return any(names_maker(part.table, path) for part in parts if part.table for path in part.tensors)

    def find(self, component: str, path: str, flat: bool = False) -> tuple[ModuleRows, ...]:
        """Return the rows of the base's tensors that make up a module; empty if it is missing.

        A path that ends in `.bias` is the bias of that module, in the same rows as the weight. If two namings use a
        name for different modules, it means the module that has this name in the base.

        Args:
            flat: the path has `_` for its dots.
        """
        part = self.parts.get(component)
        if part is None:
            return ()
        end = "_bias" if flat else ".bias"
        rows = part.rows(path, flat)
        return rows or (_biases(part.rows(path.removesuffix(end), flat), self.shapes) if path.endswith(end) else ())

    def holds(self, path: str, flat: bool) -> bool:
        """Return whether any component has the module."""
        return any(self.find(component, path, flat) for component in self.parts)


def image_modules(shapes: Mapping[str, Shape]) -> ImageModules:
    """Return the modules of a base; empty if it is not an image model.

    Args:
        shapes: tensor -> shape of the base.
    """
    parts: dict[str, _Part] = {}
    tensors: dict[tuple[str, ModelFamily | None], dict[str, str]] = {}
    for component, table, path, name in _split(shapes):
        tensors.setdefault((component, table), {})[path] = name
    for (component, table), names in tensors.items():
        parts[component] = _Part(table, names, shapes)
    t5 = next((part for part in parts.values() if part.table is ENCODERS["t5"]), None)
    if t5:  # the third for kohya, the second in a Flux pipeline
        parts = {"text_encoder_3": t5, "text_encoder_2": t5, **parts}
    return ImageModules(shapes, parts)


def image_parts(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, str]]:
    """Return tensor -> (component, path), in the base's naming, for every weight that an adapter can change.

    The result is empty if the base is not an image model.
    """
    weights = {name for name, shape in shapes.items() if len(shape) > 1 and name.endswith("weight")}
    parts = [(component, table, path, name) for component, table, path, name in _split(shapes) if name in weights]
    return {name: (component, path) for component, _, path, name in parts} if any(t for _, t, _, _ in parts) else {}


def _path_of(weight: str) -> str:
    """Return the path of the module of a weight."""
    return weight.removesuffix(SCALE).removesuffix(".weight").removesuffix("_weight")


def _all_rows(tensor: str, shapes: Mapping[str, Shape]) -> ModuleRows:
    return ModuleRows(tensor, 0, shapes[tensor][0], 0, shapes[tensor][0])


def _biases(weights: Sequence[ModuleRows], shapes: Mapping[str, Shape]) -> tuple[ModuleRows, ...]:
    """Return the rows of the biases for a module's rows of weights; empty if a weight has no bias."""
    biases = tuple(replace(each, tensor=each.tensor.removesuffix("weight") + "bias") for each in weights)
    are_stored = all(shapes.get(bias.tensor) == shapes[w.tensor][:1] for bias, w in zip(biases, weights, strict=True))
    return biases if are_stored else ()


def _encoder_of(paths: Iterable[str]) -> ModelFamily | None:
    """Return the table of the text encoder that has one of these modules."""
    every = list(paths)
    return next((encoder for encoder in ENCODERS.values() if any(locate(encoder, path) for path in every)), None)


def _split(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, ModelFamily | None, str, str]]:
    """Yield (component, its table, path, tensor) for every tensor that an adapter can change."""
    # Two models can differ only in a table of positions, which no adapter changes.
    paths = {name: _path_of(name) for name, shape in shapes.items() if shape and not name.endswith("bias")}
    modules = {
        name: path
        for name, path in paths.items()
        if name.endswith(("weight", SCALE))
        and not name.startswith("first_stage_model.")
        and not (name.endswith(SCALE) and f"{path}.weight" in shapes)
    }
    if any("/" in name for name in modules):
        for folder, component in FOLDERS.items():
            inside = {n: path.removeprefix(f"{folder}/") for n, path in paths.items() if n.startswith(f"{folder}/")}
            inside_shapes = {path: shapes[name] for name, path in inside.items()}
            table = (
                _of_folders(family_of_names(inside_shapes), shapes)
                if component in DENOISERS
                else _encoder_of(inside_shapes)
            )
            yield from ((component, table, path, name) for name, path in inside.items() if name in modules)
        return
    prefix, denoiser = _find_denoiser({path: shapes[name] for name, path in paths.items()})
    theirs = denoiser.components[1:] if denoiser else ()
    own_prefix = "diffusion_model."  # of the denoiser in ComfyUI's repacks, and of the modules in it
    encoders = PREFIXES | {
        (
            prefix + component_row.comfy[len(own_prefix) :]
            if component_row.comfy.startswith(own_prefix)
            else component_row.comfy
        ): (
            component_row.name,
            component_row.encoder,
        )
        for component_row in theirs
        if component_row.comfy
    }
    prefixes = {name: next((p for p in encoders if name.startswith(p)), "") for name in modules}
    has_encoders = any(prefixes.values())
    is_clip = denoiser is None and any(mark in name for name in shapes for mark in ENCODERS["clip"].marks)
    if not denoiser and not (is_clip and (has_encoders or any(name.startswith(CLIP_STARTS) for name in shapes))):
        return
    for name, path in modules.items():
        if prefixes[name]:
            component, encoder = encoders[prefixes[name]]
            yield component, ENCODERS.get(encoder), path.removeprefix(prefixes[name]), name
        elif denoiser and path.startswith(prefix):
            yield "unet", denoiser, path.removeprefix(prefix), name
        elif is_clip and not has_encoders:
            yield "text_encoder", ENCODERS["clip"], path, name


def _of_folders(family: ModelFamily | None, names: Iterable[str]) -> ModelFamily | None:
    """Return, among families with the same blocks, the one with most of a pipeline's folders."""
    if family is None:
        return None
    folders = {name.partition("/")[0] for name in names}
    alike = [family, *(each for each in FAMILIES.values() if each.blocks and each.blocks is family.blocks)]
    return max(alike, key=lambda each: sum(component.diffusers[:-1] in folders for component in each.components))


def _find_denoiser(shapes: Mapping[str, Shape]) -> tuple[str, ModelFamily | None]:
    """Return the prefix of the denoiser's modules in a single file, and its family; None if unknown."""
    denoiser: tuple[str, ModelFamily | None] = "", None
    most = 0
    for prefix in DENOISER_PREFIXES:
        inside = {path.removeprefix(prefix): shape for path, shape in shapes.items() if path.startswith(prefix)}
        family = family_of_names(inside) if inside else None
        count = sum(locate(family, path) is not None for path in inside) if family else 0
        if count > most:
            denoiser, most = (prefix, family), count
    return denoiser


def _rows_in_base(
    located: Located, columns: int, known: Mapping[str, int], pieces: Mapping[str, Sequence[ModuleRows]]
) -> tuple[ModuleRows, ...]:
    """Return the rows of the base's tensors that make up a module of any name; empty if some are missing."""
    module_rows: list[ModuleRows] = []
    spans = parts_of(located, columns, known=known) or ()
    if any(span.module not in known for span in spans):
        return ()
    for span in spans:
        for stored in sorted(pieces[span.module], key=lambda piece: piece.skip):
            low = max(span.skip, stored.skip)
            high = min(span.skip + span.stop - span.start, stored.skip + stored.stop - stored.start)
            if low < high:
                start, skip = stored.start + low - stored.skip, span.start + low - span.skip
                last = module_rows[-1] if module_rows else None
                if last and last.tensor == stored.tensor and last.stop == start:  # consecutive rows
                    start, skip = last.start, last.skip
                    module_rows.pop()
                module_rows.append(
                    ModuleRows(stored.tensor, start, stored.start + high - stored.skip, skip, spans[-1].stop)
                )
    return tuple(sorted(module_rows, key=lambda rows: rows.start))
