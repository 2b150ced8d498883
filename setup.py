"""Build the compiled passes, which loratool can do without; the rest is in pyproject.toml.

Without a compiler the build goes on without them. With LORATOOL_NATIVE=0 it makes the wheel for all machines.
"""

import hashlib
import os
from pathlib import Path

from setuptools import Extension, setup

KERNEL, ROW = (f"loratool/numerics/passes/{name}" for name in ("kernel.c", "row.h"))
# a clone has the sources beside what was built: a change of theirs must not go with a former build
SOURCE = hashlib.sha256(Path(KERNEL).read_bytes() + Path(ROW).read_bytes()).hexdigest()[:16]
PASSES = Extension(
    "loratool.numerics.passes._native",
    [KERNEL],
    depends=[ROW],
    define_macros=[("SOURCE", f'"{SOURCE}"')],
    # kernel.c sets the processor's modes, so no operation can trap; GCC vectorizes fewer loops if one could
    extra_compile_args=["-O3", "-fno-fast-math", "-fno-trapping-math", "-fvisibility=hidden"],
    py_limited_api=True,
    optional=True,
)

if os.environ.get("LORATOOL_NATIVE") == "0":
    setup()
else:
    setup(ext_modules=[PASSES], options={"bdist_wheel": {"py_limited_api": "cp310"}})
