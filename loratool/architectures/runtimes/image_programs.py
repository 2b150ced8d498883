"""The programs that load adapters of image models, with what each applies, ignores or applies in another way.

The facts are of the versions named; `checked` says how they are known. `transform.for_image_program` follows the rows.
"""

from __future__ import annotations

from .runtime import ImageRuntime

IMAGE_RUNTIMES: dict[str, ImageRuntime] = {
    each.key: each
    for each in (
        ImageRuntime(
            key="comfyui",
            title="ComfyUI",
            version="a125cd84 (2025-10-12)",
            checked="run",
            dora="base",
            along_inputs=True,
            metadata_alpha=False,
        ),
    )
}
