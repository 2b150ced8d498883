"""Identify files that are not readable weights by their first bytes or names.

The table has what people mistake for weights: remains of a download or a checkout, weights of other frameworks,
archives. Only the beginning of such a file is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...durable.fileio import open_for_reading, reading
from ...errors import InputError, shell_word
from .gguf_file import GGUF, MAGIC

NPZ = "npz"  # NumPy's archives, which are only read

FIRST = 512  # bytes that identify a file, including the mark of a tar file at 257

DOWNLOAD = "download the file again: hf download ORG/MODEL; the link of a file has /resolve/, that of its page /blob/"
PYTORCH = "use the same model's weights for PyTorch: *.safetensors or *.bin"
ORBAX = (
    "use the same weights for PyTorch; of MaxText: python3 -m maxtext.checkpoint_conversion.to_huggingface, with "
    "lora.lora_restore_path for an adapter"
)
UNPACK = "unpack it, and name what is in it"
SAVE = "load it where you trust it and save its state dict as safetensors"


@dataclass(frozen=True)
class Kind:
    """A file that is not read as weights, and what to do instead.

    Attributes:
        what: its description, for a message after "is".
        first: a pattern for its first bytes; None if they do not identify it.
        name: a pattern for its complete name, used if the first bytes match nothing; None if names do not identify it.
    """

    what: str
    remedy: str
    first: bytes | None = None
    name: str | None = None


# fmt: off
KERAS = Kind("a Keras model", PYTORCH, None, r".*\.keras")
ZIP = Kind("a zip archive", UNPACK, None, r".*\.zip")

KINDS = (
    Kind("a Git-LFS pointer, not the file itself", "fetch the file: git lfs pull, in its folder",
         rb"version https://(?:git-lfs\.github\.com|hawser\.github\.com)/spec/"),
    Kind("a pointer of git-xet, not the file itself", "fetch the file: git xet checkout, in its folder",
         rb"# xet version "),
    Kind("a pointer of git-annex, not the file itself", "fetch the file: git annex get, in its folder",
         rb"/annex/objects/|\.git/annex/objects/"),
    Kind("an HTML page, saved in the place of a file", DOWNLOAD,
         rb"(?is)(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body|!--)"),
    Kind("an XML text, such as a storage server's error message", DOWNLOAD, rb"(?s)(?:\xef\xbb\xbf)?\s*<\?xml"),
    Kind("a text in UTF-16, as PowerShell writes it", "save it as UTF-8", rb"\xff\xfe|\xfe\xff"),
    Kind("an ONNX model", PYTORCH, rb"(?s)\x08[\x03-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]", r".*\.onnx(?:[_.]data)?"),
    Kind("a TensorFlow SavedModel", PYTORCH, rb"(?s)\x08\x01\x12", r"saved_model\.pb(?:txt)?"),
    Kind("an HDF5 file, as Keras and TensorFlow save weights", PYTORCH, rb"\x89HDF\r\n\x1a\n", r".*\.h5|.*\.hdf5"),
    KERAS,
    Kind("a TensorFlow Lite model", PYTORCH, rb"(?s).{4}TFL3", r".*\.tflite"),
    Kind("a TensorFlow graph", PYTORCH, None, r".*\.pb(?:txt)?"),
    Kind("a TensorFlow checkpoint", PYTORCH, rb"model_checkpoint_path: ",
         r".*\.data-\d{5}-of-\d{5}|.*\.ckpt(?:-\d+)?\.(?:index|meta)"),
    Kind("a Flax file (msgpack)", PYTORCH, rb"(?s)(?:[\x81-\x8f]|\xde..|\xdf....)(?:[\xa0-\xbf]|\xd9.|\xda..)",
         r".*\.msgpack"),
    Kind("an Orbax checkpoint of JAX", ORBAX, None, r"manifest\.ocdbt|_CHECKPOINT_METADATA|_METADATA"),
    Kind("OpenVINO's weights", PYTORCH, None, r"openvino_.*\.(?:bin|xml)"),
    Kind("a Core ML model", PYTORCH, None, r".*\.mlmodel|.*\.mlpackage"),
    Kind("a GGML file, of llama.cpp before GGUF", "use the model's GGUF file, or its weights for PyTorch",
         rb"lmgg|fmgg|tjgg"),
    Kind("a GGLA adapter, of llama.cpp before GGUF", "use the adapter that it was converted from", rb"algg"),
    Kind("an SQLite database, in which reminis keeps models and changes of models",
         "export the model: safetensors, or GGUF", rb"SQLite format 3\x00"),
    Kind("a change of a model's weights, of deltatensors", "apply it with deltatensors, and name the result",
         rb"wdelta\x00"),
    Kind("compressed by ZipNN", "decompress it with zipnn", None, r".*\.znn"),
    Kind("a NumPy array", "save the arrays by name: safetensors.numpy.save_file", rb"\x93NUMPY", r".*\.npy"),
    Kind("a tar archive", UNPACK, rb"(?s).{257}ustar", r".*\.(?:tar|nemo)"),
    Kind("a gzip archive", UNPACK, rb"\x1f\x8b", r".*\.t?gz"),
    ZIP,
    Kind("a bzip2 archive", UNPACK, rb"BZh[1-9]1AY&SY", r".*\.bz2"),
    Kind("an xz archive", UNPACK, rb"\xfd7zXZ\x00", r".*\.xz"),
    Kind("a Zstandard archive", UNPACK, rb"\x28\xb5\x2f\xfd", r".*\.zst"),
    Kind("a 7z archive", UNPACK, rb"7z\xbc\xaf\x27\x1c", r".*\.7z"),
    Kind("a RAR archive", UNPACK, rb"Rar!\x1a\x07", r".*\.rar"),
    Kind("a PNG image", DOWNLOAD, rb"\x89PNG\r\n\x1a\n"),
    Kind("a JPEG image", DOWNLOAD, rb"\xff\xd8\xff"),
    Kind("a WebP image", DOWNLOAD, rb"(?s)RIFF.{4}WEBP"),
    Kind("a PDF document", DOWNLOAD, rb"%PDF-"),
    Kind("a file of torch.save in pickle protocol 0, which torch.load does not read either", SAVE,
         rb"L119547037146038801333356L\n\.I"),
    Kind("a patch of loratool, not weights", "to make its model: loratool apply BASE FILE -o OUT", rb"loratool patch "),
    Kind("an undo file of loratool, not weights", "to restore the base: loratool unmerge MERGED ADAPTER --undo FILE",
         rb"loratool undo "),
    Kind("a pickle of Python objects, which is a program and is not run", SAVE,
         rb"(?s)\x80[\x02-\x05]|\(dp?\d|\(lp?\d|[\}\]]q.|c[\w.]+\n\w+\n", r".*\.(?:pkl|pickle|joblib)"),
    Kind("a file that begins with zeros: its download did not finish", DOWNLOAD, rb"\x00{16}"),
)

# A pattern of an entry's name -> the kind of a zip archive not written by torch.save; the first match counts
ZIPS = {r"model\.weights\.h5": KERAS}
# fmt: on

# names of weights files, and where to look for them in a folder without any
WEIGHTS = re.compile(r".*\.(?:safetensors|gguf)|.*(?:model|consolidated).*\.(?:bin|pth?)")
WITHIN = ("*/*", "snapshots/*/*")  # the second of a hub's cache

# first bytes of torch.save's files: a zip archive, or the legacy layout with the magic number in protocol 1 to 5
SAVED = re.compile(
    rb"PK\x03\x04|(?:\x80[\x02\x03]|\x80[\x04\x05]\x95.{8})\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.|"
    rb"L119547037146038801333356L\n\.M",
    re.DOTALL,
)

ANSWER = re.compile(rb'"(?:error|message|detail)"\s*:\s*"([^"]{1,99})')  # of a server, in JSON


def container_of(first: bytes) -> str | None:
    """Return the container of a weights file by its first bytes: a key of `output.CONTAINERS`, or NPZ; None if unknown.

    A safetensors file begins with its header's length, which may be any bytes, but it has the header's brace at byte 8.
    """
    if first[4:9] == b"\0\0\0\0{":
        return "safetensors"
    if first.startswith(MAGIC):
        return GGUF
    if first.startswith(b"PK\x03\x04") and first[30 : 30 + int.from_bytes(first[26:28], "little")].endswith(b".npy"):
        return NPZ
    return "torch" if SAVED.match(first) else None


def found_by_content(folder: Path) -> list[Path]:
    """Return the files in a folder whose first bytes are those of weights, whatever their names."""
    weights = []
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and not next(_by_name(entry.name), None):
            with suppress(InputError):  # skip unreadable files
                weights += [entry] if container_of(first_bytes(entry)) else []
    return weights


def first_bytes(path: Path) -> bytes:
    """Return the first FIRST bytes of a file, or all if it has fewer."""
    with open_for_reading(path) as file, reading(path):
        return file.read(FIRST)


def kind_of(first: bytes, name: str = "") -> Kind | None:
    """Return the kind of a file by its first bytes, else by its name; None if neither identifies it.

    Args:
        first: up to FIRST bytes.
    """
    by_bytes = (kind for kind in KINDS if kind.first and re.match(kind.first, first))
    return next(by_bytes, None) or next(_by_name(name), None)


def _by_name(name: str) -> Iterator[Kind]:
    return (kind for kind in KINDS if kind.name and re.fullmatch(kind.name, name))


def kind_of_zip(entries: Collection[str]) -> Kind:
    """Return the kind of a zip archive that torch.save did not write, by the names of its entries."""
    return next((kind for pattern, kind in ZIPS.items() if any(re.fullmatch(pattern, each) for each in entries)), ZIP)


def not_weights(path: Path, first: bytes) -> InputError:
    """Return the error for a file that is not weights, naming its kind if known.

    Args:
        first: its first bytes, up to FIRST.
    """
    what, remedy = "not a weights file: neither safetensors nor GGUF, and not of torch.save", None
    if not first:
        what, remedy = "empty", DOWNLOAD
    elif kind := kind_of(first, path.name):
        what, remedy = kind.what, kind.remedy
    elif answer := ANSWER.search(first):
        what, remedy = f"a server's answer, not weights: {shown(answer[1])}", DOWNLOAD
    elif first.lstrip(b"\xef\xbb\xbf\r\n\t ")[:1] in (b"{", b"["):
        folder = f"name its folder, {shell_word(path.parent)}"
        what, remedy = "JSON, not weights", folder if path.suffix == ".json" else DOWNLOAD
    elif is_text(first):
        what, remedy = f"a text, not weights, and begins {shown(first[:40])}", DOWNLOAD
    return InputError(f"is {what}", culprit=str(path), remedy=remedy)


def is_text(data: bytes) -> bool:
    """Return whether bytes are text; they may end inside a character."""
    text = data.decode(errors="ignore")
    return len(text.encode()) > len(data) - 4 and all(c.isprintable() or c in "\r\n\t" for c in text)


def shown(data: bytes) -> str:
    """Return bytes of a text in quotes, as ASCII and escapes."""
    return ascii(data.decode(errors="replace"))


def no_weights(folder: Path, several: Sequence[Path] = ()) -> InputError:
    """Return the error for a folder without readable weights, or with `several` files that could be the weights.

    It names a subfolder with weights, else files of other kinds.
    """
    if several:
        shown = ", ".join(each.name for each in several[:4])
        return InputError(f"holds several files of weights ({shown})", culprit=str(folder), remedy="name one of them")
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return InputError("is an empty folder", culprit=str(folder))
    within = (each for deep in WITHIN for each in sorted(folder.glob(deep)) if WEIGHTS.fullmatch(each.name))
    if inner := next(within, None):
        return InputError(
            "holds no weights itself", culprit=str(folder), remedy=f"name the folder {shell_word(inner.parent)}"
        )
    for name in names:
        if kind := next(_by_name(name), None):
            return InputError(f"holds no weights but {name}, {kind.what}", culprit=str(folder), remedy=kind.remedy)
    return InputError("holds no weights: no *.safetensors or *.gguf file and none of torch", culprit=str(folder))
