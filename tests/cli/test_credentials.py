"""No surface shows the credentials of a link that a user or a file names: what is printed and written is sent on."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, weights, write_model, write_peft

import loratool
from loratool.errors import InputError, brief, without_credentials

Run = Callable[..., Any]

SECRET = "hf_SECRETsecretSECRETsecretSECRETsecret"

LINKS = {
    "user": f"https://user:{SECRET}@huggingface.co/org/name",
    "user alone": f"https://{SECRET}@example.com/m",
    "user with a slash": f"https://user:a/{SECRET}@example.com/m",
    "query": f"https://example.com/m?token={SECRET}",
    "signed": f"https://bucket.example.com/m?X-Signature={SECRET}&x=1",
    "fragment": f"https://example.com/m#access_token={SECRET}",
    "a page of the hub": f"https://huggingface.co/org/name/discussions?token={SECRET}",
    "the hub": f"https://huggingface.co/org/name?token={SECRET}",
    "hf": f"hf://org/name?token={SECRET}",
    "user of hf": f"hf://user:{SECRET}@org/name",
    "another scheme": f"s3://key:{SECRET}@bucket/x",
    "no scheme": f"org/name?token={SECRET}",
    "one slash": f"https:/user:{SECRET}@example.com/m",
    "with a weight": f"https://user:{SECRET}@example.com/m:0.5",
}

# A call that fails for each place in which a user can put a link
CALLS = [
    "{}", "merge {} style -o out", "merge base {} -o out", "merge base style -o {}",
    "merge base style --like {} -o out",
    "merge base style --tokenizer {} -o out", "merge base style --initial {} -o out", "merge base style --layers {}",
    "merge base style --attest {} -o out", "verify --attestation {}", "merge base style --save-recipe {} -o out",
    "merge base style --html {} -o out", "merge base style --{} -o out",
    "merge base style --max-shard-size {}", "merge base style --target {} -o out", "inspect {}",
    "inspect style --base {}", "diff {} style", "run {}", "extract {} base -o out", "convert {} --to kohya",
    "convert style --for vllm --base {} -o out", "convert style --set {}", "count {}", "verify base style {}",
    "unmerge {} style -o out", "resize {} --rank 1 -o out", "resize style --rank {}", "resize style --rank-rule {}",
    "resize style --rank-pattern {}", "combine {} style -o out", "init {} --rank 2", "init base --imatrix {} --rank 1",
    "guide {}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder with a base and an adapter, which is org/name in the cache of the hub too."""
    monkeypatch.chdir(tmp_path)
    base = write_model(tmp_path / "base", {"x.weight": weights(8, 8, dtype=torch.bfloat16)}, {"model_type": "llama"})
    adapter = write_peft(tmp_path / "style", {"x": factors(8, 8, 2)})
    for name, folder in (("org--name", adapter), ("org--base", base)):
        snapshots = tmp_path / "hub" / f"models--{name}" / "snapshots"
        snapshots.mkdir(parents=True)
        (snapshots / ("0" * 40)).symlink_to(folder)
        (snapshots.parent / "refs").mkdir()
        (snapshots.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(socket, "getaddrinfo", _no_such_host)
    return tmp_path


def _no_such_host(*args: Any, **more: Any) -> Any:
    """Stand in for the look-up of a name, so that no test asks a network."""
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def require_no_secret(*texts: str) -> None:
    assert not [text for text in texts if "SECRETs" in text or "secretS" in text]


@pytest.mark.parametrize("link", LINKS)
def test_no_error_shows_credentials(link: str, run: Run) -> None:
    for call in CALLS:
        words = [word.replace("{}", LINKS[link]) for word in call.split()]
        for more in ((), ("--json",)):
            result = run(*words, *more)
            assert result.exit_code in (0, 2, 3, 4, 5), (call, result)
            require_no_secret(result.stdout, result.stderr)


@pytest.mark.parametrize("link", ["user", "query", "another scheme"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("LORATOOL_MERGE_LIKE", "merge base style -o out"),
        ("LORATOOL_MERGE_OUT", "merge base style"),
        ("LORATOOL_CONVERT_BASE", "convert style --for vllm -o out"),
        ("LORATOOL_RESIZE_RANK", "resize style -o out"),
        ("HF_ENDPOINT", "merge https://other.example/org/name style"),
    ],
)
def test_nor_from_the_environment(name: str, call: str, link: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, LINKS[link])
    result = run(*call.split())
    assert result.exit_code in (2, 3, 5)
    require_no_secret(result.stdout, result.stderr)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(
    "recipe",
    [
        {"command": "merge", "base": "{}", "adapters": ["style"], "out": "out"},
        {"command": "merge", "base": "base", "adapters": [{"path": "{}", "weight": 2}], "out": "out"},
        {"command": "merge", "base": "base", "adapters": ["style"], "dtype": "{}", "out": "out"},
        {"command": "merge", "base": ["{}", "{}"], "adapters": ["style"], "out": "out"},
        {"command": "{}"},
        {"{}": "merge"},
    ],
)
def test_nor_of_a_recipe(recipe: dict[str, Any], link: str, run: Run) -> None:
    Path("recipe.json").write_text(json.dumps(recipe).replace("{}", LINKS[link]))
    for more in ((), ("--json",)):
        result = run("run", "recipe.json", *more)
        assert result.exit_code in (0, 2, 3, 4, 5), result
        require_no_secret(result.stdout, result.stderr)


@pytest.mark.parametrize("adapter", ["https://huggingface.co/org/name?token=%s", "https://a:%s@hub.example/org/name"])
@pytest.mark.parametrize(
    "call",
    [
        "merge {base} {adapter}:0.5 -o out --html page.html --save-recipe recipe.json --attest s.json",
        "merge {base} {adapter} -o out --html page.html --resume",
        "resize {adapter} --rank 1 -o out --html page.html --save-recipe recipe.json",
        "convert {adapter} --to peft -o out --save-recipe recipe.json",
        "init {base} --rank 2 -o out --save-recipe recipe.json",
    ],
)
def test_nothing_that_is_written_or_printed_has_credentials(
    call: str, adapter: str, work: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"https://a:{SECRET}@hub.example")
    names = {"adapter": adapter % SECRET, "base": f"https://huggingface.co/org/base?token={SECRET}"}
    for more in ([], ["--json", "--force"]):
        result = run(*(word.format_map(names) for word in call.split()), *more)
        assert result.exit_code == 0, result.stderr
        require_no_secret(result.stdout, result.stderr)
    files = [path for path in work.rglob("*") if path.is_file()]
    assert {Path(word).suffix for word in call.split() if word.endswith((".html", ".json"))} <= {
        f.suffix for f in files
    }
    assert not [path for path in files if b"SECRETsecret" in path.read_bytes()]


def test_nor_what_a_file_says(work: Path, run: Run) -> None:
    """A config names a base, and what it names is shown."""
    config = work / "style" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": LINKS["user"]}))
    for more in ([], ["-v"], ["--json"], ["--base", "base"], ["--html", "page.html"]):
        result = run("inspect", "style", *more)
        assert result.exit_code == 0
        require_no_secret(result.stdout, result.stderr)
    require_no_secret(Path("page.html").read_text())
    assert run("merge", "base", "style", "-o", "out").exit_code == 0
    require_no_secret((work / "out" / "README.md").read_text())


def test_nor_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATOOL_DEBUG", "1")
    result = run("inspect", LINKS["user alone"])
    assert result.exit_code == 5 and "Traceback" in result.stderr
    require_no_secret(result.stdout, result.stderr)


def test_nor_an_error_of_the_library() -> None:
    for link in LINKS.values():
        if re.search(r"huggingface.co/org/name(\?|$)", link):  # in the cache
            continue
        with pytest.raises(loratool.LoratoolError) as raised:
            loratool.inspect(link)
        error = raised.value
        require_no_secret(str(error), repr(error), str(error.args), error.message, f"{error.culprit}{error.remedy}")
    error = InputError("is odd")
    error.remedy = LINKS["query"]
    assert error.remedy == "https://example.com/m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hf://org/name@v1/a/x.safetensors", None),
        ("hf://gpt2@v1", None),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1/a#files", None),
        ("http://127.0.0.1:8000/org/name", None),
        ("org/name@main", None),
        ("C:\\models\\a@b:0.5", None),
        ("/data/me@home/key=1?/x", None),
        ("model.layers.0.q_proj.weight: hf_quantizer.weight", None),
        ("what?key=1", "what?key=***"),
        ("see 'https://a:b@c.example/d?e=f', or g", "see 'https://c.example/d', or g"),
        ("https://a:b@c.example:80/d", "https://c.example:80/d"),
        ("https://me:sec", "https://***"),
        (f"the token {SECRET}.", "the token hf_***."),
        ("", None),
    ],
)
def test_what_is_left_of_a_text(text: str, shown: str | None) -> None:
    assert without_credentials(text) == (text if shown is None else shown)
    assert without_credentials(without_credentials(text)) == without_credentials(text)


def test_a_long_text_takes_no_long_time() -> None:
    """Names come from files, and may be as long as these."""
    for text in ("a." * 500_000, "a://" * 200_000, "?token" * 200_000, "hf_" * 300_000, ":/=" + "a" * 1_000_000):
        assert without_credentials(text)


def test_a_value_is_cut_when_its_credentials_are_gone() -> None:
    require_no_secret(brief(LINKS["query"]), brief([LINKS["user alone"]]), brief({"x": LINKS["user"]}))
    assert brief("x" * 50) == "'xxxxxxxxxxxx...xxxxxxxxxxxxx'"
