"""What an image adapter's metadata says of its training, whoever wrote it."""

from __future__ import annotations

import base64
import json

import pytest

from loratool.adapters.image_metadata import Training, common_metadata, former_metadata, read_training, trigger_words

FREQUENCY = {"10_inkwash style": {"inkwash": 62, "1girl": 31, " ink ": 4}, "5_sumi": {"inkwash": 3, "river": 31}}

SD_SCRIPTS = {  # as sd-scripts writes them, each value a string
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_num_train_images": "62",
    "ss_num_epochs": "20",
    "ss_epoch": "12",
    "ss_steps": "1860",
    "ss_max_train_steps": "3100",
    "ss_resolution": "(1024, 768)",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
    "ss_learning_rate": "0.0001",
    "ss_tag_frequency": json.dumps(FREQUENCY),
    "modelspec.thumbnail": "data:image/jpeg;base64," + base64.b64encode(bytes(1000)).decode(),
}


def test_what_sd_scripts_writes() -> None:
    assert read_training(SD_SCRIPTS) == Training(
        base_model="sd_xl_base_1.0.safetensors",
        images=62,
        epochs=12,
        steps=1860,
        resolution="1024x768",
        optimizer="AdamW8bit",
        learning_rate=1e-4,
        tags=(("inkwash", 65), ("1girl", 31), ("river", 31), ("ink", 4)),
        thumbnail_nbytes=1000,
    )
    assert trigger_words(SD_SCRIPTS) == ("inkwash style", "sumi")


def test_what_modelspec_says_comes_first() -> None:
    own = {
        "modelspec.trigger_phrase": "my ink",
        "modelspec.resolution": "512x640",
        "modelspec.architecture": "flux-1-dev",
    }
    found = read_training({"ss_resolution": "1024", "ss_sd_model_name": "None", **own})
    assert found and (found.resolution, found.base_model) == ("512x640", "flux-1-dev")
    assert trigger_words({**SD_SCRIPTS, **own}) == ("my ink",)


@pytest.mark.parametrize(
    ("families", "text", "known"),
    [
        *(
            ([family], text, False)
            for family in ("flux", "wan", "sd3")
            for text in ("sd_1.5", "sdxl_base_v1-0", "sd_v2")
        ),
        *((each, "sd_1.5", True) for each in (["sd1"], ["sd2"], ["sdxl"], ["flux", "sdxl"], [])),
        *((each, "flux1", True) for each in (["flux"], ["chroma"], ["sd1"], [])),
        (["sd3"], "sd3-m", True),
        (["flux", "chroma"], "stable-diffusion-v1/lora", False),
    ],
)
def test_an_architecture_that_the_names_contradict_is_ignored(families: list[str], text: str, known: bool) -> None:
    """ai-toolkit writes sd_1.5 into files of Flux."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        found = read_training({key: text, "ss_steps": "3"}, families)
        assert found and found.base_model == (text if known else None) and found.steps == 3
    both = {"ss_base_model_version": text, "modelspec.architecture": "mine"}
    assert read_training(both, families) == Training(base_model=text if known else "mine")
    named = read_training({**both, "ss_sd_model_name": "sd_v1.safetensors"}, families)
    assert named and named.base_model == "sd_v1.safetensors"  # a file's name, which anybody chooses


SAID = {
    "ss_resolution": [("512", "512x512"), ("512,768", "512x768"), ("(1024, 1024)", "1024x1024"), ("big", None)],
    "ss_optimizer": [
        ("AdamW", "AdamW"),
        ("transformers.optimization.Adafactor(scale=False)", "Adafactor"),
        ("()", None),
    ],
    "ss_learning_rate": [("1e-4", 1e-4), ("5e-05", 5e-5), ("1", 1.0), ("nan", None), ("-1", None), ("1e999", None)],
    "ss_steps": [("0", 0), ("12", 12), ("-1", None), ("1.5", None), ("9" * 5000, None), ("١٢", None)],
    "ss_sd_model_name": [("a", "a"), ("None", None), ("", None), ("  ", None)],
    "modelspec.thumbnail": [("data:image/png;base64,AAAA", 3), ("data:text/html,x", None), ("AAAA", None)],
}

FIELDS = {
    "ss_resolution": "resolution",
    "ss_optimizer": "optimizer",
    "ss_learning_rate": "learning_rate",
    "ss_steps": "steps",
    "ss_sd_model_name": "base_model",
    "modelspec.thumbnail": "thumbnail_nbytes",
}


@pytest.mark.parametrize("key", SAID)
def test_values_that_are_read(key: str) -> None:
    for text, value in SAID[key]:
        found = read_training({key: text})
        assert (found and getattr(found, FIELDS[key])) == value, text
        assert found is not None or value is None


HOSTILE = [
    "",
    "null",
    "[]",
    "{",
    "{}",
    '{"a": 1}',
    '{"a": [1]}',
    '{"a": {"b": "c", "d": null, "e": true, "f": 1.5, "g": -3, "h": 1e400}}',
    '{"a": {"b": ' + "9" * 5000 + "}}",
    "[" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    '{"a": {"b": 1}, "a": {"b": NaN}}',
    '{"' + "x" * 10_000_000 + '": {"b": 1}}',
    '{"": {"": 3}, "10_": {" ": 3}}',
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_tags_of_anybody(text: str) -> None:
    """None of them is believed, and none costs more than its length."""
    found = read_training({"ss_tag_frequency": text})
    assert found is None or found.tags == ()
    assert all(word == "a" for word in trigger_words({"ss_tag_frequency": text}))
    assert common_metadata([{"ss_tag_frequency": text}, SD_SCRIPTS])


def test_no_metadata() -> None:
    assert read_training({}) is None and trigger_words({}) == ()


def test_what_several_say() -> None:
    a = {
        "ss_sd_model_name": "x",
        "ss_seed": "1",
        "ss_tag_frequency": '{"1_a": {"t": 2}}',
        "modelspec.trigger_phrase": "a",
    }
    b = {"ss_sd_model_name": "x", "ss_seed": "2", "ss_tag_frequency": '{"1_a": {"t": 3}, "2_b": {"u": 1}}'}
    b |= {"modelspec.trigger_phrase": "b", "ss_resolution": "512"}
    common, differing = common_metadata([a, b, a])
    assert differing == ("ss_seed",)
    assert json.loads(common.pop("ss_tag_frequency")) == {"1_a": {"t": 7}, "2_b": {"u": 1}}
    assert common == {"ss_sd_model_name": "x", "ss_resolution": "512", "modelspec.trigger_phrase": "a, b"}
    assert common_metadata([a]) == (a, ())


def test_what_stays_true_of_other_factors() -> None:
    hashes = {"sshs_model_hash": "0", "sshs_legacy_hash": "0", "modelspec.hash_sha256": "0", "modelspec.hash_md5": "0"}
    of_factors = {"ss_network_dim": "8", "ss_network_alpha": "4", "lora_adapter_metadata": "{}"}
    of_network = {"ss_network_module": "networks.lora", "ss_network_args": '{"conv_dim": "4"}'}
    kept = {"ss_seed": "1", "modelspec.title": "x", "other": "y"}
    every = {**hashes, **of_factors, **of_network, **kept}
    assert former_metadata(every, new_ranks=False) == {**of_network, **kept}
    assert former_metadata(every, new_ranks=True) == {"ss_network_module": "networks.lora", **kept}
    lycoris = {**every, "ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}'}
    assert former_metadata(lycoris, new_ranks=False) == kept
