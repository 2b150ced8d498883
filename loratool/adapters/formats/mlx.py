"""Read and write MLX's format: `adapters.safetensors` beside `adapter_config.json`, as mlx-lm trains and loads them.

Before spring 2024 it was a NumPy archive of the same tensors, without a config.
Tensors are `<module>.lora_a` (in, r) and `.lora_b` (r, out), with DoRA `.m`; `mlx_stacks` describes those of experts.
The config has one `scale`, a factor of the product (PEFT's alpha / r), one `rank`, and the modules in `keys`.
`fine_tune_type: full` has full tensors instead. Modules have the names of mlx-lm's classes, listed in
`architectures.mlx_names`.
mlx-vlm up to summer 2026 has `.A` and `.B`, and a config of `rank`, `alpha` and `dropout`. Its scale is alpha before
0.5.0, and alpha / rank since.
Defined by ml-explore/mlx-lm 0.32: `mlx_lm/tuner/{lora,dora,utils}.py`; ml-explore/mlx-examples: `lora/`;
Blaizzy/mlx-vlm: `mlx_vlm/trainer/lora.py` of 0.1.0, `mlx_vlm/trainer/peft/lora.py` of 0.7.10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, final

from ...architectures.conv1d import stores_transposed
from ...architectures.experts import PEFT_TAKES_AS_PLAIN, TRANSPOSED_EXPERTS
from ...architectures.fused_rows import nested_configs
from ...architectures.mlx_names import FORMAT, Share, find_share, mlx_names
from ...architectures.prefixes import module_path
from ...architectures.renames import canonical
from ...architectures.roles import EMBEDDINGS
from ...architectures.ties import INPUT_EMBEDDINGS
from ...durable.fileio import require_free_space, write_file
from ...errors import InputError, NeedsFlag, UsageError, brief, with_article
from ...files.containers.file_kinds import NPZ
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..config import AdapterConfig, named_base
from ..image_metadata import about_training
from ..updates.dora import DoRA
from ..updates.experts import Experts
from ..updates.headers import spec_from_roles, unpaired
from ..updates.low_rank import LowRank, other_rank
from ..updates.replace import ReplaceTensor
from ..updates.update import Stack, UpdateSpec
from .content import AdapterContent
from .format import Capabilities, Format, ReadOptions
from .made_tensors import copied, made_of, virtual_file
from .mlx_output import MARKS, PEFT_FIELDS, find_misfits, is_tied, mlx_content
from .mlx_stacks import JoinedStack, MlxPair, StackLayout
from .peft_config import CONFIG_NAME, find_config
from .single_file import file_size, write_card, write_single_file

if TYPE_CHECKING:
    from ...numerics.forms import Bits

FUSE = "let mlx_lm.fuse merge it"
FILE_NAME = "adapters.safetensors"
ENDS = {"A": "lora_a", "B": "lora_b", "magnitude": "m"}
ROLES = {end: role for role, end in ENDS.items()}
FACTORS = (".lora_a", ".lora_b")
VLM_ROLES = {"A": "A", "B": "B"}  # mlx-vlm's
KINDS = ("lora", "dora", "full")
# of ml-explore/mlx-examples, `lora/models.py`, whose adapters.npz has no config beside it; mlx-lm began with 10
SCALES_OF_NPZ = "the code that wrote adapters.npz has a scale of 2, 10 or 20, by its version"


@final
class Mlx(Format):
    """Folders, or files, of transposed factors of one language model under mlx-lm's names."""

    key = "mlx"
    loaded_by = ("mlx",)
    title = "MLX: a folder for mlx-lm"
    can = Capabilities(
        kinds=frozenset({LowRank, Experts, DoRA}),
        writes=True,
        components="one",
        alpha="config",
        folder=True,
        kernels=False,
        depends_on_base=True,
        one_scale=True,
    )
    ends = ENDS

    def claims(self, names: Iterable[str]) -> bool:
        names = [*names]
        return any(name.endswith(FACTORS) for name in names) or _are_vlms(names)

    def claims_config(self, fields: Mapping[str, Any]) -> bool:
        return is_mlx_config(fields)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Stacks of experts get the names of transformers' class if `options` has the model. Otherwise they keep MLX's
        names, and also for a quantized folder of MLX whose class has them in another order.

        Raises:
            InputError: the config is not MLX's, or lacks the kind or module of a tensor.
            NeedsFlag: the scale is unknown.
            UsageError: the alpha of `options` contradicts the config.
        """
        fields, _ = find_config(file)
        of_vlm = _are_vlms(file.specs)
        settings = (_parse_vlm if of_vlm else _parse)(name, file.file_format, fields, options)
        types = tuple(nested_configs(options.model))
        if settings.kind == "full":
            return Adapter(name, self.key, file, settings.config, _whole(file, types))
        modules_by_path = _sort(file, settings.kind, VLM_ROLES if of_vlm else ROLES)
        stays = not types or ("quantization" in options.model and not TRANSPOSED_EXPERTS.isdisjoint(types))
        layers: dict[str, Mapping[str, str]] = {}  # path -> its tensors by role
        stacks: dict[str, tuple[Share, dict[int, str]]] = {}  # the class's parameter -> MLX's modules by share
        for module, roles in modules_by_path.items():
            path = canonical(module, types)
            if all(len(file.specs[key].shape) < 3 for key in roles.values()):
                layers[path] = roles
                continue
            share = (None if stays else find_share(path, types)) or Share(path, 0, 1)
            stacks.setdefault(share.stack, (share, {}))[1][share.part] = module
        transposed = {key: file.specs[key].shape[::-1] for roles in layers.values() for key in roles.values()}
        new_tensors = {key: made_of(file, key, shape, _transpose) for key, shape in transposed.items()}
        seen = virtual_file(file, new_tensors, file.metadata or {})
        updates = {path: _layer(path, roles, seen, settings, options) for path, roles in layers.items()}
        is_transposed = not stays and not PEFT_TAKES_AS_PLAIN.isdisjoint(types)
        for stack, (share, modules) in stacks.items():
            tensors = {part: modules_by_path[modules[part]] for part in sorted(modules)}
            layout = StackLayout(0, share.parts, share.interleaved, is_transposed)
            try:
                pairs = {part: MlxPair.of(modules[part], roles, file) for part, roles in tensors.items()}
                joined = JoinedStack.of(stack, pairs, layout)
                updates[stack] = _stack(stack, joined, settings, False if stays and types else None)
            except InputError as error:
                if not options.lenient:
                    raise
                roles = next(iter(tensors.values()))
                updates[stack] = unpaired(stack, roles, file, error)
                new_tensors |= {key: copied(file, key) for key in roles.values()}
                continue
            new_tensors |= joined.made(updates[stack].tensors)
        _refuse_scaled(updates, types)
        seen = virtual_file(file, new_tensors, file.metadata or {})
        rows = [path for path, update in updates.items() if update.everywhere and not types]
        unnamed = (*(stacks if stays else ()), *rows)
        return Adapter(name, self.key, seen, settings.config, updates, notes=settings.notes, own_names=unnamed)

    def with_standard_names(self, adapter: Adapter) -> Adapter:
        if adapter.own_names:
            raise NeedsFlag(
                "has the name of mlx-lm's own class, and only the model's config tells its name elsewhere "
                f"({adapter.name})",
                culprit=adapter.own_names[0],
                flags="--base BASE",
                why="with the model in transformers' format",
            )
        return adapter

    def misfits(self, source: Adapter, updates: Mapping[str, UpdateSpec], model: Mapping[str, Any]) -> dict[str, str]:
        return find_misfits(source.name, updates, model, source.format == self.key)

    def model_notes(self, model: Mapping[str, Any]) -> tuple[str, ...]:
        types = tuple(nested_configs(model))
        if types and mlx_names(types) is None:
            family = with_article(types[0])
            return (f"mlx-lm's names for {family} are unknown here, and it refuses names that it does not have",)
        if not types:
            return ("the module names are copied unchanged; with --base BASE they become mlx-lm's",)
        return ()

    def as_file(self, content: AdapterContent) -> AdapterContent:
        stored = mlx_content(content)
        config = json.dumps({"adapter_config": stored.config}, sort_keys=True)
        return replace(stored, metadata={**about_training(content.metadata), "format": FORMAT, "loratool": config})

    def fill(self, place: Path | BinaryIO, content: AdapterContent, inputs: Collection[WeightsFile]) -> None:
        """Write into a folder, or one file with its config in the metadata."""
        if not isinstance(place, Path):
            super().fill(place, content, inputs)
            return
        stored, metadata = mlx_content(content), {**about_training(content.metadata), "format": FORMAT}
        require_free_space(place.absolute().parent, file_size(stored.specs, metadata))
        write_single_file(place / FILE_NAME, stored.specs, stored.load, metadata, inputs)
        write_file(place / CONFIG_NAME, (json.dumps(stored.config, indent=4, sort_keys=True) + "\n").encode())
        write_card(place, content)


@dataclass(frozen=True)
class _Settings:
    """The settings in a config."""

    kind: str  # one of KINDS
    scale: float | None
    config: AdapterConfig
    notes: tuple[str, ...]


def is_mlx_config(fields: Mapping[str, Any]) -> bool:
    return not fields.keys().isdisjoint(MARKS)


def _parse(name: str, file_format: str, fields: Mapping[str, Any], options: ReadOptions) -> _Settings:
    """Parse a config; raise an error if it is not MLX's, or if neither it nor `options` gives the scale."""
    if len(fields) > 1 and not is_mlx_config(fields):
        raise InputError(
            f"its {CONFIG_NAME} is not MLX's, although its tensors are: it has no lora_parameters",
            culprit=name,
            remedy="put the config that mlx-lm wrote beside them",
        )
    kind = fields.get(
        "fine_tune_type", "dora" if fields.get("use_dora") is True else KINDS[0]
    )  # as older versions of mlx-lm wrote it
    if kind not in KINDS:
        raise InputError(f"its config's fine_tune_type {brief(kind)} is none of {', '.join(KINDS)}", culprit=name)
    lora = fields.get("lora_parameters", {})
    if not isinstance(lora, dict):
        raise InputError("its config's lora_parameters are not an object", culprit=name)
    scale, rank = lora.get("scale"), lora.get("rank")
    if scale is not None and (type(scale) not in (int, float) or not -1e300 < scale < 1e300):
        raise InputError(f"its config's scale {brief(scale)} is not a number that can be used", culprit=name)
    if rank is not None and (type(rank) is not int or not 0 < rank < 2**31):
        raise InputError(f"its config's rank {brief(rank)} is not a number that can be used", culprit=name)
    if scale is None and options.alpha is None and kind != "full" and not options.lenient:
        of_peft = "; it has alpha, which mlx-lm does not read" if "alpha" in lora else ""
        usual = f" ({SCALES_OF_NPZ})" if file_format == NPZ else ""
        raise NeedsFlag(
            f"has no config that says the scale{of_peft}",
            culprit=name,
            remedy=f"put lora_parameters.scale into its {CONFIG_NAME}, or pass --alpha, which is scale * rank{usual}",
            flags="--alpha A",
        )
    if scale is not None and rank and options.alpha not in (None, scale * rank):
        raise UsageError(
            f"--alpha {options.alpha:g} contradicts the config's scale {scale:g} of rank {rank}",
            culprit=name,
            remedy="leave --alpha out",
        )
    missing = [key for key in ("rank", "dropout") if key not in lora] if lora else []
    notes = (f"its config has no {' and no '.join(missing)}, without which mlx-lm does not load it",) if missing else ()
    config = AdapterConfig(
        rank=rank,
        alpha=options.alpha if scale is None else float(scale * (rank or 1)),
        base_model=named_base(fields.get("model")),
        other_fields={key: value for key, value in fields.items() if key not in PEFT_FIELDS},  # ignored by mlx-lm
    )
    return _Settings(kind, None if scale is None else float(scale), config, notes)


