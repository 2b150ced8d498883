"""Read what the metadata of an image adapter's file says of its training: text that anybody can have written.

`ss_*` are the keys of sd-scripts (`library/train_util.py`, `networks/`), which most trainers write too; `modelspec.*`
those of Stability's ModelSpec 1.0. A value that is not as these define it is passed over, and stays as it is.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files.containers.safetensors_file import is_hash

MOST_JSON = 1 << 22  # characters of a value that are parsed: a training on 100,000 captioned images has a quarter

WORDS, TAGS = 5, 5  # that are listed

PREFIXES = ("ss_", "modelspec.")  # of the keys of image adapters

# Metadata on a file's factors, their ranks and scales, which a file that is made of it says anew
OF_FACTORS = ("ss_network_dim", "ss_network_alpha", "lora_adapter_metadata")

SD_SCRIPTS = "networks."  # begins the modules of sd-scripts itself, all of LoRA

TRAINED_BY = ("ss_network_module", "ss_network_args")  # sd-scripts' module of a network, and what it was given

_REPEATS = re.compile(r"\d+_")  # sd-scripts repeats the images of the folder `10_name` ten times


@dataclass(frozen=True)
class Training:
    """Hold what a file says of how its adapter was trained; None, or empty, where it does not.

    Attributes:
        base_model: the file or the name of the model that it was trained on, else the name of its architecture.
        images, epochs, steps: of this file's state of the training, where it says that.
        tags: the most frequent tags of the captions, with the number of images that have them.
        thumbnail_nbytes: of the picture that stands in the metadata.
    """

    base_model: str | None = None
    images: int | None = None
    epochs: int | None = None
    steps: int | None = None
    resolution: str | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    tags: tuple[tuple[str, int], ...] = ()
    thumbnail_nbytes: int | None = None


def read_training(metadata: Mapping[str, str]) -> Training | None:
    """Return what metadata says of a training; None if nothing."""
    found = Training(
        base_model=_text(metadata, "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"),
        images=_count(metadata, "ss_num_train_images"),
        epochs=_count(metadata, "ss_epoch", "ss_num_epochs"),
        steps=_count(metadata, "ss_steps", "ss_max_train_steps"),
        resolution=_resolution(metadata),
        optimizer=_optimizer(metadata),
        learning_rate=_number(metadata, "ss_learning_rate", "ss_unet_lr"),
        tags=_frequent_tags(metadata),
        thumbnail_nbytes=_thumbnail(metadata),
    )
    return None if found == Training() else found


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the phrase that a file gives, else the names of its folders of images; empty if it has neither."""
    if phrase := _text(metadata, "modelspec.trigger_phrase"):
        return (phrase,)
    folders = (_REPEATS.sub("", name, count=1).strip() for name in _object(metadata, "ss_tag_frequency"))
    return tuple(dict.fromkeys(filter(None, folders)))[:WORDS]


def _text(metadata: Mapping[str, str], *keys: str) -> str | None:
    """Return the first value that says something: sd-scripts writes None for what was not given."""
    values = (metadata.get(key, "").strip() for key in keys)
    return next((value for value in values if value not in ("", "None", "null")), None)


def _count(metadata: Mapping[str, str], *keys: str) -> int | None:
    texts = (metadata.get(key, "").strip() for key in keys)
    return next((int(text) for text in texts if re.fullmatch(r"[0-9]{1,18}", text)), None)


def _number(metadata: Mapping[str, str], *keys: str) -> float | None:
    for key in keys:
        text = metadata.get(key, "").strip()
        if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,60})?(e[-+]?[0-9]{1,2})?", text):
            return float(text)
    return None


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the JSON object that a value is; empty if it is none, or too long to be one of a trainer."""
    text = metadata.get(key, "")
    if len(text) > MOST_JSON or text.count("[") + text.count("{") > 1 << 16:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _resolution(metadata: Mapping[str, str]) -> str | None:
    """Return `1024x1024`, of this and of sd-scripts' `(1024, 1024)`, or of one number."""
    sides = re.fullmatch(
        r"\(?(\d{1,6})(?:\s*[x,]\s*(\d{1,6}))?\)?", _text(metadata, "modelspec.resolution", "ss_resolution") or ""
    )
    return f"{sides[1]}x{sides[2] or sides[1]}" if sides else None


def _optimizer(metadata: Mapping[str, str]) -> str | None:
    """Return the name of the class, of `bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)`."""
    text = _text(metadata, "ss_optimizer")
    return text.partition("(")[0].rpartition(".")[2] or None if text else None


def _frequent_tags(metadata: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    """Return the most frequent tags of all folders; of equally frequent ones the first by name."""
    counts: Counter[str] = Counter()
    for tags in _object(metadata, "ss_tag_frequency").values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int and 0 < count < 1 << 63 and tag.strip():
                counts[tag.strip()] += count
    return tuple(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:TAGS])


def _thumbnail(metadata: Mapping[str, str]) -> int | None:
    head, comma, data = metadata.get("modelspec.thumbnail", "").partition(",")
    if not (comma and re.fullmatch(r"data:image/[\w.+-]{1,40};base64", head.strip())):
        return None
    try:
        return len(base64.b64decode(data, validate=True)) or None
    except binascii.Error:
        return None


def former_metadata(metadata: Mapping[str, str], new_ranks: bool) -> dict[str, str]:
    """Return what a file's metadata says that stays true of another file made of it, whose factors are LoRA's.

    Args:
        new_ranks: whether the modules have other ranks, so that those that the network was given are others too.
    """
    other_kind = not metadata.get("ss_network_module", SD_SCRIPTS).startswith(SD_SCRIPTS)
    gone = {*OF_FACTORS, *(TRAINED_BY if other_kind else TRAINED_BY[1:] if new_ranks else ())}
    return {key: value for key, value in metadata.items() if key not in gone and not is_hash(key)}


def about_training(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a file's metadata that image adapters of every format have."""
    return {key: value for key, value in metadata.items() if key.startswith(PREFIXES)}


def common_metadata(each: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return what the metadata of several adapters says of their combination, and the keys on which they differ.

    Trigger words and tags are those of all; anything else is kept if those that say it agree.
    """
    values: dict[str, list[str]] = {}
    for metadata in each:
        for key, value in metadata.items():
            values.setdefault(key, []).append(value)
    common = {key: found[0] for key, found in values.items() if len(set(found)) == 1}
    differing = [key for key in values if key not in common]
    if "modelspec.trigger_phrase" in differing:
        common["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(values["modelspec.trigger_phrase"]))
    if "ss_tag_frequency" in differing and (joined := _joined([_object(m, "ss_tag_frequency") for m in each])):
        common["ss_tag_frequency"] = json.dumps(joined)
    return common, tuple(sorted(key for key in differing if key not in common))


def _joined(frequencies: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the sum of the counts of all tags, by folder."""
    counts: dict[str, Counter[str]] = {}
    for folders in frequencies:
        for folder, tags in folders.items():
            known = tags.items() if isinstance(tags, dict) else ()
            own = {tag: count for tag, count in known if type(count) is int and 0 <= count < 1 << 63}
            counts.setdefault(folder, Counter()).update(own)
    return {folder: dict(own) for folder, own in counts.items()}
