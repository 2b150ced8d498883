"""Hold the grammar of names on the hub against huggingface_hub's own parsers, and refuse what leads elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import InputError
from loratool.files.hub.names import HubName, base_fields, cached_name, named_repo, parse_hub_name, shareable
from loratool.files.stores.links import parse_store_link

NAMES = {
    "org/name": ("org/name", None, ""),
    "gpt2": ("gpt2", None, ""),
    "gpt2@main": ("gpt2", "main", ""),
    "org/name@v1.0": ("org/name", "v1.0", ""),
    "org/name@feature%2Fx": ("org/name", "feature/x", ""),
    "org/name@refs/pr/1": ("org/name", "refs/pr/1", ""),
    "org/name@refs/pr/1/a": ("org/name", "refs/pr/1", "a"),
    "org/name@v1/a/b": ("org/name", "v1", "a/b"),
    "org/name/a/b/": ("org/name", None, "a/b"),
    "org/name/a b/file@1.safetensors": ("org/name", None, "a b/file@1.safetensors"),
    "org/name/file.safetensors": ("org/name", None, "file.safetensors"),
    "hf://org/name@v1/a": ("org/name", "v1", "a"),
    "hf:/org/name": ("org/name", None, ""),
    "hf://gpt2": ("gpt2", None, ""),
    "https://huggingface.co/org/name": ("org/name", None, ""),
    "https://huggingface.co/org/name/": ("org/name", None, ""),
    "https://hf.co/org/name/tree/v1": ("org/name", "v1", ""),
    "https://huggingface.co/org/name/tree/v1/a/b": ("org/name", "v1", "a/b"),
    "https://huggingface.co/org/name/tree/refs%2Fpr%2F1/a": ("org/name", "refs/pr/1", "a"),
    "https://huggingface.co/org/name/blob/main/a%20b.bin": ("org/name", "main", "a b.bin"),
    "https://huggingface.co/org/name/resolve/main/x.safetensors?download=true": ("org/name", "main", "x.safetensors"),
}

# what can only be a path
PATHS = (
    "", ".", "..", "./org/name", "../name", "/org/name", "~/name", "C:\\name", "org\\name", "org//name", "-org/name",
    "org/-name", "org/name.", "a--b/c", "org/name.git", "org/na me", "model.safetensors", "folder/model.safetensors",
    "org/name@", "org/name@../x", "org/name@a/../b", "org/name/../b", "org/name/a//b", "org/name/./a", "org/name@a\nb",
    "org/name/a:b", "org/name/\x00", "org/name/\ud800", "org/café", "o/" + "n" * 97, "o" * 97 + "/n",
)  # fmt: skip

REFUSED = {
    "hf://datasets/org/name": "one of the hub's datasets",
    "https://huggingface.co/spaces/org/name": "one of the hub's spaces",
    "https://huggingface.co/org/name/discussions/3": "not a link to a file or folder of a model",
    "https://huggingface.co/org/name/resolve/%2e%2e/x": "not a link to a model",
    "hf://org/name@../x": "not a link to a model",
    "hf://../name": "not a link to a model",
    "http://[::1": "not a link to a model",
    "https://[bad]/org/name": "not a link to a model",
}


@pytest.mark.parametrize("text", NAMES)
def test_names_and_links_are_parsed(text: str) -> None:
    found = parse_hub_name(text)
    assert found and (found.repo, found.revision, found.path) == NAMES[text]
    assert found.is_link == (text[:3] in ("hf:", "htt"))
    again = parse_hub_name(str(found))
    assert again and (again.repo, again.revision, again.path) == NAMES[text]
    if found.is_link and "://" in text:
        assert parse_hub_name(str(Path(text))) in (found, parse_hub_name(text.rstrip("/")))


@pytest.mark.parametrize("text", PATHS)
def test_what_leads_elsewhere_is_a_path(text: str) -> None:
    assert parse_hub_name(text) is None


@pytest.mark.parametrize("text", REFUSED)
def test_links_elsewhere_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=REFUSED[text]):
        parse_hub_name(text)


@pytest.mark.parametrize(
    "text",
    ["https://example.com/m", "https://huggingface.co.example.com/org/name", "https://user@huggingface.co:1/org/name"],
)
def test_links_to_other_hosts_are_of_stores(text: str) -> None:
    assert parse_hub_name(text) is None and parse_store_link(text)


def test_links_of_another_hub_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example.com:8080/hf")
    found = parse_hub_name("http://hub.example.com:8080/hf/org/name/blob/v1/a")
    assert found == HubName("org/name", "v1", "a", True)


@pytest.mark.parametrize("text", [text for text in NAMES if "://" in text and "gpt2" not in text])
def test_links_mean_what_huggingface_hub_says(text: str) -> None:
    hub = pytest.importorskip("huggingface_hub.utils", reason="needs huggingface_hub")
    if not hasattr(hub, "parse_hf_uri"):
        pytest.skip("needs huggingface_hub 2, which parses links")
    theirs, ours = hub.parse_hf_uri(text), parse_hub_name(text)
    assert ours and (ours.repo, ours.revision, ours.path) == (theirs.id, theirs.revision, theirs.path_in_repo)


@given(st.text("aZ0-_./ ", max_size=12))
def test_repositories_are_those_of_huggingface_hub(text: str) -> None:
    hub = pytest.importorskip("huggingface_hub.utils", reason="needs huggingface_hub")
    try:
        hub.validate_repo_id(text)
    except hub.HFValidationError:
        is_one = False
    else:
        is_one = True
    found = parse_hub_name(text)
    assert bool(found and found.repo == text) == is_one


def test_a_base_is_named_as_peft_loads_it(tmp_path: Path) -> None:
    """PEFT takes a repository's name and its revision, but no link, which moreover can have a token behind it."""
    for said in ("org/name", "hf://org/name", "https://huggingface.co/org/name?token=secret#secret"):
        assert base_fields(said) == {"base_model_name_or_path": "org/name"}
    assert base_fields("hf://org/name@v1") == {"base_model_name_or_path": "org/name", "revision": "v1"}
    assert base_fields("hf://org/name@v1/a") == {"base_model_name_or_path": "org/name@v1/a"}
    for said in (str(tmp_path), "models", "./org/name"):
        assert base_fields(said) == {"base_model_name_or_path": said}