def _are_vlms(names: Collection[str]) -> bool:
    """Return whether names are those of mlx-vlm's factors, and of nothing else: a model may have an A and a B too."""
    return bool(names) and all(name.endswith((".A", ".B")) for name in names)


def _parse_vlm(name: str, _: str, fields: Mapping[str, Any], options: ReadOptions) -> _Settings:
    """Parse a config of mlx-vlm; raise an error if it is another's, or if `options` have no alpha."""
    rank, alpha = fields.get("rank", 0), fields.get("alpha", "")
    if type(rank) is not int or not 0 < rank < 2**31 or type(alpha) not in (int, float) or not abs(alpha) < 1e300:
        raise InputError(
            f"its tensors have the names of mlx-vlm's LoRA, and it has no {CONFIG_NAME} with a rank and an alpha",
            culprit=name,
            remedy="put the config that mlx-vlm wrote beside them",
        )
    message = (
        f"does not say by which mlx-vlm it was trained: the alpha {alpha:g} of its config is the scale before 0.5.0, "
        "and divided by the rank since"
    )
    remedy = f"pass --alpha {alpha * rank:g} if it was trained before 0.5.0, --alpha {alpha:g} if since"
    if options.alpha is None and not options.lenient:
        raise NeedsFlag(message, culprit=name, remedy=remedy, flags="--alpha A")
    notes = (f"{name}: {message}; {remedy}",) if options.alpha is None else ()
    return _Settings(KINDS[0], None, AdapterConfig(rank=rank, alpha=options.alpha), notes)


