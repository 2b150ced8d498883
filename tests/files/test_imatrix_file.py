"""Hold the reading of llama-imatrix's files against what gguf-py writes, imatrix.cpp's own layout, and lies."""

from __future__ import annotations

import base64
import os
import struct
import zlib
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from lib.files.gguf_bytes import floats
from lib.files.gguf_bytes import write as write_gguf_bytes
from lib.files.imatrix_files import tail, write_binary, write_gguf

from loratool import InputError
from loratool.files.imatrix_file import ImatrixFile

SUMS = {
    "blk.0.attn_q.weight": ([[8.0, 0.0, 2.0, 4.0]], [4]),
    "blk.0.ffn_down_exps.weight": ([[1.0, 2.0], [0.0, 0.0], [6.0, 3.0]], [1, 0, 3]),
}


# What llama.cpp's save_imatrix wrote (tools/imatrix/imatrix.cpp of llama-cpp-python 0.3.36, compiled by itself), of
# attn_q's sums 1000 1 0 37.5 2.25 8 of 1536 inputs, and of ffn_down_exps' 1 2 3, 0 0 0, 40 50 6 of 600, 0, 936; packed
WRITTEN = {
    "gguf": (
        "c-"
        "oCm+l~Q25G`Zll6VlCc;E#e(AoF_V<XECc<wYBy=Yd~#PGDA=F@b~l$b$=lXOm3^*L3ihr{tt9soWd#+56?3#sK^tQj76vSjNb_0"
        ">k;UWL_k$z}qDk!Z@c=j1thFB78-"
        "(J&10^UgS3271M(+d!j>;3CzYN{l+mD5M9_B*kRCVqZ)kYW~L#QZ1Iql;$SbbX|Y~Jfe|djZ&CgBECb5xRY|u=bF#92hC-"
        ";Gk3c^`UoW0!6$CNo)ky%5>b+a{^1Rr23FXM@AYqhs$1W`y`Kl!{>W=RzMt;5?5vSJXFuCtr}@86_gny&ZCQW"
    ),
    "dat": (
        "c-muPU|<ji;-s8xJp;YOl9IgmLcQ|T%=C;BW}q+|0|@-"
        "G2NKp`Cc`va28Ibhc7u%+Tw7XNUVKV^d0u>KML{uCHxp2n6NvdrqOAE!Zdr3(SGECi9bot)*LvHvXK&dm@&?&3L)Dg~R+JR$l~j}"
        "f0EiSKvj"
    ),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_what_llama_cpp_wrote(form: str, tmp_path: Path) -> None:
    """The older form has 1 for an expert without inputs, and numbers that were divided and multiplied in float32."""
    path = tmp_path / f"imatrix.{form}"
    path.write_bytes(zlib.decompress(base64.b85decode(WRITTEN[form])))
    file = ImatrixFile(path)
    q = torch.tensor([[1000, 1, 0, 37.5, 2.25, 8]], dtype=torch.float64) / 1536
    down = torch.tensor([[1, 2, 3], [0, 0, 0], [40, 50, 6]], dtype=torch.float64) / torch.tensor([[600], [0], [936]])
    down = down if form == "gguf" else down.nan_to_num(1.0)
    found = [
        file.moments(f"blk.0.{name}.weight", n, 0, E) for name, E, n in (("attn_q", 1, 6), ("ffn_down_exps", 3, 3))
    ]
    assert np.allclose(found[0], q, rtol=1e-6) and np.allclose(found[1], down, rtol=1e-6, equal_nan=True)
    file.close()


@pytest.mark.parametrize("form", WRITTEN)
def test_damage_is_told_or_harmless(form: str, tmp_path: Path) -> None:
    """Whatever bytes are changed, there are numbers that squares have, or an InputError."""
    draw, path = Random(form), tmp_path / f"imatrix.{form}"
    whole = zlib.decompress(base64.b85decode(WRITTEN[form]))
    for _ in range(80):
        data = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(min(len(data), draw.choice([0, 1, 3]))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        with suppress(InputError), closing(ImatrixFile(path)) as file:
            for name, size in file.sizes.items():
                for inputs in (3, 6):
                    if size % inputs == 0 and size < 1000:
                        found = file.moments(name, inputs, 0, file.matrices(name, inputs))
                        assert not (found < 0).any()


@pytest.mark.parametrize("means", [False, True])
def test_gguf(means: bool, tmp_path: Path) -> None:
    file = ImatrixFile(write_gguf(tmp_path / "imatrix.gguf", SUMS, means=means))
    assert file.sizes == {"blk.0.attn_q.weight": 4, "blk.0.ffn_down_exps.weight": 6}
    assert file.moments("blk.0.attn_q.weight", 4, 0, 1).tolist() == [[2.0, 0.0, 0.5, 1.0]]
    experts = file.moments("blk.0.ffn_down_exps.weight", 2, 0, 3)
    assert experts[::2].tolist() == [[1.0, 2.0], [2.0, 1.0]] and np.isnan(experts[1]).all()
    assert file.moments("blk.0.ffn_down_exps.weight", 2, 2, 1).tolist() == [[2.0, 1.0]]
    file.close()


def test_one_count_for_a_stack(tmp_path: Path) -> None:
    """As versions since 2026 write for matrices that are all used at once, whose sums are then one row."""
    file = ImatrixFile(write_gguf(tmp_path / "imatrix.gguf", {"a": ([[1.0, 2.0, 3.0, 4.0]], [2])}))
    assert file.moments("a", 2, 0, 2).tolist() == [[0.5, 1.0], [1.5, 2.0]]
    file.close()


@pytest.mark.parametrize("end", [b"", struct.pack("<i", 3), tail(), tail(b"\xff\xfe")])
def test_the_older_form(end: bytes, tmp_path: Path) -> None:
    """Before April 2024 nothing followed the entries, and the text's name may be of any bytes."""
    sums = {"blk.0.attn_q.weight": ([8.0, 0.0, 2.0, 4.0], [4]), "blk.1.ffn_down_exps.weight": ([[3, 6], [9, 3]], [3])}
    file = ImatrixFile(write_binary(tmp_path / "imatrix.dat", sums, end))
    assert file.moments("blk.0.attn_q.weight", 4, 0, 1).tolist() == [[2.0, 0.0, 0.5, 1.0]]
    assert file.moments("blk.1.ffn_down_exps.weight", 2, 0, 2).tolist() == [[1, 2], [3, 1]]
    file.close()


def test_without_calls_there_are_no_inputs(tmp_path: Path) -> None:
    file = ImatrixFile(write_binary(tmp_path / "imatrix.dat", {"a": ([1.0, 2.0], [0])}))
    assert np.isnan(file.moments("a", 2, 0, 1)).all()
    file.close()


ONE = {"blk.0.attn_q.weight": ([1.0, 2.0], [3])}


def entry(name: bytes, calls: int, count: int, values: bytes = b"\0" * 8) -> bytes:
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, count) + values


LIES = {
    "empty": (b"", "is not a file of llama-imatrix"),
    "text": (b"hello, this is a text", "is not a file"),
    "safetensors": (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"}}', "is a file of safetensors"),
    "web page": (b"<!DOCTYPE html><html>", "is an HTML page"),
    "many entries": (struct.pack("<i", 1 << 30) + entry(b"a", 1, 2), "is not a file"),
    "more entries than there are": (struct.pack("<i", 2) + entry(b"a", 1, 2), "cut off or damaged"),
    "long name": (struct.pack("<ii", 1, 1 << 16) + b"a", "cut off or damaged"),
    "more numbers than there are": (struct.pack("<i", 1) + entry(b"a", 1, (1 << 31) - 1), "cut off or damaged"),
    "no numbers": (struct.pack("<i", 1) + entry(b"a", 1, 0), "claims 0 numbers"),
    "fewer than none": (struct.pack("<i", 1) + entry(b"a", 1, -2), "claims -2 numbers"),
    "calls below 0": (struct.pack("<i", 1) + entry(b"a", -1, 2), "of -1 calls"),
    "twice": (struct.pack("<i", 2) + 2 * entry(b"a", 1, 2), "has a twice"),
    "a name in no encoding": (struct.pack("<i", 1) + entry(b"\xff\xfe", 1, 2), "not UTF-8"),
    "an empty name": (struct.pack("<i", 2) + entry(b"a", 1, 2) + entry(b"", 1, 2), "a name of 0 bytes"),
    "a name of less": (struct.pack("<i", 2) + entry(b"a", 1, 2) + struct.pack("<i", -5), "a name of -5 bytes"),
    "more behind": (struct.pack("<i", 1) + entry(b"a", 1, 2) + tail() + b"x", "has 1 bytes after"),
    "a longer text": (struct.pack("<i", 1) + entry(b"a", 1, 2) + struct.pack("<ii", 3, 99), "cut off or damaged"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(lie: str, tmp_path: Path) -> None:
    data, said = LIES[lie]
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        ImatrixFile(path)
    assert said in error.value.message and error.value.culprit == str(path)


def test_a_cut_is_refused(tmp_path: Path) -> None:
    """Of the older form every cut is told, but for those that leave what former versions wrote."""
    path = tmp_path / "imatrix.dat"
    data = write_binary(path, ONE, tail()).read_bytes()
    entries = len(write_binary(tmp_path / "other.dat", ONE).read_bytes())
    for length in range(len(data)):
        path.write_bytes(data[:length])
        if length in (entries, entries + 4):
            ImatrixFile(path).close()
        else:
            with pytest.raises(InputError):
                ImatrixFile(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("at", ["sums", "counts"])
def test_a_number_that_no_square_has(number: float, at: str, tmp_path: Path) -> None:
    sums = {"a": ([[1.0, number]], [2.0]) if at == "sums" else ([[1.0, 2.0]], [number])}
    file = ImatrixFile(write_gguf(tmp_path / "imatrix.gguf", sums))
    with pytest.raises(InputError, match="negative or not finite"):
        file.moments("a", 2, 0, 1)
    file.close()


def test_another_width(tmp_path: Path) -> None:
    file = ImatrixFile(write_gguf(tmp_path / "imatrix.gguf", SUMS))
    for inputs in (0, 3, 8):
        with pytest.raises(InputError, match="it belongs to another model"):
            file.matrices("blk.0.attn_q.weight", inputs)
    with pytest.raises(InputError, match="3 counts"):
        file.moments("blk.0.ffn_down_exps.weight", 3, 0, 2)
    file.close()


def test_other_gguf_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GGUF of the type 'model'"):
        ImatrixFile(write_gguf(tmp_path / "model.gguf", SUMS, type="model"))
    with pytest.raises(InputError, match="no sums of squares"):
        ImatrixFile(write_gguf(tmp_path / "none.gguf", {}))
    with pytest.raises(InputError, match="GGUF without a type"):
        write_gguf_bytes(tmp_path / "model.gguf", {"general.architecture": "llama"}, {"a": floats(np.ones((2, 2)))})
        ImatrixFile(tmp_path / "model.gguf")


def test_half_of_a_pair(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "imatrix.gguf", SUMS)
    path.write_bytes(path.read_bytes().replace(b"attn_q.weight.counts", b"attn_q.weight.county"))
    with pytest.raises(InputError, match=r"only one of \.in_sum2 and \.counts of blk\.0\.attn_q\.weight"):
        ImatrixFile(path)


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    """What a file claims takes no memory: here 2^30 matrices, in a file without bytes on the disk."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, (1 << 31) - 2))
    os.truncate(path, 17 + 4 * ((1 << 31) - 2))
    file = ImatrixFile(path)
    assert file.matrices("a", 2) == (1 << 30) - 1
    assert file.moments("a", 2, (1 << 30) - 3, 2).tolist() == [[0, 0], [0, 0]]
    file.close()


def test_moments_are_in_float64(tmp_path: Path) -> None:
    """The quotient of two float32 numbers is not rounded to one."""
    file = ImatrixFile(write_gguf(tmp_path / "imatrix.gguf", {"a": ([[1.0, 2.0]], [3.0])}))
    assert np.array_equal(file.moments("a", 2, 0, 1), np.array([[1 / 3, 2 / 3]]))
    file.close()
