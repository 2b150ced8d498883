"""Build the compiled passes, which loratool can do without; the rest is in pyproject.toml.

Without a compiler the build goes on without them. With LORATOOL_NATIVE=0 it makes the wheel for all machines.
"""

import os

from setuptools import Extension, setup

FOLDER = "loratool/numerics/passes"
PASSES = Extension(
    "loratool.numerics.passes._native",
    [f"{FOLDER}/kernel.c"],
    depends=[f"{FOLDER}/row.h"],
    # kernel.c sets the processor's modes, so no operation can trap; GCC vectorizes fewer loops if one could
    extra_compile_args=["-O3", "-fno-fast-math", "-fno-trapping-math", "-fvisibility=hidden"],
    py_limited_api=True,
    optional=True,
)

if os.environ.get("LORATOOL_NATIVE") == "0":
    setup()
else:
    setup(ext_modules=[PASSES], options={"bdist_wheel": {"py_limited_api": "cp310"}})
