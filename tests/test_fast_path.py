"""How a step comes to its kernels: checkpoints, users' functions, scalers, processes, memory."""

import copy
import gc
import io
import os
import subprocess
import sys
import textwrap
import tracemalloc
import weakref

import pytest
import torch
from contract import content, every, feed, members, step, train, twins
from fast import (
    ENTRIES,
    METHODS,
    SCENARIOS,
    SMALLER,
    Way,
    check_ran,
    compare,
    error,
    gentle,
    go,
    guard,
    happens,
    start,
    stream,
    tensors,
)

import agrlib
from agrlib import arithmetic, glance, plan, precision, program

pytest.importorskip("numba", reason="numba has no wheel for this platform")
ADAMW, SGD = ENTRIES["AdamW"], ENTRIES["SGD-heavy-ball"]
MANY = (300, 300)  # more entries than it takes for fused=None to compile
methods = pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)


# --- what happens between two steps -------------------------------------------------------------


@pytest.fixture(params=["glance", "inspect"])
def looks(request, monkeypatch):
    """A batch looks at its tensors through DLPack, or asks PyTorch about each."""
    if request.param == "glance" and glance.description() is None:
        pytest.skip("this PyTorch hands out no function that describes a tensor")
    monkeypatch.setattr(glance, "MANY", 1 if request.param == "glance" else 10**9)


@pytest.mark.parametrize("name", SCENARIOS)
@methods
@pytest.mark.usefixtures("looks")
def test_scenarios(entry, name):
    case = happens(entry, name)
    case.check(case.measure())


# --- checkpoints --------------------------------------------------------------------------------


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def build(kind, entry, params):
    if kind == "torch":
        return entry.twin(params, **gentle(entry))
    return Way(kind == "fast").optimizer(entry, params)


@pytest.mark.parametrize("pair", ["fast eager", "eager fast", "fast torch", "torch fast"])
@twins
def test_checkpoints_pass_between_the_ways_and_torch(entry, pair):
    first, second = pair.split()
    params = Way(False).parameters(torch.float64, SMALLER)
    writer = build(first, entry, params)
    grads = list(stream(writer, 8))
    train(writer, grads[:4])
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    reader = build(second, entry, copies)
    reader.load_state_dict(saved(writer.state_dict()))
    values = train(reader, grads[4:])
    reference = build("eager", entry, Way(False).parameters(torch.float64, SMALLER))
    for value, exact in zip(values, train(reference, grads), strict=True):
        assert error(value, exact) <= 1e-12
    check_ran(reader if second == "fast" else writer)


@methods
def test_a_float32_state_of_half_precision_parameters_is_kept_by_checkpoints(entry):
    def make(params):
        return Way(True).optimizer(entry, params, state_dtype=torch.float32)

    one = go(make(Way(True).parameters(torch.bfloat16, SMALLER)), 2)
    two = make([torch.nn.Parameter(param.detach().clone()) for param in members(one)])
    two.load_state_dict(saved(one.state_dict()))
    assert compare(go(two, seed=2), go(one, seed=2))["exact"]
    kept = {value.dtype for name, value in tensors(two).items() if "." in name}
    assert kept == {torch.float32}


@pytest.mark.parametrize("entry", [*METHODS, ENTRIES["Adan"]], ids=lambda entry: entry.name)
def test_the_way_may_change_between_steps(entry):
    results = []
    for ways in ([True, False, True, True, False, True], [False] * 6):
        made = entry.cls(Way(False).parameters(torch.float32, SMALLER), **gentle(entry))
        for fused, grads in zip(ways, stream(made, 6), strict=True):
            made.param_groups[0]["fused"] = fused
            made.__dict__.pop("_plan", None)
            step(made, grads)
            assert ("_plan" in made.__dict__) == fused
        results.append(made)
    measured = compare(*results)
    assert max(measured["params"], measured["state"]) <= 2e-6
    assert measured["exact"] or entry.cls is not agrlib.SGD


