"""Where loratool is to be found: what README, guides and errors say of it, before it is public and after."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from lib.project_texts import INSTALL, JOB, LINK, as_now, texts, with_links

import loratool
from loratool import errors as project

if sys.version_info >= (3, 11):
    import tomllib

REPOSITORY, SITE = "https://github.com/owner/loratool", "https://owner.github.io/loratool"
README = (ROOT / "README.md").read_text()
# what is set -> how an extra is installed, and the advice of errors
SET = {
    (): ("pip install '.[hub]'", "pip install '.[hub]' in a clone of loratool"),
    ("REPOSITORY",): (f"pip install 'loratool[hub] @ git+{REPOSITORY}'",) * 2,
    ("REPOSITORY", "SITE"): (f"pip install 'loratool[hub] @ git+{REPOSITORY}'",) * 2,
    ("REPOSITORY", "SITE", "INDEX_NAME"): ("pip install 'loratool[hub]'",) * 2,
}
VALUES = {"REPOSITORY": REPOSITORY, "SITE": SITE, "INDEX_NAME": "loratool"}


def put(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VALUES:
        monkeypatch.setattr(project, name, VALUES[name] if name in names else "")


def test_readme_and_guides_are_as_the_constants_say() -> None:
    assert [path.name for path, text in texts().items() if path.read_text() != text] == [], (
        "python tests/lib/project_texts.py --write"
    )


def test_nothing_else_says_how_to_install() -> None:
    """No module writes it by itself, and no page has another way."""
    code = {path: path.read_text() for path in (ROOT / "loratool").rglob("*.py") if path.name != "errors.py"}
    assert [str(path) for path, text in code.items() if re.search(r"pip install \S*[\[.]", text)] == []
    for path, text in texts().items():
        own = re.findall(r"pip install [^`\n]*\[\w+\]", JOB.sub("", text))
        assert len(own) - own.count("pip install -q -e '.[test]") == len(INSTALL.findall(JOB.sub("", text))), path


@pytest.mark.parametrize("names", SET)
def test_an_install(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    put(names, monkeypatch)
    assert (project.install_command("hub"), project.install_remedy("hub")) == SET[names]


@pytest.mark.parametrize("names", SET)
def test_pages_follow_the_constants_both_ways(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    put(names, monkeypatch)
    changed = texts()
    written = {found[0] for text in changed.values() for found in INSTALL.finditer(JOB.sub("", text))}
    assert written and {re.sub(r"\[\w+\]", "[hub]", each) for each in written} == {SET[names][0]}
    readme = with_links(README)
    links = [(mark, to) for mark, _, to in LINK.findall(readme)]
    relative = [to for _, to in links if not re.match("https?:|#", to)]
    assert bool(relative) is not bool(names)
    assert with_links(readme) == readme and with_links(readme).count("](") == README.count("](")
    pictures = [to for text in changed.values() for mark, _, to in LINK.findall(text) if mark]
    begin = f"{REPOSITORY}/raw/main/" if names else ""
    assert all(re.fullmatch(rf"{begin or '(../../)?'}fixtures/pictures/[a-z]+.(svg|png)", to) for to in pictures)
    if names:
        assert any(to == f"{SITE}/hub.html" for _, to in links) is ("SITE" in names)
        assert any(to == f"{REPOSITORY}/blob/main/LICENSE" for _, to in links)
    assert {path: as_now(path, text) for path, text in changed.items()} == changed
    put((), monkeypatch)
    guides = [path for path in changed if path.name != "README.md"]
    assert [as_now(path, changed[path]) for path in guides] == [as_now(path, path.read_text()) for path in guides]


@pytest.mark.parametrize("names", SET)
@pytest.mark.parametrize("extra", ["html", "recipes", "hub"])
def test_errors_follow_the_constants(
    extra: str, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(names, monkeypatch)
    (tmp_path / "recipe.yaml").write_text("command: merge\n")
    missing = {"html": "jinja2", "recipes": "yaml", "hub": "huggingface_hub"}[extra]
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "loratool.files.hub.download", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    if extra == "html":
        monkeypatch.setattr("loratool.commands.report_files.find_spec", lambda name: None)
    calls = {
        "html": lambda: loratool.write_report(loratool.count(ROOT / "fixtures/llama/base"), tmp_path / "a.html"),
        "recipes": lambda: loratool.run(tmp_path / "recipe.yaml"),
        "hub": lambda: loratool.inspect("owner/model"),
    }
    with pytest.raises(loratool.MachineError) as error:
        calls[extra]()
    assert error.value.remedy == SET[names][1].replace("[hub]", f"[{extra}]")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_package_names_the_same_places() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {"Repository": project.REPOSITORY, "Documentation": project.SITE}
    assert declared.get("urls", {}) == {name: url for name, url in named.items() if url}
    assert project.INDEX_NAME in ("", declared["name"])
    assert not (project.REPOSITORY + project.SITE).endswith("/")
