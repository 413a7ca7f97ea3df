"""Whatever keeps a kernel from being made or kept leaves training as it is, and is told once."""

import errno
import importlib
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import content

import agrlib
from agrlib import arithmetic, compilers, cpu

numba = pytest.importorskip("numba", reason="numba has no wheel for this platform")
ENTRIES = 70_000  # more than it takes for fused=None to compile
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def forget():
    """What a new process does not know."""
    compilers.load.cache_clear()
    compilers.import_error.cache_clear()
    compilers.WARNED.clear()
    compilers.FAILED.clear()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def make(fused=None, dtype=torch.float32, **options):
    param = torch.nn.Parameter(torch.linspace(-1, 1, ENTRIES, dtype=dtype))
    param.grad = torch.linspace(1, 2, ENTRIES, dtype=dtype)
    return agrlib.SGD([param], lr=0.1, fused=fused, **options)


def take(optimizer):
    """Step; say whether kernels took part and with which warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    plan = optimizer.__dict__.get("_plan")
    told = [str(w.message) for w in caught if w.category is RuntimeWarning]
    return bool(plan and plan.batches), told


def check(expect, told=None, optimizer=None):
    """A step is right, takes the way that is expected, and warns of the cause or of nothing."""
    optimizer = optimizer or make()
    reference = make(False)
    reference.step()
    kernel, messages = take(optimizer)
    assert kernel == (expect == "kernel")
    assert len(messages) == (told is not None), messages
    assert told is None or told in messages[0]
    values, others = (made.param_groups[0]["params"][0] for made in (optimizer, reference))
    torch.testing.assert_close(values.float(), others.float(), rtol=2e-6, atol=0)
    return optimizer


def hits():
    """Whether a new process would find a function on the disk: the one that counts steps."""
    forget()
    read_steps = compilers.load("\n\n".join((compilers.NUMBA, cpu.READ_STEPS)), "steps").read_steps
    none = np.zeros(0, np.int64), np.zeros(0, np.float32)
    compilers.first_call(read_steps, lambda: read_steps(*none))
    return sum(read_steps.stats.cache_hits.values()) > 0


# --- compilers ----------------------------------------------------------------------------------


def refuse_imports(monkeypatch, error):
    def import_module(name, package=None, real=importlib.import_module):
        if name == "numba":
            raise error
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize("kind", [AttributeError, OSError, SystemError, ImportError])
def test_a_numba_that_does_not_import(home, monkeypatch, kind):
    refuse_imports(monkeypatch, kind("a pair of versions that does not fit"))
    check("eager", "a pair of versions that does not fit")
    check("eager")  # told already
    with pytest.raises(RuntimeError, match="fused=True: numba cannot be imported") as caught:
        make(True)
    assert type(caught.value.__cause__) is kind


def test_a_numba_that_is_not_there_is_nothing_to_warn_of(home, monkeypatch):
    refuse_imports(monkeypatch, ModuleNotFoundError("No module named 'numba'", name="numba"))
    check("eager")


def test_a_numba_that_is_told_to_compile_nothing(home, monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    check("eager", "NUMBA_DISABLE_JIT")
    check("eager")
    with pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT"):
        make(True)
    monkeypatch.setattr(numba.config, "DISABLE_JIT", False)
    check("kernel")


def break_kernels(monkeypatch, spoiled=lambda program: True):
    """Let numba meet an unknown name in some kernels; return the programs that it was given."""
    given = []

    def source(program, real=cpu.cpu_source):
        given.append(program)
        text = real(program)
        return text.replace("rule(x, p", "unknown(x, p") if spoiled(program) else text

    monkeypatch.setattr(cpu, "cpu_source", source)
    return given


def test_a_kernel_that_does_not_compile(home, monkeypatch):
    break_kernels(monkeypatch)
    optimizer = check("eager", "unknown")
    assert not optimizer.__dict__["_plan"].pending
    monkeypatch.setattr(compilers, "compile_numba", None)
    check("eager")  # neither compiled again nor told again
    demanding = make(True, momentum=0.9)
    before = content(demanding)
    with pytest.raises(RuntimeError, match="fused=True: a kernel cannot be compiled") as caught:
        demanding.step()
    assert isinstance(caught.value.__cause__, arithmetic.Unsupported)
    assert content(demanding) == before


def test_what_shares_a_total_with_a_kernel_that_failed_goes_the_eager_way_too(home, monkeypatch):
    break_kernels(monkeypatch, lambda program: program.wide == "float64")
    results = []
    for fused in (None, False):
        params = [
            make(dtype=d).param_groups[0]["params"][0] for d in (torch.float32, torch.float64)
        ]
        groups = [dict(params=[param]) for param in params]
        optimizer = agrlib.SGD(groups, 0.1, fused=fused, transforms=[agrlib.clip_global_norm(1.0)])
        kernel, messages = take(optimizer)
        assert not kernel and len(messages) == (fused is None)
        results.append(params)
    assert all(map(torch.equal, *results))


TRITON = """
import warnings, torch, agrlib
from agrlib import arithmetic, compilers, cpu, gpu
gpu.GPU_HEADER = gpu.GPU_HEADER.replace("tl.program_id(0)", "tl.nothing(0)")
for fused in (None, True):
    param = torch.nn.Parameter(torch.zeros(70_000))
    param.grad = torch.ones(70_000)
    optimizer = agrlib.SGD([param], lr=1.0, fused=fused, transforms=[agrlib.agr])
    with warnings.catch_warnings(record=True) as caught:
        try:
            optimizer.step()
        except RuntimeError as error:
            print(error)
    print(len(caught), param[0].item() < 0)