# --- which way is taken -------------------------------------------------------------------------


def test_none_takes_kernels_from_a_number_of_parameters_on():
    for missing in (1, 0):
        shapes = [(plan.WORTH_COMPILING - 10 - missing,), (10,)]
        made = SGD.cls(Way(False).parameters(torch.float32, shapes), **gentle(SGD))
        go(made, 1)
        assert ("_plan" in made.__dict__) == (not missing)
    check_ran(made)


def test_none_leaves_to_eager_steps_what_no_kernel_takes():
    """In one optimizer: kernels for the many, the eager way for a complex number and for gaps."""

    def make(fused):
        gaps = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
        plain = [*Way(False).parameters(torch.float32, [MANY]), gaps]
        params = plain + Way(False).parameters(torch.complex64, [(3,)])
        return go(ADAMW.cls(params, fused=fused, **gentle(ADAMW)))

    fast, eager = make(None), make(False)
    [batch] = fast.__dict__["_plan"].batches
    assert [tuple(param.shape) for param in batch.layout.params] == [MANY]
    measured = compare(fast, eager)
    assert max(measured["params"], measured["state"]) <= 2e-6


def test_a_parameter_may_change_its_group():
    results = []
    for fused in (None, False):
        params = [torch.nn.Parameter(torch.zeros(MANY)) for _ in range(3)]
        groups = [dict(params=params[:1], lr=1.0), dict(params=params[1:], lr=10.0)]
        made = agrlib.SGD(groups, fused=fused)
        for _ in range(2):
            feed(params, [torch.ones(MANY)] * 3)
            made.step()
            groups = made.param_groups
            groups[0]["params"].append(groups[1]["params"].pop(0))
        results.append([p.unique().tolist() for p in params])
    assert results[0] == results[1] == [[-2.0], [-11.0], [-20.0]]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_steps_are_counted_in_float32_whatever_the_default_is(default):
    made = []
    try:
        torch.set_default_dtype(default)
        for fused in (None, False):
            params = Way(False).parameters(torch.float32, [MANY])
            made.append(go(ADAMW.cls(params, fused=fused, **gentle(ADAMW)), 3))
    finally:
        torch.set_default_dtype(torch.float32)
    for optimizer_ in made:
        [state] = optimizer_.state.values()
        assert state["step"].dtype == torch.float32
        assert state["step"].item() == 3
    assert compare(*made)["params"] <= 2e-6


def test_a_parameter_given_twice_goes_the_eager_way():
    """Which updates it twice, one after the other; a kernel would do both at once."""

    def make(fused):
        [param] = Way(False).parameters(torch.float32, [MANY])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            return ADAMW.cls([param, param], fused=fused, **gentle(ADAMW))

    assert compare(go(make(None)), go(make(False)))["exact"]
    with pytest.raises(RuntimeError, match="given twice"):
        go(make(True), 1)


