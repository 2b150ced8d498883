"""Hold what --force may replace in an output folder: files of ours, and none of the user's."""

from __future__ import annotations

from pathlib import Path

from loratool.files.output.paths import find_foreign_file


def test_a_side_file_that_is_written_again_is_no_users(tmp_path: Path) -> None:
    """A script may be the user's own, unless the run would write the same."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "modeling_x.py").write_text("pass")
    assert find_foreign_file(tmp_path, (), {}) == "modeling_x.py"
    assert find_foreign_file(tmp_path, (), {"modeling_x.py": b"other"}) == "modeling_x.py"
    assert find_foreign_file(tmp_path, (), {"modeling_x.py": b"pass"}) is None
