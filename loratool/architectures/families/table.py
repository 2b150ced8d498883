"""Say what the table of a model family consists of: names in all namings, the rows of what is fused, telling widths.

Every other naming is told by diffusers' modules: a maker's module is a run of rows after the other, each of one of
them. So a plain rename, a fused matrix, one with its halves swapped and a part of a matrix are one thing.

A family takes by name the rows of the model that it was made of. What coincides in models of other descent is written
in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from ...errors import InputError


class Naming(Enum):
    """Whose names a denoiser's modules have."""

    MAKER = auto()
    DIFFUSERS = auto()
    COMFY = auto()  # ComfyUI's own; the maker's where it has none


# The components that are a denoiser, with the modules of the family's table
DENOISERS = ("unet", "transformer_2", "unconditional_transformer")

# Ends of the paths of the projections in diffusers' attention over image and text at once
JOINT_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")


@dataclass(frozen=True)
class Run:
    """Rows of a diffusers' module that follow each other."""

    module: str
    part: int = 0  # which of `parts` equal parts of the module's rows they are
    parts: int = 1


@dataclass(frozen=True)
class Fused:
    """Runs of rows that are one module in another naming, in the order of its rows."""

    runs: tuple[str | Run, ...]  # a name alone is all rows of that module
    # The rows of each run: a multiple of the matrix's columns, `queries` (which only a config knows), or None for an
    # equal share of the other rows; () if all are equal.
    sizes: tuple[int | Literal["queries"] | None, ...] = ()


Rows = str | Fused  # a name alone is the same matrix under another name


def swapped(module: str) -> Fused:
    """Return a module with the halves of its rows in the other order, as shift and scale are in two namings."""
    return Fused((Run(module, 1, 2), Run(module, 0, 2)))


@dataclass(frozen=True)
class Block:
    """The modules in one of a stack of blocks; `{i}` in a stem is its number, and `*` any path."""

    maker: str  # stem of the maker's names
    diffusers: str  # stem of diffusers' names
    names: Mapping[str, Rows] = field(default_factory=dict)  # maker's name -> what it is of diffusers'
    aliases: Mapping[str, Rows] = field(default_factory=dict)  # as names, in further namings, under the maker's stem
    alike: tuple[str, ...] = ()  # names that are the same in both
    stems: tuple[str, ...] = ()  # other stems that diffusers' names have
    by_ratio: Mapping[str, tuple[int, Rows]] = field(default_factory=dict)  # what a name is if rows / columns is this
    tensors: Mapping[str, str] = field(default_factory=dict)  # maker's tensor -> diffusers', where one ends otherwise
    comfy: Mapping[str, Rows] = field(default_factory=dict)  # as names, for what ComfyUI does not call as the maker
    comfy_stem: str = ""  # of those; by default the maker's
    counts: tuple[int, ...] = ()  # how many of them the known models have


@dataclass(frozen=True)
class Component:
    """A part of the pipeline that has adapters, with the prefixes of its modules in the files of each ecosystem.

    A prefix is empty where no file has such modules.
    """

    name: str  # `unet` for any denoiser, `text_encoder`, `text_encoder_2`, ...
    kohya: str  # `lora_te1_`, before flattened paths
    comfy: str  # `text_encoders.clip_l.transformer.`
    diffusers: str  # the folder in a pipeline and a dot
    encoder: str = ""  # key of ENCODERS; empty for what has the same names everywhere


@dataclass(frozen=True)
class Width:
    """Modules that have one of these numbers of columns in every known model of the family."""

    component: str  # `unet` for any denoiser
    ends: tuple[str, ...]  # of their paths, in diffusers' naming
    columns: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)  # compared and hashed as the one object that it is
class ModelFamily:
    """The facts of one family; literal, no code."""

    key: str  # `flux`
    title: str  # `Flux`
    blocks: tuple[Block, ...] = ()
    outside: Mapping[str, Rows] = field(default_factory=dict)  # maker's name -> what it is of diffusers'
    outside_aliases: Mapping[str, Rows] = field(default_factory=dict)
    alike: tuple[str, ...] = ()  # names outside of the blocks that are the same in both
    outside_tensors: Mapping[str, str] = field(default_factory=dict)  # as Block.tensors
    outside_comfy: Mapping[str, Rows] = field(default_factory=dict)  # as Block.comfy
    unused: tuple[str, ...] = ()  # maker's tensors that diffusers does not have
    # End of diffusers' tensor -> its shape, where the maker stores the same numbers in another; -1 is any size.
    reshaped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # How tensors of other components start that stand among the denoiser's in a single file
    beside: tuple[str, ...] = ()
    # A model of these modules whose maker has diffusers' names -> how tensors start that only this one has
    unrenamed: Mapping[str, str] = field(default_factory=dict)
    diffusers_class: str = ""  # of the denoiser
    # Other classes whose adapters diffusers reads as this family's, so that they are written as such
    other_classes: tuple[str, ...] = ()
    # A model without a table, of this family's names and sizes -> a regular expression of the paths that it lacks
    twins: Mapping[str, str] = field(default_factory=dict)
    # Of a UNet, which has blocks that `unet` numbers: whether each block of the way up has attention.
    up_attention: tuple[bool, ...] = ()
    components: tuple[Component, ...] = ()  # the denoiser first
    conv1d: tuple[str, ...] = ()  # ends of paths whose weight is stored as (in, out)
    marks: tuple[str, ...] = ()  # of these, every base's names contain one
    telling: str = ""  # a regular expression of diffusers' paths that only this family has
    widths: tuple[Width, ...] = ()
    ratios: Mapping[str, int] = field(default_factory=dict)  # end of a path in any naming -> its rows / columns
    kohya: Naming = Naming.MAKER  # whose names kohya's files have
    # End of a convolution's path in diffusers' names -> its kernel
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kohya_version: str = ""  # sd-scripts' name of the base; empty if it depends on the size
    kohya_network: str = "networks.lora"  # sd-scripts' module

    def component(self, name: str, module: str) -> Component:
        """Return the component of a name; `module` is one of it, for the message.

        Raises:
            InputError: the family has no such component.
        """
        found = next((each for each in self.components if each.name == name), None)
        if found is None:
            raise InputError(f"is of {name}, which {self.title} does not have", culprit=module)
        return found