def test_a_path_in_the_cache_tells_its_name() -> None:
    cache = Path("/x/hub")
    found = cached_name(cache / "models--org--a--b" / "snapshots" / "abc" / "sub" / "x.safetensors")
    assert found and str(found) == "org/a--b/sub/x.safetensors"
    assert str(cached_name(cache / "models--gpt2" / "snapshots" / "abc")) == "hf://gpt2"
    assert cached_name(cache / "models--org--name") is None and cached_name(cache / "models--a--b" / "x" / "y") is None


@pytest.mark.parametrize(("said", "name"), [("org/name", "org/name"), ("gpt2", ""), ("./a/b", ""), (None, "")])
def test_the_name_that_a_file_tells(said: object, name: str) -> None:
    assert named_repo(said) == name


@pytest.mark.parametrize(
    "said", ["https://x/a/b", "hf://datasets/a/b", "/home/me/model", "C:\\a\\b", "a/b@main", "a/b/c"]
)
def test_what_is_no_name_in_a_file_is_no_error(said: str) -> None:
    assert named_repo(said) == ""


def test_a_link_is_told_without_its_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may hold a token; the name means the same."""
    link = "https://huggingface.co/org/name/resolve/v1/a/x.safetensors?token=hf_secret"
    assert shareable(link) == "hf://org/name@v1/a/x.safetensors"
    assert parse_hub_name(shareable(link)) == parse_hub_name(link)
    assert shareable("https://huggingface.co/gpt2?token=hf_secret") == "hf://gpt2"
    for path in ("org/name@v1", "merged", "./a?b", str(tmp_path)):
        assert shareable(path) == path
