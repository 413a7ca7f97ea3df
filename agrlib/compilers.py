# Exported from book/compilers.md: edit the chapter, not this file.
"""From text to machine code: which compiler serves a device, and what is kept of its work.

Derived in the chapter "From text to machine code".
"""

import contextlib
import errno
import functools
import hashlib
import importlib
import inspect
import json
import linecache
import os
import stat
import sys
import time
import types
import uuid
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agrlib.arithmetic import Changed, Unsupported
from agrlib.checks import Group

WARNED: set[str] = set()


def told(error: BaseException) -> str:
    """Return an error in one line, without the names of files, so that equal causes read alike."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}".removesuffix(": ")


def warn_once(cause: str) -> None:
    """Warn of a cause, once in a process."""
    if cause not in WARNED:
        WARNED.add(cause)
        warnings.warn(cause, RuntimeWarning, stacklevel=2)


def refuse(
    group: Group,
    reason: str | Unsupported,
    cause: Exception | None = None,
    instead: str = "such parameters go the eager way",
) -> None:
    """Raise where a group demands what a kernel cannot do."""
    if group["fused"]:
        raise RuntimeError(f"fused=True: {reason}. With fused=None {instead}") from cause
    if group["fused"] is None and isinstance(reason, Changed):
        warn_once(f"{reason}. It goes the eager way")


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as in the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes_triton(device: torch.device) -> bool:
    """Whether the kernels for a device are Triton's."""
    return device.type == "cuda" or interpreting()


def compiler_for(device: torch.device) -> str:
    """Return the name of the package that makes kernels for a device."""
    return "triton" if takes_triton(device) else "numba"


@functools.cache
def import_error(name: str) -> Exception | None:
    """Return what keeps an optional package from being imported: any error, if it is broken."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return error.with_traceback(None)
    return None


def can_import(name: str) -> bool:
    """Whether an optional package is there and works."""
    return import_error(name) is None


def broken_compiler(device: torch.device) -> str | None:
    """Say why a compiler that is installed makes no kernels, or None."""
    name = compiler_for(device)
    error = import_error(name)
    if error is None:
        idle = name == "numba" and importlib.import_module("numba").config.DISABLE_JIT
        return "NUMBA_DISABLE_JIT is set, so that numba compiles nothing" if idle else None
    absent = isinstance(error, ModuleNotFoundError) and error.name == name
    return None if absent else f"{name} cannot be imported ({told(error)})"


def missing_compiler(device: torch.device) -> str | None:
    """Say why no kernel can be made for a device, or None."""
    if device.type != "cpu" and not takes_triton(device):
        return f"there are kernels for CPU and CUDA tensors, not for {device.type} tensors"
    if reason := broken_compiler(device):
        return reason
    if takes_triton(device):
        return None if can_import("triton") else "Triton is not installed: pip install triton"
    if not can_import("numba"):
        return "numba is not installed: pip install 'agrlib[cpu]'"
    return None


def refuse_devices(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where no kernel can be made for a parameter, whatever its gradient."""
    for device in dict.fromkeys(param.device for param in params):
        if reason := missing_compiler(device):
            raise RuntimeError(f"fused=True: {reason}") from import_error(compiler_for(device))


NUMBA = """
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic


@intrinsic
def pointer(typing, address, like):
    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), build
"""


def execute(text: str, name: str, path: str) -> types.ModuleType:
    """Run a generated source as a module; tracebacks and Triton find its lines without a file."""
    module = types.ModuleType(f"_agrlib_{name}")
    linecache.cache[path] = len(text), None, text.splitlines(keepends=True), path
    sys.modules[module.__name__] = module  # numba finds the functions of a cached kernel by this
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def is_own(path: Path) -> bool:
    """Whether only this user and root can write to a file or folder."""
    if not hasattr(os, "geteuid"):
        return True
    status = path.lstat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def close(path: Path) -> Path:
    """Let nobody else write to a file or folder of this user; raise OSError if it is another's."""
    if not is_own(path):
        if path.lstat().st_uid == os.geteuid():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)
        if not is_own(path):
            raise PermissionError(errno.EPERM, "it belongs to others, or they may write to it")
    return path


