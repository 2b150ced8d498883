"""Read facts on training from the metadata of an image adapter's file: untrusted text that anybody can have written.

`ss_*` are the keys of sd-scripts (`library/train_util.py`, `networks/`), which most trainers use; `modelspec.*` are
those of Stability's ModelSpec 1.0. A value of another form than these define is ignored and copied unchanged.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..architectures.families import FAMILIES
from ..files.containers.safetensors_file import is_hash

MOST_JSON = 1 << 22  # longest value that is parsed, in characters; 100,000 captioned images need a quarter of it

WORDS, TAGS = 5, 5  # most words and tags that are listed

PREFIXES = ("ss_", "modelspec.")  # of the keys of image adapters

# Metadata on ranks and scales of a file's factors, which a derived file replaces
OF_FACTORS = ("ss_network_dim", "ss_network_alpha", "lora_adapter_metadata")

SD_SCRIPTS = "networks."  # begins the modules of sd-scripts itself, all of LoRA

TRAINED_BY = ("ss_network_module", "ss_network_args")  # sd-scripts' module of a network, and its arguments

# architectures of Stable Diffusion 1, 2 and XL; ai-toolkit up to 2024 wrote sd_1.5 for every other model too
# (ostris/ai-toolkit: toolkit/metadata.py)
_OF_UNETS = re.compile(r"s[ds]_?v?[12](?!\d)|sdxl|stable-diffusion-(?:v[12]|xl)", re.IGNORECASE)

_REPEATS = re.compile(r"\d+_")  # sd-scripts repeats the images of the folder `10_name` ten times


@dataclass(frozen=True)
class Training:
    """A file's facts on how its adapter was trained; None or empty if missing.

    Attributes:
        base_model: the file or the name of the model that it was trained on, else the name of its architecture.
        images, epochs, steps: the counts up to this file, if stored.
        tags: the most frequent tags of the captions, with the number of images that have them.
        thumbnail_nbytes: the size of the picture in the metadata.
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


def read_training(metadata: Mapping[str, str], families: Collection[str] = ()) -> Training | None:
    """Return the facts on training in metadata; None if there are none.

    Args:
        families: keys of FAMILIES that the names of the modules fit; an architecture that contradicts all is ignored.
    """
    training = Training(
        base_model=_text(metadata, "ss_sd_model_name") or _architecture(metadata, families),
        images=_count(metadata, "ss_num_train_images"),
        epochs=_count(metadata, "ss_epoch", "ss_num_epochs"),
        steps=_count(metadata, "ss_steps", "ss_max_train_steps"),
        resolution=_resolution(metadata),
        optimizer=_optimizer(metadata),
        learning_rate=_number(metadata, "ss_learning_rate", "ss_unet_lr"),
        tags=_frequent_tags(metadata),
        thumbnail_nbytes=_thumbnail(metadata),
    )
    return None if training == Training() else training


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the trigger phrase of a file, else the names of its folders of images; empty if it has neither."""
    if phrase := _text(metadata, "modelspec.trigger_phrase"):
        return (phrase,)
    folders = (_REPEATS.sub("", name, count=1).strip() for name in _object(metadata, "ss_tag_frequency"))
    return tuple(dict.fromkeys(filter(None, folders)))[:WORDS]


def _text(metadata: Mapping[str, str], *keys: str) -> str | None:
    """Return the first value that is not empty or "None", which sd-scripts writes for a missing argument."""
    values = (metadata.get(key, "").strip() for key in keys)
    return next((value for value in values if value not in ("", "None", "null")), None)


def _architecture(metadata: Mapping[str, str], families: Collection[str]) -> str | None:
    """Return the name of the architecture, unless it is of a UNet and no family has one."""
    texts = (_text(metadata, key) for key in ("ss_base_model_version", "modelspec.architecture"))
    has_unet = not families or any(FAMILIES[family].up_attention for family in families)
    return next((text for text in texts if text and (has_unet or not _OF_UNETS.match(text))), None)


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
    """Return a value parsed as a JSON object; empty if it is not an object, or too long for a trainer's."""
    text = metadata.get(key, "")
    if len(text) > MOST_JSON or text.count("[") + text.count("{") > 1 << 16:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _resolution(metadata: Mapping[str, str]) -> str | None:
    """Return `1024x1024` for this text, for sd-scripts' `(1024, 1024)`, and for one number."""
    sides = re.fullmatch(
        r"\(?(\d{1,6})(?:\s*[x,]\s*(\d{1,6}))?\)?", _text(metadata, "modelspec.resolution", "ss_resolution") or ""
    )
    return f"{sides[1]}x{sides[2] or sides[1]}" if sides else None


def _optimizer(metadata: Mapping[str, str]) -> str | None:
    """Return the name of the class in text like `bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)`."""
    text = _text(metadata, "ss_optimizer")
    return text.partition("(")[0].rpartition(".")[2] or None if text else None


def _frequent_tags(metadata: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    """Return the most frequent tags of all folders; equally frequent tags are ordered by name."""
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
    """Return a file's metadata that still applies to a file derived from it with factors of LoRA.

    Args:
        new_ranks: the modules have new ranks, so that the network's arguments no longer apply.
    """
    other_kind = not metadata.get("ss_network_module", SD_SCRIPTS).startswith(SD_SCRIPTS)
    gone = {*OF_FACTORS, *(TRAINED_BY if other_kind else TRAINED_BY[1:] if new_ranks else ())}
    return {key: value for key, value in metadata.items() if key not in gone and not is_hash(key)}


def about_training(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a file's metadata that applies to image adapters of every format."""
    return {key: value for key, value in metadata.items() if key.startswith(PREFIXES)}


def common_metadata(sources: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return metadata for the combination of several adapters, and the keys on which they differ.

    Trigger words and tags are the union; any other key is kept if all adapters that have it agree.
    """
    values: dict[str, list[str]] = {}
    for metadata in sources:
        for key, value in metadata.items():
            values.setdefault(key, []).append(value)
    common = {key: candidates[0] for key, candidates in values.items() if len(set(candidates)) == 1}
    differing = [key for key in values if key not in common]
    if "modelspec.trigger_phrase" in differing:
        common["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(values["modelspec.trigger_phrase"]))
    if "ss_tag_frequency" in differing and (joined := _joined([_object(m, "ss_tag_frequency") for m in sources])):
        common["ss_tag_frequency"] = json.dumps(joined)
    return common, tuple(sorted(key for key in differing if key not in common))


def _joined(frequencies: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the summed counts of all tags, by folder."""
    counts: dict[str, Counter[str]] = {}
    for folders in frequencies:
        for folder, tags in folders.items():
            known = tags.items() if isinstance(tags, dict) else ()
            valid = {tag: count for tag, count in known if type(count) is int and 0 <= count < 1 << 63}
            counts.setdefault(folder, Counter()).update(valid)
    return {folder: dict(valid) for folder, valid in counts.items()}
