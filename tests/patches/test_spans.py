"""Hold the division of a model into spans to the guide's second reader, and to what a span is."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from conftest import slow
from lib.oracles import naive_patch_reader
from lib.oracles.naive_patch_reader import Reader

from loratool.files import digest
from loratool.files.dtypes import TensorSpec
from loratool.patches import spans
from loratool.patches.spans import TensorSpan, places_of, spans_of

PIECE = 64


def by_the_guide(
    specs: dict[str, TensorSpec], sources: dict[str, str]
) -> list[tuple[str, str, list[tuple[str, int, int]]]]:
    reader = Reader.__new__(Reader)
    listed = {name: (spec.dtype, list(spec.shape), 0) for name, spec in specs.items()}
    reader.files = [("model.safetensors", b"", listed, 0)]
    new = [name for name, source in sources.items() if not source]
    reader.index = {"new": new, "cast": {name: source for name, source in sources.items() if source}}
    return [(dtype, source or "", pieces) for dtype, source, pieces in reader.spans()]


def draw(seed: int) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    g = random.Random(seed)
    names = sorted({f"{g.choice('aébz')}{g.randrange(99)}" for _ in range(g.randrange(30))}, key=str.encode)
    sizes = (0, 1, 7, 16, 31, 32, 33, 64, 100, 300)
    specs = {name: TensorSpec(g.choice(("BF16", "F32", "U8")), (g.choice(sizes),)) for name in names}
    return specs, {name: g.choice(("", "F16")) for name in names if not g.randrange(5)}


@pytest.mark.parametrize("seeds", [range(50), slow(range(50, 3000))])
def test_spans(seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (digest, spans, naive_patch_reader):
        monkeypatch.setattr(module, "PIECE", PIECE)
    for seed in seeds:
        specs, sources = draw(seed)
        found = spans_of(specs, sources)
        listed = [(span.dtype, span.source, [(*piece,) for piece in span.pieces]) for span in found]
        assert listed == by_the_guide(specs, sources)
        check(specs, sources, found)


def check(specs: dict[str, TensorSpec], sources: dict[str, str], found: list[TensorSpan]) -> None:
    """Each byte of each tensor is in one span, of one type, and none is larger than a piece."""
    covered, places = Counter[str](), places_of(found)
    for number, span in enumerate(found):
        assert 0 < span.nbytes <= PIECE
        offset = 0
        for name, first, length in span.pieces:
            assert first == covered[name] or length < PIECE
            covered[name] += length
            assert (span.dtype, span.source) == (specs[name].dtype, sources.get(name, specs[name].dtype))
            assert places[name, first] == (number, offset)
            offset += length
    assert covered == {name: spec.nbytes for name, spec in specs.items() if spec.nbytes}
    assert len({span.place for span in found}) == len(found)
