"""The structure of a model family's table: names in all namings, rows of fused matrices, characteristic widths.

Every other naming is defined relative to diffusers' modules: a maker's module is a sequence of runs of their rows. So
a plain rename, a fused matrix, a matrix with swapped halves and a part of a matrix have one representation.

A family imports the rows of the model that it derives from. Unrelated models with equal rows repeat them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from ...errors import InputError


class Naming(Enum):
    """A naming of a denoiser's modules."""

    MAKER = auto()
    DIFFUSERS = auto()
    COMFY = auto()  # ComfyUI's; the maker's where ComfyUI has no other


# The components that are denoisers, with the modules of the family's table
DENOISERS = ("unet", "transformer_2", "unconditional_transformer")

# Ends of the paths of the norms whose new weights diffusers reads beside factors, as of Flux's control adapters
# (`loaders/lora_pipeline.py`: FluxLoraLoaderMixin)
CONTROL_NORMS = (".norm_q", ".norm_k", ".norm_added_q", ".norm_added_k")

# Ends of the paths of the projections in diffusers' attention over image and text at once
JOINT_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a diffusers' module."""

    module: str
    part: int = 0  # number of the part, of `parts` equal parts of the module's rows
    parts: int = 1


@dataclass(frozen=True)
class Fused:
    """Runs of rows that make up one module in another naming, in the order of its rows."""

    runs: tuple[str | Run, ...]  # a name means all rows of that module
    # The rows of each run: a multiple of the matrix's columns, `queries` (known only from a config), or None for an
    # equal share of the other rows; () if all are equal.
    sizes: tuple[int | Literal["queries"] | None, ...] = ()


Rows = str | Fused  # a name means the same matrix under another name


def swapped(module: str) -> Fused:
    """Return a module with the halves of its rows swapped, as shift and scale are in two namings."""
    return Fused((Run(module, 1, 2), Run(module, 0, 2)))


@dataclass(frozen=True)
class Block:
    """The modules in a block of a stack; `{i}` in a stem is the block's number, and `*` is any path."""

    maker: str  # stem of the maker's names
    diffusers: str  # stem of diffusers' names
    names: Mapping[str, Rows] = field(default_factory=dict)  # maker's name -> rows of diffusers' modules
    aliases: Mapping[str, Rows] = field(default_factory=dict)  # as `names`, in other namings, under the maker's stem
    alike: tuple[str, ...] = ()  # names that are the same in both
    stems: tuple[str, ...] = ()  # other stems of diffusers' names
    by_ratio: Mapping[str, tuple[int, Rows]] = field(default_factory=dict)  # name -> (rows / columns, rows if so)
    tensors: Mapping[str, str] = field(default_factory=dict)  # maker's tensor -> diffusers', if their suffixes differ
    comfy: Mapping[str, Rows] = field(default_factory=dict)  # as `names`, where ComfyUI's names are not the maker's
    comfy_stem: str = ""  # stem of these; by default the maker's
    counts: tuple[int, ...] = ()  # numbers of such blocks in known models


@dataclass(frozen=True)
class Component:
    """A part of the pipeline that has adapters, with the prefixes of its modules in the files of each ecosystem.

    A prefix is empty where no file has such modules.
    """

    name: str  # `unet` for any denoiser, `text_encoder`, `text_encoder_2`, ...
    kohya: str  # `lora_te1_`, before flattened paths
    comfy: str  # `text_encoders.clip_l.transformer.`
    diffusers: str  # the folder in a pipeline and a dot
    encoder: str = ""  # key of ENCODERS; empty if all names are the same everywhere


@dataclass(frozen=True)
class Width:
    """Modules that have one of these numbers of columns in every known model of the family."""

    component: str  # `unet` for any denoiser
    ends: tuple[str, ...]  # of their paths, in diffusers' naming
    columns: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)  # compared and hashed by identity
class ModelFamily:
    """The facts of one family; literal, no code."""

    key: str  # `flux`
    title: str  # `Flux`
    blocks: tuple[Block, ...] = ()
    outside: Mapping[str, Rows] = field(default_factory=dict)  # maker's name -> rows of diffusers' modules
    outside_aliases: Mapping[str, Rows] = field(default_factory=dict)
    alike: tuple[str, ...] = ()  # names outside of the blocks that are the same in both
    outside_tensors: Mapping[str, str] = field(default_factory=dict)  # as Block.tensors
    outside_comfy: Mapping[str, Rows] = field(default_factory=dict)  # as Block.comfy
    unused: tuple[str, ...] = ()  # maker's tensors that diffusers lacks
    # End of diffusers' tensor -> its shape, if the maker stores the same numbers in another shape; -1 is any size.
    reshaped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # Prefixes of other components' tensors that are among the denoiser's in a single file
    beside: tuple[str, ...] = ()
    # A model of these modules whose maker has diffusers' names -> prefixes of tensors that only this model has
    unrenamed: Mapping[str, str] = field(default_factory=dict)
    diffusers_class: str = ""  # of the denoiser
    # Other classes whose adapters diffusers reads as this family's; they are written as this family's
    other_classes: tuple[str, ...] = ()
    # Fields of the class's config that tell it from another family of this class
    config: Mapping[str, str | None] = field(default_factory=dict)
    # Key of a family with such modules of the same sizes, and with more adapters: in formats that this family has no
    # files of, an adapter that fits both is taken for the other one's
    repeats: str = ""
    # For a UNet, whose blocks `unet` numbers: whether each upsampling block has attention.
    up_attention: tuple[bool, ...] = ()
    components: tuple[Component, ...] = ()  # the denoiser first
    # diffusers' module for the latent image, after whose inputs a control adapter has its own
    control_input: str = ""
    control_columns: int = 0  # its inputs in models without a control image
    conv1d: tuple[str, ...] = ()  # ends of paths whose weight is stored as (in, out)
    marks: tuple[str, ...] = ()  # every base's names contain one of these
    telling: str = ""  # a regular expression for diffusers' paths that only this family has
    widths: tuple[Width, ...] = ()
    ratios: Mapping[str, int] = field(default_factory=dict)  # end of a path in any naming -> its rows / columns
    kohya: Naming = Naming.MAKER  # the naming of kohya's files
    # End of a convolution's path in diffusers' names -> its kernel
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kohya_version: str = ""  # sd-scripts' name of the base; empty if it depends on the size
    kohya_network: str = "networks.lora"  # sd-scripts' module

    def component(self, name: str, module: str) -> Component:
        """Return the component of this name; the message names `module`, one of its modules.

        Raises:
            InputError: the family has no such component.
        """
        component = next((each for each in self.components if each.name == name), None)
        if component is None:
            raise InputError(f"is of {name}, which {self.title} does not have", culprit=module)
        return component
