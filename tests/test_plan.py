"""What a plan knows: each parameter's way and why, when that ends, and what an error leaves."""

import sys

import pytest
import torch
from test_floors import FLOORS

import agrlib
from agrlib import compilers
from agrlib.plan import explain

pytestmark = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group")
numba = pytest.mark.skipif(not compilers.can_import("numba"), reason="needs numba")


def with_grads(*tensors):
    params = [torch.nn.Parameter(tensor) for tensor in tensors]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def large(**options):
    return torch.zeros(300, 300, **options)


def gaps():
    return torch.zeros(10, 20)[:, ::2]


def mine(grad):
    return grad / 2


def ways(params, **options):
    """What is said of each parameter after a step, without its name."""
    optimizer = agrlib.SGD(params, lr=0.1, **options)
    optimizer.step()
    lines = explain(optimizer)
    assert len(lines) == sum(len(group["params"]) for group in optimizer.param_groups)
    return [line.split("): ", 1)[1] for line in lines]


CLIP = agrlib.clip_global_norm(1.0)
SHARED = "eager, because clip_global_norm(1.0) also covers tensors that no kernel takes"
GAPS = "eager, because it is not contiguous: strides (20, 2)"
ROWS = "the rows of the parameter, which a transform sums, are not contiguous: strides (1, 300)"
FEW = "eager, because kernels begin at 65,536 entries, not 100"


@numba
def test_every_parameter_has_a_way_and_a_reason():
    assert ways(with_grads(large(), gaps())) == ["kernel", GAPS]
    assert ways(with_grads(large(), gaps()), transforms=[CLIP]) == [SHARED, GAPS]
    assert ways(with_grads(large()), transforms=[agrlib.agr, mine]) == [
        "kernel, after agr, mine on tensors"
    ]
    turned = with_grads(large().t(), large())
    assert ways(turned, transforms=[agrlib.centralize]) == [f"eager, because {ROWS}", "kernel"]
    assert ways(with_grads(torch.zeros(10, 10))) == [FEW]
    assert ways(with_grads(torch.zeros(250, 250), large()[:, ::2])) == [
        FEW.replace("100", "62,500"),
        "eager, because it is not contiguous: strides (300, 2)",
    ]
    assert ways(with_grads(torch.zeros(10, 10)), fused=True) == ["kernel"]
    assert ways(with_grads(large()), fused=False) == ["eager, because fused=False"]
    [twice] = with_grads(large())
    given = "eager, because it was given twice, and a kernel updates all parameters at once"
    assert ways([twice, twice, *with_grads(large())]) == [given, given, "kernel"]
    idle, busy = with_grads(large(), large())
    idle.grad = None
    assert ways([idle, busy]) == ["no gradient", "kernel"]
    off = dict(params=with_grads(large()), fused=False)
    assert ways([off, dict(params=with_grads(large()))]) == ["eager, because fused=False", "kernel"]
    recorded = large().requires_grad_().clone()
    recorded.grad = large()
    assert ways([recorded], differentiable=True) == ["eager, because differentiable=True"]
    assert explain(agrlib.SGD(with_grads(large()), lr=0.1)) == [
        "group 0, parameter 0, (300, 300): not known before the first step has ended"
    ]


@numba
def test_a_demand_names_the_parameter_and_what_is_in_its_way():
    weight, odd = with_grads(large(), large())
    odd.grad = torch.ones(300, 300).t()
    groups = [dict(params=[weight]), dict(params=[weight.detach().clone().requires_grad_(), odd])]
    with pytest.raises(RuntimeError) as caught:
        agrlib.AdamW(groups, fused=True).step()
    assert str(caught.value) == (
        "fused=True: group 1, parameter 1, (300, 300): the gradient has other strides than its "
        "parameter: (1, 300), not (300, 1). With fused=None such parameters go the eager way"
    )
    assert not weight.any() and not odd.any()