def double(grad):
    return grad.mul_(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@methods
def test_users_functions_run_eagerly_and_the_rest_of_the_chain_in_the_kernel(entry, dtype):
    chain = [agrlib.agr, double, agrlib.clip_norm(1.0)]
    results = []
    for fused in (None, False):
        params = Way(False).parameters(dtype, [MANY, (5,)])
        made = entry.cls(params, fused=fused, transforms=chain, **gentle(entry))
        results.append(guard(go(made, 1)) if fused is None else go(made, 1))
        go(made, 4, seed=2)
    check_ran(results[0])
    [batch] = results[0].__dict__["_plan"].batches
    assert batch.chain == (chain[2],)
    measured = compare(*results)
    limit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert max(measured["params"], measured["state"]) <= limit


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
@methods
def test_a_users_function_that_raises_leaves_everything_as_it_was(entry, warm):
    calls = []

    def give_up(grad):
        calls.append(grad)
        if len(calls) in (2, 6):
            raise ArithmeticError("given up")
        return grad

    params = Way(False).parameters(torch.float32, [MANY, (5,)])
    made = entry.cls(params, transforms=[give_up, agrlib.agr], **gentle(entry))
    if warm:
        calls += [None] * 2
        go(made, 1)
    [grads] = stream(made, 1, seed=2)
    feed(params, grads)
    before = content(made)
    with pytest.raises(ArithmeticError, match="given up"):
        made.step()
    assert content(made) == before
    assert bool(made.state) == warm
    made.step()
    assert content(made) != before


def test_a_step_without_gradients_changes_nothing():
    made = start(ADAMW, Way(True))
    before = copy.deepcopy(content(made))
    made.zero_grad()
    made.step()
    after = content(made)
    assert {k: v for k, v in after.items() if "grad" not in k} == {
        k: v for k, v in before.items() if "grad" not in k
    }


@pytest.mark.usefixtures("looks")
def test_a_parameter_may_get_another_shape():
    """A kernel that went by the old one would read and write what lies behind the new memory."""
    results = []
    for fused in (True, False):
        made = go(
            Way(fused).optimizer(ENTRIES["SGD"], Way(fused).parameters(torch.float32, [(9,)]))
        )
        made.param_groups[0]["params"][0].data = torch.ones(4)
        made.zero_grad()
        results.append(go(made, 2))
    assert compare(*results)["exact"]


@pytest.mark.usefixtures("looks")
def test_a_gradient_of_another_shape_is_refused():
    """As it is left behind where `data` was replaced: the kernel would read what lies behind."""
    [param] = Way(True).parameters(torch.float32, [(4,)])
    made = go(Way(True).optimizer(ENTRIES["SGD"], [param]), 1)
    param.data = torch.ones(9)
    with pytest.raises(RuntimeError, match="another shape than its parameter"):
        made.step()
    assert param.tolist() == [1.0] * 9


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
@methods
@pytest.mark.usefixtures("looks")
def test_a_sparse_gradient_is_refused_before_anything_is_written(entry, warm):
    params = Way(True).parameters(torch.float32, SMALLER)
    made = go(Way(True).optimizer(entry, params), 2 * warm)
    [grads] = stream(made, 1)
    feed(params, grads)
    params[1].grad = params[1].grad.to_sparse()
    before = content(made)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        made.step()
    assert content(made) == before


class Stranger(torch.Tensor):
    pass


def swap(tensor, **other):
    tensor.data = torch.full_like(tensor, 0.25, **other)


def first_state(optimizer):
    return next(iter(optimizer.state.values()))


DISTURBANCES = {
    "nothing": lambda o, p: None,
    "another gradient": lambda o, p: setattr(p, "grad", torch.ones_like(p)),
    "a gradient of another type": lambda o, p: swap(p.grad, dtype=torch.float64),
    "a gradient of another shape": lambda o, p: setattr(p.grad, "data", torch.ones(6, 4)),
    "a gradient with more axes": lambda o, p: setattr(p.grad, "data", torch.ones(4, 6, 1)),
    "a gradient with other strides": lambda o, p: setattr(p.grad, "data", torch.ones(6, 4).t()),
    "a gradient of another class": lambda o, p: setattr(
        p, "grad", torch.ones(4, 6).as_subclass(Stranger)
    ),
    "a sparse gradient": lambda o, p: setattr(p, "grad", torch.ones(4, 6).to_sparse()),
    "a parameter elsewhere": lambda o, p: swap(p),
    "a parameter of another shape": lambda o, p: setattr(p, "data", torch.ones(6, 4)),
    "another state": lambda o, p: first_state(o).update(exp_avg=torch.ones(4, 6)),
    "a state of another class": lambda o, p: first_state(o).update(
        exp_avg=torch.ones(4, 6).as_subclass(Stranger)
    ),
    "a state elsewhere": lambda o, p: swap(first_state(o)["exp_avg_sq"]),
    "a shared state": lambda o, p: first_state(o)["exp_avg"].share_memory_(),
    "a state of another type": lambda o, p: swap(first_state(o)["exp_avg"], dtype=torch.float64),
    "another step": lambda o, p: first_state(o).update(step=torch.tensor(7.0)),
    "a state less": lambda o, p: first_state(o).pop("exp_avg"),
    "a state more": lambda o, p: first_state(o).update(note=1),
    "a state taken out and put back": lambda o, p: first_state(o).update(
        exp_avg=first_state(o).pop("exp_avg")
    ),
    "another dictionary": lambda o, p: o.state.update({p: dict(o.state[p])}),
    "a step elsewhere": lambda o, p: swap(first_state(o)["step"]),
    "a step of another type": lambda o, p: swap(first_state(o)["step"], dtype=torch.float64),
    "a negative number": lambda o, p: setattr(
        members(o)[1], "data", torch.tensor([1 + 2j]).conj().imag
    ),
    "a state with a negative number": lambda o, p: setattr(
        o.state[members(o)[1]]["exp_avg"], "data", torch.tensor([1 + 2j]).conj().imag
    ),
    "a step of another shape": lambda o, p: setattr(first_state(o)["step"], "data", torch.ones(2)),
    "keys exchanged": lambda o, p: first_state(o).update(
        exp_avg=first_state(o)["exp_avg_sq"], exp_avg_sq=first_state(o)["exp_avg"]
    ),
    "a gradient without memory": lambda o, p: setattr(
        p, "grad", torch._efficientzerotensor((4, 6))
    ),
}


@pytest.mark.parametrize(
    "grad",
    [lambda: torch.tensor([1 + 2j]).conj().imag, lambda: torch._efficientzerotensor((1,))],
    ids=["negative", "zero"],
)
@pytest.mark.usefixtures("looks")
def test_gradients_whose_numbers_do_not_lie_in_memory(grad):
    """A kernel would read their addresses."""
    results = []
    for fused in (None, False):
        params = [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(MANY))]
        made = agrlib.SGD(params, lr=1.0, fused=fused)
        for odd in (False, True, False):
            feed(params, [torch.ones(1), torch.ones(MANY)])
            params[0].grad = grad() if odd else params[0].grad
            made.step()
        results.append(params[0].item())
    assert results[0] == results[1]
    param = torch.nn.Parameter(torch.ones(1))
    param.grad = grad()
    with pytest.raises(RuntimeError, match="do not lie in memory as they are"):
        agrlib.SGD([param], fused=True).step()
    assert param.item() == 1


