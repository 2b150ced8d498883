"""Hold the reader of safetensors against headers that lie, and against the official reader's word on each."""

from __future__ import annotations

import json
import random
import struct

import pytest
from fuzzing import Case, Fuzzer

pytestmark = pytest.mark.fuzz


def test_safetensors_headers(fuzz: Fuzzer) -> None:
    def make(rng: random.Random) -> Case:
        header = json.dumps({"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
        data = struct.pack("<Q", len(header)) + header + bytes(16)
        return Case({"x.safetensors": data}, ("inspect", "x.safetensors"))

    fuzz(make, 40)
