"""List the tables of model families, each a file with one literal `FAMILY`.

`lookup` finds a module in a table under any of its names, `detect` tells the family of modules.
"""

from __future__ import annotations

from . import (
    allegro,
    anima,
    auraflow,
    bria,
    bria_fibo,
    chroma,
    clip,
    cogvideox,
    cogview4,
    cosmos1,
    cosmos_predict2,
    ernie_image,
    flux,
    flux2,
    flux3,
    glm_image,
    gpt2,
    hidream,
    hunyuan_dit,
    hunyuan_image,
    hunyuan_video,
    hunyuan_video15,
    ideogram4,
    kandinsky5,
    krea2,
    longcat_image,
    ltx,
    ltx2,
    ltx2_connectors,
    lumina2,
    minimax_h3,
    mochi,
    omnigen,
    omnigen2,
    ovis_image,
    phi3,
    pixart,
    prx,
    qwen_image,
    qwen_image21,
    sana,
    sd1,
    sd2,
    sd3,
    sdxl,
    t5,
    wan,
    z_image,
)
from .table import ModelFamily

# Where nothing tells two families apart, the first counts.
FAMILIES: dict[str, ModelFamily] = {
    module.FAMILY.key: module.FAMILY
    for module in (
        sd1,
        sd2,
        sdxl,
        sd3,
        flux,
        chroma,
        qwen_image,
        hunyuan_video,
        hunyuan_image,
        hunyuan_video15,
        qwen_image21,
        flux2,
        flux3,
        bria,
        longcat_image,
        bria_fibo,
        ovis_image,
        wan,
        hunyuan_dit,
        z_image,
        lumina2,
        ideogram4,
        cogvideox,
        mochi,
        cogview4,
        ltx,
        ltx2,
        anima,
        cosmos_predict2,
        cosmos1,
        pixart,
        allegro,
        sana,
        glm_image,
        auraflow,
        hidream,
        krea2,
        minimax_h3,
        kandinsky5,
        ernie_image,
        omnigen,
        omnigen2,
        prx,
    )
}


ENCODERS: dict[str, ModelFamily] = {f.key: f for f in (clip.FAMILY, t5.FAMILY, ltx2_connectors.FAMILY)}


LAYOUTS: dict[str, ModelFamily] = {f.key: f for f in (phi3.FAMILY, gpt2.FAMILY)}