def test_what_a_users_function_returns_lives_until_the_kernel_has_run():
    """Turned back to the parameter's layout, it is a copy that nobody else holds."""

    def turn(grad):
        return grad.t().contiguous().t()

    results = []
    for fused in (None, False):
        types = [torch.float32, torch.float64]
        params = [torch.nn.Parameter(torch.ones(64, 65, dtype=d)) for d in types for _ in range(40)]
        made = agrlib.SGD(params, lr=0.5, transforms=[turn], fused=fused)
        for _ in range(4):
            feed(params, [torch.full_like(p, i) for i, p in enumerate(params)])
            made.step()
        results.append([(p.min().item(), p.max().item()) for p in params])
    assert results[0] == results[1] == [(1.0 - 2 * i,) * 2 for i in range(80)]


def test_a_users_function_may_move_parameters():
    results = []
    for fused in (None, False):
        one, two = torch.nn.Parameter(torch.zeros(MANY)), torch.nn.Parameter(torch.zeros(MANY))

        def move(grad, one=one):
            one.data = one.data + 1
            return grad

        groups = [dict(params=[one]), dict(params=[two], transforms=[move])]
        made = agrlib.SGD(groups, lr=1.0, fused=fused)
        for _ in range(3):
            feed([one, two], [torch.ones(MANY)] * 2)
            made.step()
        results.append((one.unique().tolist(), two.unique().tolist()))
    assert results[0] == results[1] == ([0.0], [-3.0])