@numba
def test_a_named_parameter_is_called_by_its_name():
    [odd] = with_grads(gaps())
    optimizer = agrlib.SGD([odd], lr=0.1, fused=True)
    optimizer.param_groups[0]["param_names"] = ["layer.weight"]  # as torch 2.6 and later do
    with pytest.raises(RuntimeError, match=r"fused=True: layer\.weight, \(10, 10\): it is not"):
        optimizer.step()


@numba
def test_an_odd_gradient_costs_its_parameter_the_kernel_as_long_as_it_is_odd():
    [plain, odd] = with_grads(large(), large())
    optimizer = agrlib.AdamW([plain, odd])
    plans, compiled = [], []
    for turned in (False, False, True, True, False, False):
        grad = torch.ones(300, 300)
        odd.grad = grad.t() if turned else grad
        optimizer.step()
        plans.append(optimizer._plan)
        compiled.append(sorted(optimizer._plan.compiled))
    assert compiled == [[0, 1], [0, 1], [0], [0], [0, 1], [0, 1]]
    assert [plans[i] is plans[i + 1] for i in range(5)] == [True, False, True, False, True]


class Broken(agrlib.SGD):
    """Its scalars fail, but not when they are tried before the step."""

    broken = True

    def scalars(self, group, lr, step):
        if self.broken and lr != 1.0:
            raise ArithmeticError("a schedule of one's own")
        return super().scalars(group, lr, step)


@pytest.mark.parametrize("known", [False, True], ids=["no state", "state of its own"])
@pytest.mark.parametrize("fused", [None, False])
def test_a_first_step_that_fails_late_leaves_no_state(fused, known):
    """State of zeros would make the next step of SGD the second one."""
    results = []
    for broken in (False, True):
        [weight] = with_grads(large())
        optimizer = Broken([weight], lr=0.1, momentum=0.9, dampening=0.5, fused=fused)
        if known:
            optimizer.state[weight]["note"] = "mine"
        optimizer.broken = broken
        if broken:
            with pytest.raises(ArithmeticError):
                optimizer.step()
            assert dict(optimizer.state.get(weight, {})) == (dict(note="mine") if known else {})
        optimizer.broken = False
        optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)


ORDER = {name: i for i, name in enumerate(" ".join(FLOORS).split())}
CALLED_BACK = {  # which module may call whom on a higher floor
    "checks": {"update_rule", "scalars"},
    "plan": {"update_rule", "initial_value"},
    "program": {"update_rule", "scalars"},
    "batch": {"scalars", "place"},
    "compilers": {"<lambda>", "compile"},
    "eager": {"update_rule", "scalars", "initial_value", "adam"},
    "transforms": {"magnitude", "nonzero_total", "agr"},
}


def module_of(frame):
    package, _, name = frame.f_globals.get("__name__", "").partition(".")
    return name if package == "agrlib" and name in ORDER else None


class Calls:
    """Notes each call of a function of the library by one of a lower floor."""

    def __init__(self):
        self.found = set()

    def __call__(self, frame, event, argument):
        if event != "call" or (callee := module_of(frame)) is None:
            return
        caller = frame.f_back
        while caller is not None and module_of(caller) is None:
            caller = caller.f_back
        if caller is not None and ORDER[callee] > ORDER[module_of(caller)]:
            self.found.add((module_of(caller), frame.f_code.co_name))

    def during(self, step):
        before = sys.getprofile()
        sys.setprofile(self)
        try:
            step()
        finally:
            sys.setprofile(before)
        return self.found


@numba
def test_a_step_goes_down_the_floors():
    """Up go only questions to the optimizer, its functions, and what a batch leaves open."""
    params = with_grads(*(torch.zeros(60, 60) for _ in range(40)), gaps())
    optimizer = agrlib.AdamW(params, transforms=[agrlib.agr])
    found = Calls().during(optimizer.step)
    for param in params:
        param.grad = torch.ones_like(param)
    later = Calls().during(optimizer.step)
    assert ("batch", "place") in later <= found
    assert [pair for pair in found if pair[1] not in CALLED_BACK.get(pair[0], ())] == []
