"""Hold the licences that are taken over from another card: what looks like one, of a card that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratool.errors import InputError
from loratool.files.output import model_card
from loratool.files.output.model_card import read_licence

CARDS: dict[str, dict[str, str]] = {
    "---\nlicense: apache-2.0\n---\n": {"license": "apache-2.0"},
    "\ufeff---\ntags:\n- a\nlicense: 'mit'\nlicense_name: x y\n---\n": {"license": "mit", "license_name": "x y"},
    "---\nlicense: other\nlicense_link: https://a.b/c\n---\n": {"license": "other", "license_link": "https://a.b/c"},
    "---\nlicense_name: alone\n---\n": {},
    "---\nlicense: null\n---\n": {},
    "---\nlicense: `rm -rf`\n---\n": {},
    "---\nlicense: mit\n": {},
    "license: mit\n": {},
    "": {},
}


@pytest.mark.parametrize("text", CARDS)
def test_what_looks_like_a_licence(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_licence(tmp_path) == CARDS[text]
    assert read_licence(tmp_path / "other") == read_licence(None) == {}


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), InputError("is cut off")])
def test_a_card_that_cannot_be_read_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")

    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(model_card, "open_for_reading", refuse)
    assert read_licence(tmp_path) == {}