def test_a_rule_made_anew_in_each_step_keeps_nothing_alive():
    made_rules = []

    class Nested(agrlib.SGD):
        def update_rule(self, group):
            def rule(grad, param, lr):
                return (param - lr * grad,)

            rule.owner = self  # as a closure would keep it
            made_rules.append(weakref.ref(rule))
            return rule, ()

        def scalars(self, group, lr, step):
            return (lr,)

    for fused, size in ((True, 3), (False, precision.PART + 1)):
        param = torch.nn.Parameter(torch.ones(size))
        made = Nested([param], fused=fused)
        for _ in range(3):
            step(made, [torch.ones(size)])
        made = weakref.ref(made)
        gc.collect()
        assert made() is None
    assert made_rules and not any(rule() for rule in made_rules)


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=list(DISTURBANCES))
def test_a_glance_sees_what_an_inspection_sees(disturb, monkeypatch):
    if glance.description() is None:
        pytest.skip("this PyTorch hands out no function that describes a tensor")
    seen, steps = [], []
    for many in (1, 10**9):
        monkeypatch.setattr(glance, "MANY", many)
        params = Way(True).parameters(torch.float32, [(4, 6), (1,)])
        made = go(Way(True).optimizer(ADAMW, params))
        feed(params, [torch.ones_like(p) for p in params])
        made.step()
        [batch] = made.__dict__["_plan"].batches
        assert (batch.lookup.glance is not None) == (many == 1)
        disturb(made, params[0])
        grads = [param.grad for param in params]
        fits = batch.point(grads)
        now = [params, grads, *([made.state[p].get(k) for p in params] for k in batch.lookup.keys)]
        if fits:
            assert batch.lookup.addresses.tolist() == [[x.data_ptr() for x in row] for row in now]
            steps.append(batch.read_steps(batch.step_addresses, batch.steps))
        seen.append((fits, batch.steps.tolist()))
    assert seen[0] == seen[1]


@pytest.mark.usefixtures("looks")
def test_a_square_parameter_that_was_turned_in_its_place():
    """It has the object, address and shape that it had; its state is laid out as before."""
    params = Way(True).parameters(torch.float32, [(4, 4), (3,)])
    made = Way(True).optimizer(ADAMW, params)
    feed(params, [torch.ones_like(p) for p in params])
    made.step()
    with torch.no_grad():
        params[0].t_()
    with pytest.raises(RuntimeError, match="other strides than its parameter"):
        made.step()


@pytest.mark.parametrize("many", [1, 10**9])
def test_an_optimizer_that_nobody_holds_is_gone_with_its_state(many, monkeypatch):
    """Python's collector of circles comes seldom, and state is large."""
    monkeypatch.setattr(glance, "MANY", many)
    params = Way(True).parameters(torch.float32, [(4, 6), (3,)])
    made = go(Way(True).optimizer(ADAMW, params, transforms=[agrlib.agr]))
    feed(params, [torch.ones_like(p) for p in params])
    made.step()
    held = [weakref.ref(made), weakref.ref(made.state[params[0]]["exp_avg"])]
    gc.disable()
    try:
        del made
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


def test_tensors_of_other_classes_are_left_alone():
    class Own(torch.Tensor):
        pass

    param = torch.nn.Parameter(torch.ones(3).as_subclass(Own))
    param.grad = torch.ones(3)
    made = ADAMW.cls([param], fused=True, **gentle(ADAMW))
    with pytest.raises(RuntimeError, match=r"fused=True: .*class"):
        made.step()
    assert param.tolist() == [1.0] * 3


# --- gradient scaling ---------------------------------------------------------------------------