def _whole(file: WeightsFile, types: tuple[str, ...]) -> dict[str, UpdateSpec]:
    """Return the updates of a full fine-tune, each a tensor as mlx-lm stores it.

    Raises:
        InputError: mlx-lm changes the numbers of the model's files on loading, and no shape shows whether a base has
            the changed ones; or there are codes of a quantized model that was trained.
    """
    if codes := next((key for key, spec in file.specs.items() if spec.dtype == "U32"), None):
        raise InputError("is stored as codes: a full fine-tune of a quantized model", culprit=codes, remedy=FUSE)
    names = mlx_names(types)
    if types and names is None:
        raise InputError(
            f"is for {with_article(types[0])}, for which mlx-lm may store other numbers",
            culprit=str(file.path),
            remedy=FUSE,
        )
    if names and (names.shifted or names.scaled):
        what = "its norms with 1 added" if names.shifted else "its weights multiplied by numbers of the config"
        raise InputError(
            f"is for {with_article(types[0])}, for which mlx-lm stores {what}",
            culprit=str(file.path),
            remedy=FUSE,
        )
    updates = {}
    for key, spec in file.specs.items():
        if key.endswith(FACTORS):
            raise InputError("is a factor, but the config's fine_tune_type is full", culprit=key)
        path = module_path(canonical(key, types))
        is_transposed = (
            stores_transposed(types, path) if len(spec.shape) == 2 else not TRANSPOSED_EXPERTS.isdisjoint(types)
        )
        if is_transposed and len(spec.shape) > 1:
            model = with_article(types[0])
            raise InputError(f"has another layout than in the files of {model}", culprit=key, remedy=FUSE)
        updates[path] = UpdateSpec(ReplaceTensor, path, {"value": key}, {"value": spec})
    return updates


