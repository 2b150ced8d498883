"""Parse names of models and adapters on the hub: `org/name@revision/path`, `hf://` and links to the hub's pages.

The grammar is that of huggingface_hub's URIs. A revision ends at the next slash, except a pull request's `refs/pr/1`;
in other revisions a slash is written %2F. The parts of a name become paths in the cache, so each part is checked here
and none leads out of its folder.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from ...errors import InputError
from ..stores.links import parse_store_link, without_secrets

SCHEME = re.compile(r"(hf|https?):/{1,2}(?=[^/])")  # a Path of a link has one slash

ROUTES = ("tree", "blob", "resolve", "raw", "blame")  # of the hub's pages for a folder or a file of a revision

OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")

SPECIAL_REVISION = re.compile(r"refs/(convert/[\w.-]+|pr/\d+)(?=/|$)", re.ASCII)

_CACHED = re.compile(r"models--([\w.-]+)", re.ASCII)  # the folder of a repository in the cache

_PART = re.compile(r"\w[\w.-]{0,95}", re.ASCII)

_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]')  # in a file's name, on some system

# Suffixes of files that loratool reads or writes: a name with one is a mistyped path, not a model's name
FILE_ENDS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".undo", ".onnx", ".h5", ".zip")


@dataclass(frozen=True)
class HubName:
    """A folder or a file in a model's repository on the hub."""

    repo: str  # org/name, or name alone
    revision: str | None  # a branch, a tag or a commit; None for the main branch
    path: str  # in the repository; empty for its root
    is_link: bool  # given as hf:// or as a link, so it cannot be a path

    def __str__(self) -> str:
        return self.within(self.path)

    def within(self, path: str) -> str:
        """Return the name of another path in the same repository, in a form that `parse_hub_name` accepts."""
        revision = self.revision or ""
        if not SPECIAL_REVISION.fullmatch(revision):
            revision = quote(revision, safe="")
        prefix = "hf://" if "/" not in self.repo else ""  # a name alone is looked up, but not downloaded
        return f"{prefix}{self.repo}{'@' if revision else ''}{revision}{'/' if path else ''}{path}"

    @property
    def is_bare(self) -> bool:
        """Return whether it is a single word, like a mistyped file name."""
        return "/" not in self.repo and not self.is_link


def parse_hub_name(text: str) -> HubName | None:
    """Parse a name of the hub; return None if the text can only be a path.

    Raises:
        InputError: it is a link, but not to a model on the hub.
    """
    if parse_store_link(text):
        return None
    if scheme := SCHEME.match(text):
        location = text[scheme.end() :]
        if scheme[1] != "hf":
            location = _of_page(location, text)
        name = _parse(location.strip("/"), True)
        if name is None:
            raise InputError("is not a link to a model on the hub", culprit=text, remedy="name it hf://org/name")
        return name
    name = _parse(text, False)
    return None if name is None or (not name.path and text.endswith(FILE_ENDS)) else name


def cached_name(path: Path) -> HubName | None:
    """Return the hub name of a path in the hub's cache, without its revision; None for any other path."""
    name = pinned_name(path)
    return replace(name, revision=None, is_link=False) if name else None


def pinned_name(path: Path) -> HubName | None:
    """Return the hub name of a path in the hub's cache, with its commit as revision; None for any other path."""
    parts = path.absolute().parts
    for number, part in enumerate(parts[:-2]):
        if (match := _CACHED.fullmatch(part)) and parts[number + 1] == "snapshots":
            return HubName(match[1].replace("--", "/", 1), parts[number + 2], "/".join(parts[number + 3 :]), True)
    return None


def named_repo(text: object) -> str:
    """Return the repo id `org/name` that a file gives for a model; empty if its text is not one."""
    name = parse_hub_name(text) if isinstance(text, str) and ":" not in text else None  # a link could be refused
    return name.repo if name and "/" in name.repo and not (name.revision or name.path) else ""


def shareable(given: str) -> str:
    """Return a link to the hub as a hub name, another without its query, which may have a token; a path unchanged."""
    if link := parse_store_link(given):
        return without_secrets(link)
    if not SCHEME.match(given) or os.path.lexists(given):
        return given
    try:
        name = parse_hub_name(given)
    except InputError:  # reported where the link is opened
        return given
    return f"hf://{str(name).removeprefix('hf://')}"


def base_fields(given: str) -> dict[str, str]:
    """Return the fields that name a base in PEFT's config: a path unchanged, a hub name in the form that PEFT loads."""
    name = None if os.path.lexists(given) else parse_hub_name(given)
    if name is None or name.path:  # PEFT has no word for a folder in a repository
        return {"base_model_name_or_path": str(name or shareable(given))}
    return {"base_model_name_or_path": name.repo, **({"revision": name.revision} if name.revision else {})}


def _of_page(location: str, link: str) -> str:
    """Return the part after hf:// that corresponds to a link to the hub's pages, given without its scheme.

    Raises:
        InputError: the link is not to a page of a model, a folder or a file.
    """
    parsed, endpoint = _split_link(f"//{location}"), _split_link(os.environ.get("HF_ENDPOINT", ""))
    path = parsed.path.removeprefix(endpoint.path.rstrip("/")) if parsed.netloc == endpoint.netloc else parsed.path
    parts = [_decoded(part) for part in path.split("/") if part]
    if len(parts) < 3 or parts[0] in OTHER_KINDS:
        return "/".join(parts)
    if parts[2] not in ROUTES:
        raise InputError("is not a link to a file or folder of a model", culprit=link, remedy="name it hf://org/name")
    return "/".join(parts[:2]) + ("@" if parts[3:] else "") + "/".join(parts[3:])


def _split_link(link: str) -> SplitResult:
    """Return the parts of a link; all are empty if it is malformed, such as half an address in brackets."""
    try:
        return urlsplit(link)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _decoded(part: str) -> str:
    """Decode a part of a link except for slashes, which a branch's name may have."""
    return unquote(part).replace("/", "%2F")


def _parse(location: str, is_link: bool) -> HubName | None:
    """Parse `org/name[@revision][/path]` or `name[@revision]`; return None for other text and for unsafe paths.

    Raises:
        InputError: it is a link to a dataset or the like.
    """
    repo, revision, path = location, None, ""
    position = location.find("@")
    if position >= 0 and location[:position].count("/") < 2:
        repo, rest = location[:position], location[position + 1 :]
        special = SPECIAL_REVISION.match(rest)
        end = special.end() if special else (rest + "/").index("/")
        revision, path = unquote(rest[:end]), rest[end + 1 :]
    elif location.count("/") > 1:
        org, name, path = location.split("/", 2)
        repo = f"{org}/{name}"
    if is_link and (kind := repo.partition("/")[0]) in OTHER_KINDS:
        raise InputError(f"is one of the hub's {kind}, but weights are in models", culprit=location)
    path = path.rstrip("/")
    is_name = _is_repo(repo) and revision != "" and all(is_inside(each) for each in (revision, path) if each)
    return HubName(repo, revision, path, is_link) if is_name else None


def _is_repo(repo: str) -> bool:
    """Return whether huggingface_hub accepts a repo id (its `validate_repo_id`)."""
    parts = repo.split("/")
    if len(parts) > 2 or "--" in repo or ".." in repo or repo.endswith(".git"):
        return False
    return all(_PART.fullmatch(part) and part[-1] not in ".-" for part in parts)


def is_inside(path: str) -> bool:
    """Return whether a relative path from the hub is valid on any system and stays in its folder."""
    return not _UNSAFE.search(path) and all(part.strip(" .") for part in path.split("/"))