def cache_folder() -> Path:
    """Return the folder of generated sources; OSError or RuntimeError if there can be none."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(home if os.path.isabs(home) else Path.home() / ".cache", "agrlib")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return close(folder.resolve())


def write(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    half = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex}")
    try:
        half.write_bytes(content)
        os.replace(close(half), path)
    finally:
        half.unlink(missing_ok=True)


HOUR = 3600.0  # seconds; no file takes as long to write


def sweep(folder: Path) -> None:
    """Remove what processes that were killed have left half-written."""
    for half in folder.glob("*.tmp.*"):
        with contextlib.suppress(OSError):
            if time.time() - half.lstat().st_mtime > HOUR:
                half.unlink()


def files_of(function: Any) -> tuple[Path, list[Path]]:
    """Return the file of a compiled function's checksums, and those that numba keeps of it."""
    folder = Path(function.stats.cache_path)
    name = f"{Path(inspect.getfile(function.py_func)).stem}.{function.__name__}"
    kept = [path for path in folder.iterdir() if path.name.startswith(f"{name}-")]
    return folder / f"{name}.sums", sorted(p for p in kept if p.suffix in (".nbi", ".nbc"))


def checksums(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_intact(function: Any) -> bool:
    """Whether numba's files of a function are those that were written down, by nobody else."""
    record, files = files_of(function)
    try:
        own = all(map(is_own, (record, *files)))
        return own and json.loads(record.read_bytes()) == checksums(files)
    except (OSError, ValueError):
        return False


def discard(function: Any) -> None:
    """Remove what is kept of a function, so that it is compiled anew."""
    record, files = files_of(function)
    for path in (record, *files):
        path.unlink(missing_ok=True)


def write_down(function: Any) -> None:
    """Keep the checksums of what numba has just written."""
    for _ in range(3):
        record, files = files_of(function)
        write(record, json.dumps(checksums(map(close, files))).encode())
        if is_intact(function):
            return


def warn_of_cache(error: Exception) -> None:
    """Say that nothing can be kept; what fails after that in the same place has the same cause."""
    place = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    what = f"kernels are compiled anew in every process, because {place}/agrlib cannot be used"
    if not any(cause.startswith(what) for cause in WARNED):
        remedy = "set XDG_CACHE_HOME to a folder that you, and only you, can write to"
        warn_once(f"{what} ({told(error)}): {remedy}")


def load_kept(text: str, stem: str) -> types.ModuleType:
    """Run a source from a file beside which numba keeps what it compiles."""
    versions = [importlib.import_module(name).__version__ for name in ("numba", "llvmlite")]
    processor = importlib.import_module("llvmlite.binding").get_host_cpu_name()
    made_by = "\n".join((text, *versions, processor, sys.version))
    name = f"{stem}_{hashlib.sha256(made_by.encode()).hexdigest()[:16]}"
    folder = cache_folder()
    path = folder / f"{name}.py"
    if not path.exists() or path.read_bytes() != text.encode():
        write(path, text.encode())
    sweep(folder)
    module = execute(text, name, str(path))
    for function in vars(module).values():
        if hasattr(function, "py_func") and function.stats.cache_path is not None:
            sweep(close(Path(function.stats.cache_path)))
            if not is_intact(function):
                discard(function)
    return module


@functools.cache
def load(text: str, stem: str) -> types.ModuleType:
    """Return a generated source as a module; where the disk refuses, one that keeps nothing."""
    refusal = None
    if "cache=True" in text:
        try:
            return load_kept(text, stem)
        except Exception as error:  # no home, a folder of others, a full disk, a path too long
            refusal = error
    name = f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    module = execute(text.replace("cache=True", "cache=False"), name, f"<agrlib {name}>")
    if refusal is not None:  # by the disk: without it all is well
        warn_of_cache(refusal)
    return module


FAILED: dict[Any, str] = {}  # functions that cannot be compiled; a second attempt would be as slow


def first_call(function: Any, call: Callable[[], Any]) -> None:
    """Compile a kernel by a call with nothing to do, or load what an earlier process compiled."""
    if function in FAILED:
        raise Unsupported(FAILED[function])
    try:
        if hasattr(function, "py_func"):
            compile_numba(function, call)
        else:
            call()
    except Exception as error:
        FAILED[function] = f"a kernel cannot be compiled ({told(error)})"
        raise Unsupported(FAILED[function]) from error


def compile_numba(function: Any, call: Callable[[], Any]) -> None:
    """Make the first call of numba's function, if need be again without what is on the disk."""
    if function.signatures:
        return
    kept = function.stats.cache_path is not None
    try:
        call()
    except Exception as error:  # of a file; or the disk is full, and the function is there
        if not kept:
            raise
        with contextlib.suppress(OSError):
            discard(function)
        call()
        if isinstance(error, OSError):
            return warn_of_cache(error)
    if kept and function.stats.cache_misses:
        try:
            write_down(function)
        except OSError as error:
            warn_of_cache(error)
