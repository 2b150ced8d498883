"""The kinds of stores: how the state of an object is known, and how a range of that very state is asked for.

Everything else, such as listing, credentials and endpoints, is fsspec's and that of its packages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .uploads import AzureUpload, OrderedUpload, S3Upload, Upload

Info = Mapping[str, Any]  # what fsspec tells of an object

Read = Callable[[int, int], bytes]  # (first, end)

CONNECT = 10  # seconds

SILENCE = 15  # seconds in which not one byte of an answer comes


@dataclass(frozen=True)
class StoreKind:
    """How the objects of one kind of store are read.

    Attributes:
        schemes: of its links.
        package: the one that fsspec needs for them, beside itself.
        log_in: how its credentials are given.
        identity: (file system, path, info) -> the object's state; empty if the store tells nothing of it.
        reader: (file system, path, state) -> a function that returns the bytes first:end of the object, and fails if
            its state is another.
        upload: takes the file system, a path, and the identity of an upload to continue or ""; None if nothing can be
            written there.
        checks: whether a reader fails so. Otherwise the state is asked for after each read.
        options: of its file system: how long it waits for an answer, as some wait without end.
    """

    schemes: tuple[str, ...]
    package: str
    log_in: str
    identity: Callable[[Any, str, Info], str]
    reader: Callable[[Any, str, str], Read]
    upload: type[Upload] | None = OrderedUpload
    checks: bool = True
    options: Callable[[], Mapping[str, Any]] = dict


def _tag_of_s3(system: Any, path: str, info: Info) -> str:
    return str(info.get("ETag") or "")


def _read_s3(system: Any, path: str, identity: str) -> Read:
    """Each read has the ETag as If-Match, which `S3File` sends."""
    file = system.open(path, "rb", cache_type="none")
    if file.details.get("ETag") != identity:
        raise FileExpired(path)
    read: Read = file._fetch_range
    return read


def _generation(system: Any, path: str, info: Info) -> str:
    return str(info.get("generation") or "")


def _read_gcs(system: Any, path: str, identity: str) -> Read:
    """A generation that was replaced is missing."""
    return lambda first, end: bytes(system.cat_file(f"{path}#{identity}", start=first, end=end))


def _tag_of_azure(system: Any, path: str, info: Info) -> str:
    return str(info.get("etag") or "")


def _read_azure(system: Any, path: str, identity: str) -> Read:
    from azure.core import MatchConditions
    from fsspec.asyn import sync

    container, blob, _ = system.split_path(path)

    async def fetch(first: int, end: int) -> bytes:
        async with system.service_client.get_container_client(container) as client:
            stream = await client.download_blob(
                blob,
                offset=first,
                length=end - first,
                etag=identity,
                match_condition=MatchConditions.IfNotModified,
                connection_timeout=CONNECT,
                read_timeout=SILENCE,
                retry_total=0,
            )
            data: bytes = await stream.readall()
            return data

    def read(first: int, end: int) -> bytes:
        data: bytes = sync(system.loop, fetch, first, end)
        return data

    return read


def _tag_of_http(system: Any, path: str, info: Info) -> str:
    return str(info.get("ETag") or info.get("Last-Modified") or "")


def _read_http(system: Any, path: str, identity: str) -> Read:
    """Read the answers here, as fsspec's own reader takes them without a look at what they are.

    A weak ETag, as of compressed content, matches nothing, so it is not sent.
    """
    from fsspec.asyn import sync

    given = {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if identity.startswith('"'):
        given["If-Match"] = identity
    elif identity and not identity.startswith("W/"):
        given["If-Unmodified-Since"] = identity

    async def fetch(first: int, end: int) -> bytes:
        session = await system.set_session()
        headers = {**given, "Range": f"bytes={first}-{end - 1}"}
        async with session.get(system.encode_url(path), **{**system.kwargs, "headers": headers}) as answer:
            answer.raise_for_status()
            if _tag_of_http(system, path, answer.headers) not in ("", identity):
                raise FileExpired(path)
            whole = first == 0 and answer.content_length == end and "Content-Encoding" not in answer.headers
            if answer.status != 206 and not whole:
                raise WholeFilesOnly(path)
            if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(
                f"bytes {first}-{end - 1}/"
            ):
                raise ConnectionError("sent another range than was asked for")
            if answer.content_length != end - first:
                raise ConnectionError(f"sent {answer.content_length} of {end - first} bytes")
            data: bytes = await answer.read()
            return data

    def read(first: int, end: int) -> bytes:
        data: bytes = sync(system.loop, fetch, first, end)
        return data

    return read


def _key_of_any(system: Any, path: str, info: Info) -> str:
    return str(system.ukey(path))


def _read_any(system: Any, path: str, identity: str) -> Read:
    return lambda first, end: bytes(system.cat_file(path, start=first, end=end))


class FileExpired(OSError):
    """An object is not in the state that was asked for. s3fs has a class of this name for the same."""


class WholeFilesOnly(OSError):
    """A web server does not send parts of a file."""


def _timeout() -> Any:
    from aiohttp import ClientTimeout

    return ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)


# fmt: off
S3 = StoreKind(("s3", "s3a"), "s3fs", "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
               _tag_of_s3, _read_s3, S3Upload, options=lambda: {"config_kwargs": {
                   "connect_timeout": CONNECT, "read_timeout": SILENCE, "retries": {"total_max_attempts": 1}}})
GCS = StoreKind(("gs", "gcs"), "gcsfs", "log in with `gcloud auth application-default login`, or set "
                "GOOGLE_APPLICATION_CREDENTIALS", _generation, _read_gcs,
                options=lambda: {"version_aware": True, "requests_timeout": _timeout()})
AZURE = StoreKind(("az", "abfs", "abfss"), "adlfs", "set AZURE_STORAGE_CONNECTION_STRING, or "
                  "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY", _tag_of_azure, _read_azure, AzureUpload,
                  options=lambda: {"connection_timeout": CONNECT, "read_timeout": SILENCE})
HTTP = StoreKind(("https", "http"), "aiohttp", "the link has to have what gives access", _tag_of_http, _read_http, None,
                 options=lambda: {"client_kwargs": {"timeout": _timeout(), "read_bufsize": 1 << 20}})
# fmt: on

STORES = {scheme: store for store in (S3, GCS, AZURE, HTTP) for scheme in store.schemes}

ANY = StoreKind((), "", "see the documentation of its package for fsspec", _key_of_any, _read_any, checks=False)