def scaled(entry, fused, scale, clip=None, bad=None):
    """Three steps through a GradScaler; one of them, perhaps, has an infinite gradient."""
    params = Way(False).parameters(torch.float32, SMALLER)
    made = entry.cls(params, fused=fused, **gentle(entry))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale is not None)
    for t, grads in enumerate(stream(made, 3)):
        loss = sum((p * g).sum() for p, g in zip(params, grads, strict=True))
        made.zero_grad()
        scaler.scale(loss).backward()
        if t == bad:
            params[0].grad[0] = torch.inf
        if clip:
            scaler.unscale_(made)
            torch.nn.utils.clip_grad_norm_(params, clip)
        given, before = [p.grad.clone() for p in params], content(made)
        scaler.step(made)
        divided = 1.0 if fused or clip else 1 / scaler.get_scale()  # by the scaler itself
        for param, grad in zip(params, given, strict=True):
            assert torch.equal(param.grad, grad * divided)
            param.grad = grad
        assert (content(made) == before) == (t == bad)
        scaler.update()
    return made


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fused", [True, False])
@methods
def test_a_gradient_scaler_changes_nothing(entry, fused, clip):
    """A power of two costs no rounding; `scaled` checks that no step writes to a gradient."""
    measured = compare(scaled(entry, fused, 2.0**12, clip), scaled(entry, fused, None, clip))
    assert measured["exact"]


@pytest.mark.parametrize("fused", [True, False])
@methods
def test_an_infinite_gradient_under_a_scaler_changes_nothing_at_all(entry, fused):
    made = scaled(entry, fused, 2.0**12, bad=1)
    steps = {value.item() for name, value in tensors(made).items() if name.endswith("step")}
    assert steps == ({2.0} if entry.cls.counts_steps else set())
    if fused:
        check_ran(made)


# --- processes and the cache --------------------------------------------------------------------

SETUP = """
import os, sys, torch
torch.set_num_threads(1)
import agrlib
def make(fused, size):
    param = torch.nn.Parameter(torch.linspace(-1, 1, size))
    param.grad = torch.linspace(1, 2, size)
    return param, agrlib.AdamW([param], lr=0.1, fused=fused)
"""


