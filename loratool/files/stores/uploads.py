"""Upload one object in parts: by the store's own parts, in any order, or by fsspec, from the front to the back."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, BinaryIO, ClassVar, Protocol

PART = 1 << 26  # bytes; S3 takes 10,000 parts


class Upload(Protocol):
    """An object that appears when all its parts are sent and `complete` is called."""

    in_order: ClassVar[bool]  # parts have to be sent in their order, one by one, by one process
    identity: str  # with which another process continues it; empty if none can

    def __init__(self, system: Any, path: str, identity: str) -> None: ...

    def sent(self) -> Mapping[int, str]:
        """Return the numbers, from 0, of the parts that the store has, and the MD5 of each as the store tells it."""

    def send(self, number: int, data: BinaryIO) -> None: ...

    def complete(self, count: int) -> None: ...

    def abort(self) -> None: ...


class S3Upload:
    """A multipart upload of S3; its parts stay until it is completed or aborted."""

    in_order: ClassVar[bool] = False

    def __init__(self, system: Any, path: str, identity: str) -> None:
        self._system = system
        bucket, key, _ = system.split_path(path)
        self._object = {"Bucket": bucket, "Key": key}
        self.identity = identity or str(system.call_s3("create_multipart_upload", **self._object)["UploadId"])
        self._tags = dict[int, str]()

    @property
    def _upload(self) -> dict[str, str]:
        return {**self._object, "UploadId": self.identity}

    def sent(self) -> Mapping[int, str]:
        after = 0
        while True:
            answer = self._system.call_s3("list_parts", PartNumberMarker=after, **self._upload)
            for part in answer.get("Parts", ()):
                self._tags[part["PartNumber"] - 1] = part["ETag"]
            if not answer.get("IsTruncated"):
                return {number: tag.strip('"') for number, tag in self._tags.items()}
            after = int(answer["NextPartNumberMarker"])

    def send(self, number: int, data: BinaryIO) -> None:
        answer = self._system.call_s3("upload_part", Body=data, PartNumber=number + 1, **self._upload)
        self._tags[number] = answer["ETag"]

    def complete(self, count: int) -> None:
        parts = [{"PartNumber": number + 1, "ETag": self._tags[number]} for number in range(count)]
        self._system.call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **self._upload)
        self._system.invalidate_cache()

    def abort(self) -> None:
        self._system.call_s3("abort_multipart_upload", **self._upload)


class AzureUpload:
    """Blocks of a blob; those that are not committed disappear after a week."""

    in_order: ClassVar[bool] = False
    identity = ""

    def __init__(self, system: Any, path: str, identity: str) -> None:
        self._system, (self._container, self._blob, _) = system, system.split_path(path)

    def sent(self) -> Mapping[int, str]:
        return {}

    def send(self, number: int, data: BinaryIO) -> None:
        self._call("stage_block", _block_name(number), data.read())

    def complete(self, count: int) -> None:
        from azure.storage.blob import BlobBlock

        self._call("commit_block_list", [BlobBlock(_block_name(number)) for number in range(count)])
        self._system.invalidate_cache()

    def abort(self) -> None:
        pass

    def _call(self, name: str, *arguments: Any) -> None:
        from fsspec.asyn import sync

        async def call() -> None:
            async with self._system.service_client.get_blob_client(self._container, self._blob) as client:
                await getattr(client, name)(*arguments)

        sync(self._system.loop, call)


def _block_name(number: int) -> str:
    return base64.b64encode(f"{number:06d}".encode()).decode()


class OrderedUpload:
    """An object that fsspec writes from the front to the back."""

    in_order: ClassVar[bool] = True
    identity = ""

    def __init__(self, system: Any, path: str, identity: str) -> None:
        self._system, self._path = system, path
        if parent := system._parent(path):
            system.makedirs(parent, exist_ok=True)
        self._file = system.open(path, "wb", autocommit=False, block_size=PART)

    def sent(self) -> Mapping[int, str]:
        return {}

    def send(self, number: int, data: BinaryIO) -> None:
        while part := data.read(1 << 20):
            self._file.write(part)

    def complete(self, count: int) -> None:
        self._file.close()
        self._file.commit()
        self._system.invalidate_cache()

    def abort(self) -> None:
        self._file.close()
        self._file.discard()
