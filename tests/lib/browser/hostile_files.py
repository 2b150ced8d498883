"""Write a model and adapters whose names, metadata and configs try to be markup, scripts, or signs that hide others."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import factors, weights
from safetensors.torch import save_file

# parts of module paths
NAMES = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    '"><img src=x onerror=window.pwned=1>',
    "'onmouseover='window.pwned=1",
    "<svg onload=window.pwned=1>",
    "<!--<script>",
    "]]>--></style><base href=//evil.invalid>",
    "<meta http-equiv=refresh content=0;url=//evil.invalid>",
    "javascript:window.pwned=1",
    "{{7*7}}{%print(7*7)%}",
    "${window.pwned=1}",
    "&lt;b&gt;&#x3c;",
    "\u202egnirts\u2066x\u2069",
    "a\u2028b\u2029c\ufeffd\u200be",
    "a\x00b\x01c\x1b[31md\x7fe\x85f",
    "tab\there\nand\rthere",
    "=HYPERLINK(1)",
    "x" * 4000,
    "e\u0301\u0301" * 30 + "\U0001f600",
    "constructor",
    "__proto__",
]
OUT, IN = 8, 12
ONE = "<img src=x onerror=window.pwned=1>"  # a folder's name too
# page -> the command that writes it, in a folder with these files
HOSTILE_PAGES = {
    "inspect": ["inspect", ONE, "--base", "base"],
    "inspect-spectra": ["inspect", ONE, "--spectra"],
    "inspect-model": ["inspect", "base"],
    "merge": ["merge", "base", ONE, "-o", "<b>.safetensors"],
    "diff": ["diff", ONE, "two"],
    "diff-several": ["diff", ONE, "two", ONE],
    "diff-models": ["diff", "base", "tuned"],
    "extract": ["extract", "base", "tuned", "--rank", "2", "-o", "extracted"],
    "verify": ["verify", "base", ONE, "tuned"],
    "resize": ["resize", ONE, "--rank", "2", "-o", "resized"],
    "combine": ["combine", ONE, "two", "-o", "combined"],
}


def write_hostile(folder: Path) -> None:
    """Write `base/`, its adapters ONE and `two` of the same names, and `tuned/`, below a folder."""
    names = [f"model.layers.{i}.{name}" for i, name in enumerate(NAMES)]
    metadata = {"format": "pt", "</script><img src=x onerror=window.pwned=1>": "<script>window.pwned=1</script>"}
    base = {f"{name}.weight": weights(OUT, IN, seed=i) for i, name in enumerate(names)}
    for kind, change in (("base", 0.0), ("tuned", 0.1)):
        (folder / kind).mkdir(parents=True)
        moved = {name: W + change * weights(OUT, IN, seed=99) for name, W in base.items()}
        save_file(moved, folder / kind / "model.safetensors", metadata=metadata)
        config = {"model_type": NAMES[0], "architectures": [NAMES[2]], "num_hidden_layers": len(names)}
        (folder / kind / "config.json").write_text(json.dumps(config))
    for seed, kind in enumerate((ONE, "two"), start=1):
        (folder / kind).mkdir()
        tensors = {}
        for i, name in enumerate(names):
            A, B = factors(OUT, IN, 4, seed=seed * 100 + i)
            tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        save_file(tensors, folder / kind / "adapter_model.safetensors", metadata=metadata)
        config = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": names,
            "base_model_name_or_path": NAMES[1],
            "task_type": NAMES[0],
            "revision": NAMES[2],
            "layer_replication": None,
        }
        (folder / kind / "adapter_config.json").write_text(json.dumps(config))