def run_python(script, **environment):
    """Run a script in a process of its own; return what it printed, line by line."""
    command = [sys.executable, "-c", SETUP + textwrap.dedent(script)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_numba_steps_are_eager_and_true_says_what_to_install():
    lines = run_python(
        """
        sys.modules["numba"] = None
        param, optimizer = make(None, 70_000)
        optimizer.step()
        print(param[0].item() != -1)
        try:
            make(True, 5)
        except RuntimeError as error:
            print(error)
        """
    )
    assert lines[0] == "True"
    assert "pip install 'agrlib[cpu]'" in lines[1]


HITS = """
    param, optimizer = make(True, 5)
    optimizer.step()
    stats = optimizer._plan.batches[0].kernel.stats
    print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), param.tolist())
"""


def test_a_second_process_loads_the_kernel_from_the_disk(tmp_path):
    [first], [second] = (run_python(HITS, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert first.startswith("0 1")
    assert second.startswith("1 0")
    assert first[4:] == second[4:]


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    [line] = run_python(HITS, XDG_CACHE_HOME=str(blocked), TMPDIR=str(tmp_path))
    assert line.startswith("0 1")
    assert list(tmp_path.iterdir()) == [blocked]


EDITED = """
    import own
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = own.Own([param], dict(lr=0.5, weight_decay=0.0), fused=True)
    optimizer.step()
    print(param.tolist())
"""
OWN = """
import agrlib

def own_rule(grad, param, lr):
    return (param {sign} lr * grad,)

class Own(agrlib.GradientMethod):
    counts_steps = False
    def update_rule(self, group):
        return own_rule, ()
    def scalars(self, group, lr, step):
        return (lr,)
"""


def test_an_edited_rule_is_compiled_anew(tmp_path):
    found = []
    for sign in "-+":
        (tmp_path / "own.py").write_text(OWN.format(sign=sign))
        places = os.pathsep.join([str(tmp_path), *sys.path])
        cache = dict(XDG_CACHE_HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
        found += run_python(EDITED, PYTHONPATH=places, **cache)
    assert found == ["[0.5, 0.5, 0.5]", "[1.5, 1.5, 1.5]"]
    assert len(list(tmp_path.glob("agrlib/own_rule_*.py"))) == 2


# --- memory -------------------------------------------------------------------------------------


def memory_of_a_step(made):
    """The most that Python and numpy, and all that torch, allocate in one step."""
    tracemalloc.start()
    with torch.profiler.profile(profile_memory=True) as profile:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        made.step()
        peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    events = profile.key_averages()
    return peak, sum(max(event.self_cpu_memory_usage, 0) for event in events)


@pytest.mark.parametrize("chain", [[], [agrlib.centralize, agrlib.agr]], ids=repr)
def test_a_fast_step_needs_no_memory_that_grows_with_the_parameters(chain):
    size = 4 * 2**20
    used = []
    for fused in (True, False):
        params = Way(fused).parameters(torch.float32, [(1024, 1024)])
        made = go(Way(fused).optimizer(ADAMW, params, transforms=chain), 2)
        used.append(memory_of_a_step(made))
    assert sum(used[0]) < 0.01 * size
    assert used[1][1] > size, "the profiler would see it: an eager step has temporaries"


def test_a_plan_is_kept_from_step_to_step_and_remade_when_it_does_not_fit():
    made = start(ADAMW, Way(True))
    plan = made.__dict__["_plan"]
    go(made, 2)
    assert made.__dict__["_plan"] is plan
    made.param_groups[0]["transforms"] = [agrlib.agr]
    go(made, 1)
    assert made.__dict__["_plan"] is not plan


# --- what is refused ----------------------------------------------------------------------------


def literal(grad, param, lr):
    return (param - lr * grad * 0.5,)


def method(rule):
    class Method(agrlib.GradientMethod):
        counts_steps = False

        def update_rule(self, group):
            return rule, ()

        def scalars(self, group, lr, step):
            return (lr,)

    return Method


@pytest.mark.parametrize(
    "rule, message",
    [
        (literal, "literal holds the literal 0.5: pass it as a scalar"),
        (lambda grad, param, lr: (param - lr * grad,), "fused=True"),
    ],
    ids=["literal", "lambda"],
)
def test_rules_that_no_compiler_takes(rule, message):
    """Refused where a kernel is demanded; with fused=None the step is eager."""
    for fused in (True, None):
        [param] = params = Way(False).parameters(torch.float32, [MANY])
        made = method(rule)(params, dict(lr=0.5, weight_decay=0.0), fused=fused)
        [grads] = stream(made, 1)
        before = param.detach().clone()
        feed(params, grads)
        if fused:
            with pytest.raises(RuntimeError, match=message):
                made.step()
            assert torch.equal(param, before)
        else:
            made.step()
            assert not torch.equal(param, before)
            assert not made.__dict__["_plan"].batches


def empty(grad, param, lr):
    """Nothing."""


def hidden(grad, param, lr):
    divide = param / lr
    return (divide - grad,)


@pytest.mark.parametrize(
    "function, message",
    [(empty, "followed by one return"), (hidden, "names a variable divide")],
)
def test_functions_that_are_no_rules(function, message):
    with pytest.raises(arithmetic.Unsupported, match=message):
        arithmetic.read(function)


@every
def test_every_rule_has_a_kernel(entry):
    """None of the library's classes goes the eager way unnoticed."""
    param = torch.nn.Parameter(torch.ones(3))
    made = entry.cls([param], fused=True, **entry.kwargs)
    recipe = program.recipe_of(made, made.param_groups[0])
    assert recipe.eager == ()