def _sort(file: WeightsFile, kind: str, roles_by_end: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the tensors by module and role; raise InputError for a tensor of another kind of adapter."""
    modules: dict[str, dict[str, str]] = {}
    for key in file.specs:
        module, _, end = key.rpartition(".")
        if end not in roles_by_end or not module:
            raise InputError("is not a tensor of MLX's LoRA", culprit=key)
        modules.setdefault(module, {})[roles_by_end[end]] = key
    for module, roles in modules.items():
        if ("magnitude" in roles) is not (kind == "dora") and len(roles) > 1:
            has = "has an m" if "magnitude" in roles else "has no m"
            raise InputError(f"{has}, but the config's fine_tune_type is {kind}", culprit=module)
    return modules


def _transpose(stored: Bits) -> Bits:
    return stored.T if stored.ndim == 2 else stored


def _layer(
    path: str, roles: Mapping[str, str], file: WeightsFile, settings: _Settings, options: ReadOptions
) -> UpdateSpec:
    """Return the update of a layer of one matrix.

    An embedding's factors are along its rows, its magnitudes along its tokens. Both also apply to a tied head.
    """
    last = path.rpartition(".")[2]
    is_rows = last in EMBEDDINGS
    update = spec_from_roles(
        path, roles, file, settings.config, is_rows or None, along_inputs=is_rows, lenient=options.lenient
    )
    update = replace(update, everywhere=last in INPUT_EMBEDDINGS and is_tied(options.model) is not False)
    return update if settings.scale is None or not update.rank else replace(update, scale=settings.scale)


def _stack(stack: str, joined: JoinedStack, settings: _Settings, transposed: bool | None) -> UpdateSpec:
    for pair in joined.pairs.values():
        if settings.config.rank not in (None, pair.rank):
            spec = UpdateSpec(LowRank, stack, {}, {"A": pair.file.specs[pair.A]})
            raise other_rank(spec, settings.config.rank or 0)
    tensors = {role: f"{stack}.{ENDS[role]}" for role in Experts.roles}
    scale = settings.config.scale_of(stack, joined.rank) if settings.scale is None else settings.scale
    return UpdateSpec(Experts, stack, tensors, joined.specs(), scale, detail=Stack(joined.experts, transposed))


def _refuse_scaled(updates: Mapping[str, UpdateSpec], types: tuple[str, ...]) -> None:
    """Raise InputError for a module whose weight mlx-lm scales on loading, which would scale the change too."""
    names = mlx_names(types)
    for module in updates:
        if names and names.scaled and re.search(names.scaled, module):
            raise InputError(
                f"is of {types[0]}, whose weights mlx-lm multiplies by numbers of the config",
                culprit=module,
                remedy=FUSE,
            )
