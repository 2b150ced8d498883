"""Hash whole files, and compare them with a signature of model-signing and with the hub's cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, oracle_folder, run_command
from lib.files.signatures import in_envelope, sha256_of, signed, write_signature

import loratool

LLAMA = FIXTURES / "llama"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the folder `model` below the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(LLAMA / "base", tmp_path / "model")
    return Path("model")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def inspected(path: object, *options: str) -> Any:
    return run_command("inspect", path, "--digest", "--files", *options)


def test_all_files_are_hashed(model: Path) -> None:
    (model / ".cache").mkdir()
    (model / ".cache" / "x").write_text("x")
    report = loratool.inspect_files(model)
    visible = [each for each in sorted(model.iterdir()) if each.is_file()]
    assert [(each.name, each.nbytes, each.sha256) for each in report.files] == [
        (each.name, each.stat().st_size, sha256_of(each)) for each in visible
    ]
    assert report.ok and report.digest == loratool.inspect(model, digest=True).digest  # type: ignore[union-attr]
    (shard,) = loratool.inspect_files(LLAMA / "adapter" / "adapter_model.safetensors").files
    assert shard.sha256 == sha256_of(LLAMA / "adapter" / "adapter_model.safetensors")
    shown = inspected(model)
    assert shown.exit_code == 0 and all(f"{each.sha256}  {each.name}" in shown.stdout for each in report.files)
    assert f"digest: sha256:{report.digest}" in shown.stdout and "no signature is beside" in shown.stdout


def test_a_signature_is_compared_and_not_called_verified(model: Path) -> None:
    write_signature(model)
    report = loratool.inspect_files(model)
    assert report.ok and {each.signature for each in report.files} == {"same"}
    shown = inspected(model).stdout.splitlines()[-1]
    assert "as signed: " in shown and "model_signing verifies whose signature it is" in shown
    (model / "notes.txt").write_text("new")
    assert {each.name: each.signature for each in loratool.inspect_files(model).files}["notes.txt"] is None
    assert "notes.txt  not signed" in inspected(model).stdout
    (model / "model.sig").rename("model.sig")  # where its command line writes it
    assert loratool.inspect_files(model).signature == "model.sig"
    model.rename("other")  # about which it is not
    assert loratool.inspect_files("other").signature is None


def test_what_differs_is_named_and_exits_with_1(model: Path) -> None:
    write_signature(model, "gone.json")
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    no = inspected(model)
    assert no.exit_code == 1 and "not as signed: config.json and 1 more" in no.stdout
    assert f"{sha256_of(model / 'config.json')}  config.json  not as signed" in no.stdout
    assert "gone.json  not as signed" in no.stdout
    printed = json.loads(inspected(model, "--json").stdout)
    assert (printed["ok"], printed["status"]) == (False, "differs")
    gone = next(each for each in printed["report"]["files"] if each["name"] == "gone.json")
    assert gone == {"name": "gone.json", "nbytes": None, "sha256": None, "signature": "differs", "hub": None}


@pytest.mark.parametrize(
    "statement",
    [
        signed("model", {"../model/config.json": "0" * 64}),
        signed("model", {"/etc/hostname": "0" * 64}),
        signed("model", {"a": "0" * 64}, method="shards"),
        {**signed("model", {"a": "0" * 64}), "subject": [{"name": "model", "digest": {"sha256": "0" * 64}}]},
        {**signed("model", {"a": "0" * 64}), "predicateType": "https://slsa.dev/provenance/v1"},
        {**signed("model", {"a": "0" * 64}), "predicate": {"serialization": {"method": "files"}, "resources": [1]}},
        {"_type": "x"},
    ],
)
def test_a_forged_signature_is_refused_in_a_line(statement: dict[str, Any], model: Path) -> None:
    (model / "model.sig").write_text(json.dumps(in_envelope(statement)))
    no = inspected(model)
    assert no.exit_code == 3 and no.stderr.count("\n") == 1 and not no.stdout, no.stderr


def test_the_hubs_names_of_blobs_are_digests(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Path("hub/models--org--base")
    snapshot = repository / "snapshots" / ("2" * 40)
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("2" * 40)
    for file in model.iterdir():
        large = file.suffix == ".safetensors"
        blob = repository / "blobs" / sha256_of(file)[: 64 if large else 40]
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setenv("HF_HUB_CACHE", str(Path("hub").absolute()))
    report = loratool.inspect_files("org/base")
    assert {each.name: each.hub for each in report.files} == {
        file.name: "same" if file.suffix == ".safetensors" else None for file in model.iterdir()
    }
    assert f"as on the hub: 2 files, by digests in org/base@{'2' * 40}" in inspected("org/base").stdout
    flip(next(snapshot.glob("*.safetensors")).resolve())
    no = inspected("org/base")
    assert no.exit_code == 1 and "not as on the hub: model-0000" in no.stdout


@pytest.mark.parametrize(
    "options", ["--files", "--digest --files --strict", "--digest --files --base x", "--digest --files --metadata"]
)
def test_options_that_do_not_go_together(options: str, model: Path) -> None:
    no = run_command("inspect", model, *options.split())
    assert no.exit_code == 2 and "--files needs --digest" in no.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a folder", "a file"])
def test_model_signing_and_we_hash_alike(kind: str, model: Path) -> None:
    """It signs an output with a local key, and verifies it. A flipped byte is a no of both."""
    folder = oracle_folder("model-signing", "model-signing==1.1.1 pyopenssl (with their dependencies)")
    loratool.merge(model, LLAMA / "adapter", "out" if kind == "a folder" else "out.safetensors", attest="out.json")
    out = Path("out" if kind == "a folder" else "out.safetensors")
    subprocess.run("openssl ecparam -name prime256v1 -genkey -noout -out key.pem".split(), check=True)
    subprocess.run("openssl ec -in key.pem -pubout -out pub.pem".split(), check=True, capture_output=True)
    signature = str(out / "model.sig") if out.is_dir() else "model.sig"
    more = [] if out.is_dir() else ["--ignore_unsigned_files"]

    def model_signing(*words: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-c", "from model_signing._cli import main; main()"]
        env = {**os.environ, "PYTHONPATH": folder}
        return subprocess.run([*start, *words], env=env, capture_output=True, text=True)

    def verified() -> subprocess.CompletedProcess[str]:
        return model_signing("verify", "key", str(out), "--signature", signature, "--public_key", "pub.pem", *more)

    done = model_signing("sign", "key", str(out), "--signature", signature, "--private_key", "key.pem")
    assert done.returncode == 0, done.stderr
    assert verified().returncode == 0
    report = loratool.inspect_files(out)
    assert report.ok and report.signature == signature and {each.signature for each in report.files} == {"same"}
    stated = {each["name"]: each["digest"]["sha256"] for each in json.loads(Path("out.json").read_text())["subject"]}
    assert stated.items() >= {each.name: each.sha256 for each in report.files}.items()
    assert loratool.verify_attestation("out.json").ok
    flip(next(out.glob("*.safetensors")) if out.is_dir() else out)
    no = verified()
    assert no.returncode == 1 and "mismatch" in (no.stdout + no.stderr).lower()
    assert not loratool.inspect_files(out).ok and not loratool.verify_attestation("out.json").ok


@pytest.mark.slow
def test_our_statements_are_those_of_in_toto(model: Path) -> None:
    """Its own classes parse them, which refuses unknown fields, and validate them."""
    folder = oracle_folder("model-signing", "model-signing==1.1.1 pyopenssl (with their dependencies)")
    loratool.merge(model, LLAMA / "adapter", "out", attest="out.json")
    read = "import json, sys; from google.protobuf import json_format as f; "
    read += "from in_toto_attestation.v1 import statement, statement_pb2 as s; "
    read += (
        "from in_toto_attestation.predicates.provenance.v1 import provenance_pb2 as p; text = open('out.json').read(); "
    )
    read += "statement.Statement.copy_from_pb(f.Parse(text, s.Statement())).validate(); "
    read += "print(f.ParseDict(json.loads(text)['predicate'], p.Provenance()).build_definition.build_type)"
    env = {**os.environ, "PYTHONPATH": folder}
    done = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "urn:loratool:recipe:v1\n"), done.stderr


@pytest.mark.slow
def test_our_signature_is_that_of_model_signing(model: Path) -> None:
    """What the other tests write is what that program reads, apart from the signature itself."""
    folder = oracle_folder("model-signing", "model-signing==1.1.1 pyopenssl (with their dependencies)")
    place = write_signature(model)
    read = "import sys, json, base64; from model_signing._signing import signing; "
    read += "from model_signing._signing.sign_sigstore_pb import Signature; import pathlib; "
    read += "bundle = Signature.read(pathlib.Path(sys.argv[1])).bundle; "
    read += "manifest = signing.dsse_payload_to_manifest(json.loads(bundle.dsse_envelope.payload)); "
    read += (
        "print(json.dumps({str(each.identifier): each.digest.digest_hex for each in manifest.resource_descriptors()}))"
    )
    env = {**os.environ, "PYTHONPATH": folder}
    done = subprocess.run([sys.executable, "-c", read, str(place)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {each.name: sha256_of(each) for each in model.iterdir() if each != place}
