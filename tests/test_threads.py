"""Processes and threads: steps work wherever those of torch.optim do."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import agrlib

SETUP = """
import os, signal, sys, threading, torch
import agrlib
from agrlib import threads

def make(seed=0, fused=True, sizes=((300, 300), (70_000,))):
    rng = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(size, generator=rng)) for size in sizes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng)
    return params, agrlib.AdamW(params, lr=0.1, transforms=[agrlib.agr], fused=fused)

def train(seed, steps, fused=True):
    params, optimizer = make(seed, fused)
    for _ in range(steps):
        optimizer.step()
    return params

def alike(ones, others):
    return all(torch.equal(a, b) for a, b in zip(ones, others))

def in_child(work):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writer, repr(work()).encode())
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return status, os.read(reader, 1000).decode()
"""
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def run_python(script, **environment):
    """Run a script in a process of its own; return what it printed, line by line."""
    command = [sys.executable, "-c", SETUP + textwrap.dedent(script)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


FORKS = """
    torch.set_num_threads(1)  # torch's own threads hang in a child that forgets this
    torch.get_num_threads = lambda: 2
    expected = train(0, 5)
    def child():
        started = len(threading.enumerate())
        same = alike(train(0, 5), expected)
        return same, started, len(threading.enumerate())
    for _ in range(2):
        print(*in_child(child))
    print(in_child(lambda: in_child(child)))  # and in a child's child
    print(alike(train(0, 5), expected))
"""


@forks
def test_a_forked_process_makes_threads_of_its_own():
    first, second, third, own = run_python(FORKS)
    assert first == second == "0 (True, 1, 2)"
    assert third == """(0, "(0, '(True, 1, 2)')")"""
    assert own == "True"


USERS_FORK = """
    import numba, numpy as np
    torch.set_num_threads(1)

    @numba.njit(parallel=True)
    def total(x):
        s = 0.0
        for i in numba.prange(len(x)):
            s += x[i]
        return s

    total(np.ones(1000))  # starts numba's threads, which the child has not
    expected = train(0, 3)
    print(in_child(lambda: alike(train(0, 3), expected)))
"""


@forks
def test_a_fork_after_parallel_code_of_the_users_own():
    assert run_python(USERS_FORK) == ["(0, 'True')"]


LOADERS = """
    import numba, numpy as np
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 2

    @numba.njit(parallel=True)
    def double(x):
        out = np.empty_like(x)
        for i in numba.prange(len(x)):
            out[i] = 2 * x[i]
        return out

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, i):
            return double(np.full(100, float(i)))[0]

    train(0, 2)
    loader = torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2)
    for _ in range(2):
        print(torch.cat(list(loader)).tolist())
        train(0, 2)
"""


@forks
def test_workers_of_a_data_loader_use_numba_after_a_step():
    line = "[0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]"
    assert run_python(LOADERS) == [line, line]


THREADS = """
    torch.set_num_threads(2)
    expected = [train(seed, 30) for seed in range(4)]
    results = {}
    def work(seed):
        torch.set_num_threads(2)
        results[seed] = train(seed, 30)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print([alike(results[seed], expected[seed]) for seed in range(4)])
    import numba
    try:
        print(numba.threading_layer())
    except ValueError:
        print("no threads of numba's")
"""


@pytest.mark.parametrize("layer", ["tbb", "workqueue"])
def test_threads_that_train_at_once_need_no_threading_layer(layer):
    """One of numba's layers is not there, the other would abort: none is ever loaded."""
    lines = run_python(THREADS, NUMBA_THREADING_LAYER=layer)
    assert lines == ["[True, True, True, True]", "no threads of numba's"]


WITHOUT_HELP = """
    torch.set_num_threads(2)
    expected = train(0, 5)
    def refuse(self):
        raise RuntimeError("can't start new thread")
    threads.Crew.crews.clear()
    threading.Thread.start = refuse
    print(alike(train(0, 5), expected))
    threads.Crew.crews.clear()
    threads.Crew.work = lambda self: None  # threads that end before they help
    print(alike(train(0, 5), expected))
"""


def test_a_step_needs_no_helper():
    assert run_python(WITHOUT_HELP) == ["True", "True"]


