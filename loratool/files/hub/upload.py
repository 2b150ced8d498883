"""Commit an output to a model's repository on the hub: all files in one commit, or nothing.

huggingface_hub sends the files, as LFS or Xet. A repository that does not exist is made, and is private.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

from ...errors import InputError, LoratoolError
from .download import find_revision, hub_errors
from .names import HubName

UNSENT = "could not be sent to the hub"


class HubTarget:
    """A folder in a repository, or the whole of it, as it was when the run began."""

    def __init__(self, name: HubName) -> None:
        self.name, self._api = name, HfApi(library_name="loratool")
        self.commit: str | None = None
        self.files: list[str] = []  # relative to the folder; those of the repository, if it exists
        with hub_errors(name, "could not be looked up on the hub"):
            try:
                info = find_revision(name)
            except errors.RepositoryNotFoundError as error:
                if isinstance(error, errors.GatedRepoError) or name.revision not in (None, "main"):
                    raise
                return
        prefix = f"{name.path}/" if name.path else ""
        names = (str(each.rfilename) for each in info.siblings or ())
        self.commit, self.files = info.sha, [each.removeprefix(prefix) for each in names if each.startswith(prefix)]

    def send(self, built: Mapping[str, Path], replaced: Callable[[str], bool], message: str) -> str:
        """Commit files, and remove those that `replaced` names and that are not among them; return the commit's hash.

        Args:
            built: name in the folder -> the file.

        Raises:
            InputError: the repository has changed since the run began, or may not be written.
            MachineError: the hub was not reached. The message says if a new repository is left empty.
        """
        prefix = f"{self.name.path}/" if self.name.path else ""
        operations: list[Any] = [CommitOperationAdd(f"{prefix}{name}", place) for name, place in sorted(built.items())]
        gone = [name for name in self.files if replaced(name) and name not in built]
        operations += [CommitOperationDelete(f"{prefix}{name}") for name in gone]
        if self.commit is None:
            with hub_errors(self.name, UNSENT):
                self._api.create_repo(self.name.repo, private=True)
        try:
            with hub_errors(self.name, UNSENT):
                done = self._api.create_commit(
                    self.name.repo,
                    operations,
                    commit_message=message,
                    revision=self.name.revision,
                    parent_commit=self.commit,
                )
        except LoratoolError as error:
            if getattr(getattr(error.__cause__, "response", None), "status_code", None) == 412:
                what = "has another commit since this run began"
                raise InputError(what, culprit=str(self.name), remedy="run the command again") from error
            if self.commit is None:
                error.message += "; the new repository is there, private and empty"
            raise
        return str(done.oid)
