"""The call of `env`, which has no arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.env import EnvReport  # noqa: F401


@dataclass(frozen=True)
class Env(Call["EnvReport"]):
    """Describe this machine and installation, for a report of a bug.

    The report has versions, the kernel, GPUs, folders of caches, and the names of environment variables. It has no
    tokens, no values of variables, and no names of users or machines.
    """

    work: ClassVar[str] = "env.command.run_env"


env = function_of(Env)