"""


def test_triton_kernels_are_tried_before_anything_is_written():
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    command = [sys.executable, "-c", TRITON]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    eager, refused, untouched = done.stdout.splitlines()
    assert (eager, untouched) == ("1 True", "0 False")
    assert refused.startswith("fused=True: a kernel cannot be compiled")


# --- the disk -----------------------------------------------------------------------------------


def no_home():
    raise RuntimeError("Could not determine home directory.")


def fail(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_without_a_folder_kernels_are_compiled_and_nothing_is_left(home, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(home))
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    check("kernel", "Not a directory")
    check("kernel")
    forget()
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr(Path, "home", no_home)
    check("kernel", "Could not determine home directory")
    forget()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(os, "replace", fail)
    check("kernel", "No space left on device")
    left = [path for path in home.rglob("*") if path.name not in ("file", "agrlib")]
    assert not left


def test_a_disk_that_is_full_when_numba_writes(home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(numba.core.caching.IndexDataCacheFile, "_save_data", fail)
        check("kernel", "No space left on device")
        assert {path.suffix for path in home.rglob("*") if path.is_file()} == {".py"}
    assert not hits()
    assert hits()


def disturb(path):
    """Change the machine code in the middle of a file, which numba would run."""
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 4, 3 * len(data) // 4)
    data[middle] = bytes(byte ^ 0x55 for byte in data[middle])
    path.write_bytes(data)


DAMAGE = {
    "an empty index": (".nbi", lambda path: path.write_bytes(b"")),
    "half of the code": (".nbc", lambda path: os.truncate(path, path.stat().st_size // 2)),
    "other code": (".nbc", disturb),
    "another source": (".py", lambda path: path.write_bytes(b"\xff\xfenonsense")),
    "other checksums": (".sums", lambda path: path.write_bytes(b"[")),
}


def test_damaged_files_are_replaced(home):
    assert not hits()
    for name, (suffix, spoil) in DAMAGE.items():
        for path in home.rglob(f"*{suffix}"):
            spoil(path)
        assert hits() == (suffix == ".py"), name
        assert hits(), name
    check("kernel")
    for path in home.rglob("*.nbi"):
        path.write_bytes(b"")
    forget()
    check("kernel")
    assert all(path.stat().st_size for path in home.rglob("*.nbi"))


class Planted:
    """A pickle that leaves a trace where it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def plant(home):
    """Put another index into the place of numba's, with the checksums that belong to it."""
    for path in home.rglob("*.nbi"):
        path.write_bytes(pickle.dumps(Planted(home / "trace")))
    for record in home.rglob("*.sums"):
        files = [p for p in record.parent.glob(f"{record.stem}-*") if p != record]
        record.write_text(json.dumps(compilers.checksums(sorted(files))))
    return [path for path in home.rglob("*") if path.suffix in (".nbi", ".nbc", ".sums")]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such owners and rights")
@pytest.mark.parametrize("how", ["mine", "writable", "foreign"])
def test_what_others_may_have_written_is_not_read(home, how):
    if how == "foreign" and not ROOT:
        pytest.skip("only root can give files away")
    assert not hits()
    for path in plant(home):
        if how == "writable":
            path.chmod(0o666)
        if how == "foreign":
            os.chown(path, 12345, 12345)
    assert not hits()
    assert (home / "trace").exists() == (how == "mine")  # of this user's own files nothing protects
    assert hits()


@pytest.mark.skipif(not ROOT, reason="only root can give folders away")
def test_a_folder_of_somebody_else_is_left_alone(home):
    (home / "agrlib").mkdir()
    os.chown(home / "agrlib", 12345, 12345)
    check("kernel", "it belongs to others")
    assert not list((home / "agrlib").iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such rights")
def test_whatever_the_umask_nobody_else_may_write(home):
    old = os.umask(0)
    try:
        assert not hits()
        made = [path for path in home.rglob("*") if path.suffix != ".py"]
        assert len(made) > 3 and all(map(compilers.is_own, made))
        assert (home / "agrlib").stat().st_mode & 0o777 == 0o700
        (home / "agrlib").chmod(0o777)
        assert hits()
        assert (home / "agrlib").stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(old)


def test_numbas_own_setting_moves_its_files(home, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(home / "numba"))
    assert not hits()
    assert hits()
    assert list((home / "numba").rglob("*.nbi")) and not list((home / "agrlib").rglob("*.nbi"))


def test_what_killed_processes_left_is_removed(home):
    assert not hits()
    [index] = home.rglob("*.nbi")
    old, new = (index.with_name(f"{index.name}.tmp.{name}") for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 2 * compilers.HOUR,) * 2)
    assert hits()
    assert new.exists() and not old.exists()


# --- defaults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_device_and_type_change_nothing(dtype):
    results = []
    for device, default in (("cpu", torch.float32), ("meta", torch.float64)):
        options = dict(stochastic_rounding=dtype == torch.bfloat16, fused=True)
        param = torch.nn.Parameter(torch.linspace(-1, 1, 50, dtype=dtype))
        param.grad = torch.ones_like(param)
        groups = [dict(params=[param], rounding_seed=3)]
        optimizer = agrlib.AdamW(groups, **options, transforms=[agrlib.agr])
        try:
            torch.set_default_dtype(default)
            with torch.device(device):
                optimizer.step()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([param.detach(), *optimizer.state[param].values()])
    assert all(map(torch.equal, *results))
