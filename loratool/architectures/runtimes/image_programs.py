"""The programs that load adapters of image models, with what each applies, ignores or applies in another way.

The facts are of the versions named. `tests/commands/convert/test_image_programs.py` runs the programs whose rows say
so. `transform.for_image_program` follows the rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from .runtime import ImageRuntime

_LORA = frozenset({"lora", "tucker"})
_LYCORIS = _LORA | {"diff", "loha", "lokr", "lycoris_glora"}

_COMFYUI = frozenset(
    """auraflow chroma cosmos1 cosmos_predict2 flux hidream hunyuan_dit hunyuan_image hunyuan_video ltx lumina2 mochi
    omnigen2 pixart qwen_image sd1 sd2 sd3 sdxl wan""".split()
)

# LoKr's core, whose product has strides that its code does not expect; LoKr of a convolution of one axis; the part of
# GLoRA that is LoRA, without the other
_UNREAD = {("lokr", ".lokr_t2"): 0, ("lokr", ".lokr_w2"): 3, ("lora", ".b1.weight"): 0}

# Modules of a UNet outside of its blocks have other classes than those that the networks look for
_SGM_BLOCKS = r"(?!input_blocks\.0\.0$)(?:input_blocks|middle_block|output_blocks)\..*"
_UNET_BLOCKS = r"(?:down_blocks|mid_block|up_blocks)\..*"
_STREAMS = r"(?:double|single)_blocks\..*"

_CLIPS: Mapping[str, tuple[str, ...]] = {
    "sd1": ("text_encoder",),
    "sd2": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
}
_KOHYA_ENCODERS = {
    **_CLIPS,
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux": ("text_encoder", "text_encoder_3"),
    "chroma": ("text_encoder",),
}

# The classes of transformers that diffusers' loaders are for
_DIFFUSERS = frozenset(
    """anima auraflow bria_fibo chroma cogvideox cogview4 cosmos_predict2 ernie_image flux flux2 flux3 hidream
    hunyuan_video ideogram4 kandinsky5 krea2 ltx ltx2 lumina2 minimax_h3 mochi qwen_image qwen_image21 sana sd1 sd2 sd3
    sdxl wan z_image""".split()
)

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
            kinds=_LYCORIS | {"replace"},
            unread=_UNREAD,
            families=_COMFYUI,
            newer=True,
            # The other language models have other names there than in transformers
            components={
                **dict.fromkeys("auraflow chroma hunyuan_dit ltx mochi pixart wan".split(), ("text_encoder",)),
                **_KOHYA_ENCODERS,
                "hidream": ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"),
                "hunyuan_video": ("text_encoder_2",),
            },
        ),
        ImageRuntime(
            key="forge",
            title="Stable Diffusion WebUI Forge",
            version="dfdcbab6 (2025-06-26)",
            checked="run",
            dora="base",
            along_inputs=True,
            kinds=_LYCORIS,
            unread=_UNREAD,
            families=frozenset({"chroma", "flux", "sd1", "sd2", "sd3", "sdxl"}),
            components=_KOHYA_ENCODERS,
        ),
        ImageRuntime(
            key="invokeai",
            title="InvokeAI",
            version="6.14.2",
            checked="read",  # LoRA was run, DoRA along the inputs was not
            dora="none",  # it takes every dora_scale for magnitudes of the inputs
            along_inputs=True,
            kinds=_LORA,
            families=frozenset({"flux", "sd1", "sd2", "sdxl"}),
            components={**_CLIPS, "flux": ("text_encoder",)},
            modules={"flux": _STREAMS, "sd1": _UNET_BLOCKS, "sd2": _UNET_BLOCKS, "sdxl": _SGM_BLOCKS},
        ),
        ImageRuntime(
            key="sd-scripts",
            title="kohya's sd-scripts",
            version="48d368fa (2026-02-16)",
            checked="run",
            dora="none",
            along_inputs=False,
            kinds=frozenset({"lora"}),
            families=frozenset({"anima", "chroma", "flux", "hunyuan_image", "lumina2", "sd1", "sd2", "sd3", "sdxl"}),
            components=_KOHYA_ENCODERS,
            modules={
                "chroma": rf"{_STREAMS}|(?:img|txt)_in",
                "flux": r"(?!final_layer\.).*",
                "hunyuan_image": _STREAMS,
                "sd1": _UNET_BLOCKS,
                "sd2": _UNET_BLOCKS,
                "sdxl": _SGM_BLOCKS,
            },
        ),
        ImageRuntime(
            key="musubi",
            title="musubi-tuner",
            version="30c658c4 (2026-06-24)",
            checked="run",
            dora="none",
            along_inputs=False,
            kinds=frozenset({"lora"}),
            families=frozenset(
                """flux flux2 hunyuan_video hunyuan_video15 ideogram4 kandinsky5 krea2 qwen_image wan z_image""".split()
            ),
            modules={
                "flux": _STREAMS,
                "flux2": _STREAMS,
                "hunyuan_video": _STREAMS,
                "hunyuan_video15": r"double_blocks\..*",
                "ideogram4": r"layers\..*",
                "kandinsky5": r"(?:text|visual)_transformer_blocks\..*",
                "qwen_image": r"transformer_blocks\..*",
                "wan": r"blocks\..*",
                "z_image": r"(?:layers|noise_refiner|context_refiner)\..*",
            },
        ),
        ImageRuntime(
            key="diffusers",
            title="diffusers' load_lora_weights",
            version="0.42.1",
            checked="run",
            dora="sum",
            along_inputs=False,
            kinds=frozenset({"add", "lora"}),
            family_kinds={"flux": frozenset({"replace"})},  # norms of control adapters
            families=_DIFFUSERS,
            components={
                **_CLIPS,
                "anima": ("text_conditioner",),
                "flux": ("text_encoder",),
                "ltx2": ("connectors",),
                "sd3": ("text_encoder", "text_encoder_2"),
            },
            metadata_alpha=True,
        ),
    )
}
