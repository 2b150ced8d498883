"""Make models in the middle of a change in place, as a process that died leaves them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import loratool
from loratool.durable.in_place import ModelInPlace


class _Died(BaseException):
    """Stands for the death of the process."""


def interrupted(base: Path, adapter: Path, model: Path) -> Path:
    """Copy a model, begin to merge an adapter into the copy, and stop when some of it is changed."""
    shutil.copytree(base, model) if base.is_dir() else shutil.copy(base, model)
    put = ModelInPlace.put_window

    def last(self: ModelInPlace, *arguments: Any) -> None:
        put(self, *arguments)
        raise _Died

    try:
        with patch.object(ModelInPlace, "put_window", last):
            loratool.merge(model, adapter, in_place=True, by="window")
    except _Died:
        return model
    raise AssertionError("it was not interrupted")