INTERRUPTS = """
    import time
    torch.set_num_threads(2)
    params, optimizer = make(sizes=[(400, 400)])
    optimizer.step()
    armed, caught, stop = [], 0, threading.Event()
    def interrupt(*_):
        if armed:  # once, or else the next one comes while the last is counted
            armed.clear()
            raise KeyboardInterrupt
    def disturb():
        while not stop.wait(0.004):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, interrupt)
    disturber = threading.Thread(target=disturb)
    disturber.start()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        try:
            armed.append(True)
            while time.monotonic() < end:
                optimizer.step()
            armed.clear()
        except KeyboardInterrupt:
            caught += 1
    armed.clear()
    stop.set()
    disturber.join()
    steps = int(optimizer.state[params[0]]["step"])
    twin, other = make(sizes=[(400, 400)])
    for _ in range(steps):
        other.step()
    print(caught > 20, steps > 20, alike(twin, params))
"""


@forks
def test_an_interrupted_step_has_been_made_or_not():
    """Parameters, state and the count of steps fit each other whenever Ctrl-C comes."""
    assert run_python(INTERRUPTS) == ["True True True"]


COMPILING = """
    import numba, time
    from numba.core.compiler_lock import global_compiler_lock
    torch.set_num_threads(1)
    train(0, 1)
    inside = threading.Event()
    def compile_something():
        with global_compiler_lock:
            inside.set()
            time.sleep(0.5)
    compiler = threading.Thread(target=compile_something)
    compiler.start()
    inside.wait()
    def child():
        param = torch.nn.Parameter(torch.ones(10))
        param.grad = torch.ones(10)
        agrlib.Adagrad([param], lr=1.0, fused=True).step()  # a kernel that is not there yet
        return param[0].item()
    print(in_child(child))
"""


@forks
def test_a_fork_waits_while_something_is_compiled():
    """Or else the child would wait for ever for a lock that nobody holds any more."""
    assert run_python(COMPILING) == ["(0, '0.0')"]


BEFORE_IT_BEGINS = """
    import time
    torch.set_num_threads(2)
    params, optimizer = make()
    optimizer.step()
    before, offer = [param.detach().clone() for param in params], threads.Crew.offer
    def interrupted(count, job):
        offer(count, job)
        raise KeyboardInterrupt
    threads.Crew.offer = interrupted
    try:
        optimizer.step()
    except KeyboardInterrupt:
        time.sleep(0.5)
        print(alike(before, params), optimizer.state[params[0]]["step"].item())
    threads.Crew.offer = offer
    optimizer.step()
    print(alike(params, train(0, 2)))
"""


def test_a_step_that_was_offered_but_never_begun_is_made_by_nobody():
    assert run_python(BEFORE_IT_BEGINS) == ["True 1.0", "True"]


class Interruption:
    """Raises before the given line that a thread runs in the library."""

    def __init__(self, line):
        self.left = line

    def trace(self, frame, event, argument):
        if not frame.f_globals.get("__name__", "").startswith("agrlib."):
            return None
        self.left -= event == "line"
        if self.left == 0 and event == "line":
            raise KeyboardInterrupt
        return self.trace

    def step(self, optimizer):
        """Return whether the step ended before that line."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            optimizer.step()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_step_interrupted_at_any_line_was_made_or_was_not(name):
    options = dict(AdamW=dict(lr=0.1), SGD=dict(lr=0.1, momentum=0.9, dampening=0.5))[name]

    def start():
        params = [torch.nn.Parameter(torch.linspace(-1, 1, size)) for size in (5, 7)]
        for param in params:
            param.grad = param.detach() ** 2 + 1
        chain = [agrlib.agr, agrlib.clip_global_norm(1.0)]
        optimizer = getattr(agrlib, name)(params, transforms=chain, fused=True, **options)
        optimizer.step()
        return params, optimizer

    twin, other = start()
    known = []
    for _ in range(4):
        known.append([param.detach().clone() for param in twin])
        other.step()
    made, line, ended = [], 0, False
    while not ended:
        params, optimizer = start()
        line += 1
        ended = Interruption(line).step(optimizer)
        done = [all(map(torch.equal, params, state)) for state in known]
        assert done in ([True, False, False, False], [False, True, False, False]), line
        made.append(done.index(True))
        optimizer.step()
        assert all(map(torch.equal, params, known[made[-1] + 1])), line
    assert line > 100 and set(made) == {0, 1}
