"""Write pickles that would run something: every gadget, by every opcode that imports or calls, in every place."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable

CANARY = "touch canary"

# What a pickle could import -> the pickled arguments that would harm
GADGETS: dict[str, tuple[object, ...]] = {
    "os system": (CANARY,),
    "posix system": (CANARY,),
    "nt system": (CANARY,),
    "os popen": (CANARY,),
    "os execv": ("/bin/touch", ["touch", "canary"]),
    "os mkdir": ("canary",),
    "os rename": ("x.pt", "canary"),
    "subprocess call": (["touch", "canary"],),
    "subprocess Popen": (["touch", "canary"],),
    "pty spawn": (["touch", "canary"],),
    "builtins eval": ("open('canary', 'w')",),
    "builtins exec": ("open('canary', 'w')",),
    "builtins open": ("canary", "w"),
    "builtins compile": ("open('canary', 'w')", "x", "exec"),
    "builtins __import__": ("antigravity",),
    "builtins getattr": ("x", "__class__"),
    "__builtin__ eval": ("open('canary', 'w')",),
    "__builtin__ file": ("canary", "w"),
    "io open": ("canary", "w"),
    "_io FileIO": ("canary", "w"),
    "pathlib Path.touch": ("canary",),
    "shutil rmtree": (".",),
    "shutil copyfile": ("x.pt", "canary"),
    "importlib import_module": ("antigravity",),
    "runpy run_path": ("x.pt",),
    "timeit timeit": ("open('canary', 'w')",),
    "code InteractiveInterpreter": (),
    "cProfile run": ("open('canary', 'w')",),
    "ctypes CDLL": ("libc.so.6",),
    "marshal loads": (b"i\1\0\0\0",),
    "pickle loads": (b"cos\nsystem\n(S'touch canary'\ntR.",),
    "_pickle loads": (b"cos\nsystem\n(S'touch canary'\ntR.",),
    "types FunctionType": (),
    "functools partial": (),
    "operator attrgetter": ("system",),
    "operator methodcaller": ("system", CANARY),
    "webbrowser open": ("http://127.0.0.1:9/",),
    "urllib.request urlopen": ("http://127.0.0.1:9/",),
    "socket create_connection": (("127.0.0.1", 9),),
    "logging FileHandler": ("canary",),
    "torch load": ("x.pt",),
    "torch.serialization load": ("x.pt",),
    "torch.storage _load_from_bytes": (b"cos\nsystem\n(S'touch canary'\ntR.",),
    "torch.jit load": ("x.pt",),
    "torch.hub load": ("a/b", "c"),
    "torch.utils.cpp_extension load": ("canary", ["x.cpp"]),
    "torch._utils _rebuild_wrapper_subclass": (),
    "torch._tensor _rebuild_from_type": ("x", "y", (), {}),
    "numpy load": ("x.npy", None, True),
    "numpy.core.multiarray _reconstruct": (),
    "numpy._core.multiarray _reconstruct": (),
    "numpy.testing._private.utils runstring": ("open('canary', 'w')", {}),
    "collections OrderedDict.__reduce__": (),
    "copyreg _reconstructor": (),
    "copy_reg _reconstructor": (),
    "loratool.durable.disk unlink": ("x.pt",),
    "torch._C PyTorchFileReader": ("x.pt",),
    "collections.abc Callable": (),
    "": (),
    "os\nsystem x": (CANARY,),
    "torch.\x1b[31mred": (),
    "torch\u202e x": (),
}

Call = Callable[[str, str, bytes], bytes]


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def pickled(value: object, protocol: int = 2) -> bytes:
    """Return the opcodes that push a value."""
    return pickle.dumps(value, protocol)[2 if protocol >= 2 else 0 : -1]


# How an import and a call are written -> the opcodes, which leave one object
CALLS: dict[str, Call] = {
    "GLOBAL, REDUCE": lambda module, name, args: b"c%s\n%s\n" % (module.encode(), name.encode()) + args + b"R",
    "STACK_GLOBAL": lambda module, name, args: text(module) + text(name) + b"\x93" + args + b"R",
    "INST": lambda module, name, args: b"(" + args + b"i%s\n%s\n" % (module.encode(), name.encode()),
    "OBJ": lambda module, name, args: b"(c%s\n%s\n" % (module.encode(), name.encode()) + args + b"o",
    "NEWOBJ": lambda module, name, args: b"c%s\n%s\n" % (module.encode(), name.encode()) + args + b"\x81",
    "NEWOBJ_EX": lambda module, name, args: text(module) + text(name) + b"\x93" + args + b"}\x92",
    "BUILD": lambda module, name, args: b"c%s\n%s\n" % (module.encode(), name.encode()) + args + b"b",
    "BUILD of a dict": lambda module, name, args: (
        b"}" + text("__setstate__") + b"c%s\n%s\n" % (module.encode(), name.encode()) + b"sb0" + args
    ),
    "memo": lambda module, name, args: b"c%s\n%s\nq\x05" % (module.encode(), name.encode()) + b"0h\x05" + args + b"R",
    "EXT": lambda module, name, args: b"\x82\x01" + args + b"R",
    "PERSID": lambda module, name, args: b"P%s.%s\n" % (module.encode(), name.encode().replace(b"\n", b"")),
    "BINPERSID": lambda module, name, args: b"c%s\n%s\n" % (module.encode(), name.encode()) + args + b"\x86Q",
    "OrderedDict of calls": lambda module, name, args: (
        b"ccollections\nOrderedDict\n]]c%s\n%s\n" % (module.encode(), name.encode()) + args + b"Raa\x85R"
    ),
    "NEXT_BUFFER": lambda module, name, args: b"\x97c%s\n%s\n" % (module.encode(), name.encode()) + args + b"R",
}
# Where the object stands -> the pickle around it
PLACES: dict[str, Callable[[bytes], bytes]] = {
    "top": lambda made: b"\x80\x02" + made + b".",
    "value": lambda made: b"\x80\x02}" + text("w") + made + b"s.",
    "key": lambda made: b"\x80\x02}" + made + b"K\1s.",
    "dropped": lambda made: b"\x80\x02" + made + b"0}.",
    "behind": lambda made: b"\x80\x02}." + made + b".",
    "frame": lambda made: b"\x80\x04\x95" + struct.pack("<Q", len(made) + 1) + made + b".",
    "protocol 0": lambda made: b"(dp0\n" + made + b"0.",
    "in a storage": lambda made: b"\x80\x02}(" + text("storage") + made + text("0") + text("cpu") + b"K\1tQ0.",
}


def as_zip(data: bytes, others: dict[str, bytes] | None = None) -> bytes:
    """Return the zip that torch.save writes around a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **(others or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def as_legacy(data: bytes) -> bytes:
    """Return the layout before torch 1.6 around a pickle: three pickles before it, and one behind it."""
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, sizes)]
    return b"".join([*parts, data, pickle.dumps([], 2)])


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {"zip": as_zip, "legacy": as_legacy, "raw": lambda data: data}
