# Exported from book/optimizer.md: edit the chapter, not this file.
"""The anatomy of an optimizer: one `step`, into which update rules and gradient transforms plug.

Derived in the chapter "The anatomy of an optimizer"; the interface is that of torch.optim.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from agrlib.checkpoint import RecordedOptimizer, keep_step_outside_graphs
from agrlib.checks import (
    COMMON,
    Group,
    check_betas,
    check_decay,
    check_options,
    check_types,
    check_way,
    numbers_of,
    try_options,
    with_numbers,
)
from agrlib.compilers import refuse_devices
from agrlib.distributed import made_by_zero
from agrlib.eager import shape_gradients, update_all
from agrlib.options import complete, refuse_unknown
from agrlib.plan import Plan, keep_plan, plan_for
from agrlib.precision import seed_rounding
from agrlib.transforms import Chain, Part, check_reach, parts_of_groups


def check_group(method: "GradientMethod", group: Group) -> None:
    """Refuse options that were spoiled since they were given."""
    group["transforms"] = Chain.of(group["transforms"])  # a plain list may have been put there
    check_reach(group["transforms"], method._made_by_zero)
    check_way(group)
    check_types(group, method.numbers)
    if any(param.grad is not None for param in group["params"]):
        try_options(method, with_numbers(group))
    seed_rounding(group)


def all_params(groups: Iterable[Group]) -> list[Tensor]:
    """Return the parameters of all groups, in their order."""
    return [param for group in groups for param in group["params"]]


def share_work(
    method: "GradientMethod", params: list[Tensor], grads: list[Tensor | None]
) -> tuple[Plan | None, list[Part]]:
    """Return what compiled kernels do in this step, and what goes the eager way."""
    plan = plan_for(method, params, grads)
    return plan, parts_of_groups(method.param_groups, grads) if plan is None else plan.rest


def words_of_scaler(method: "GradientMethod") -> tuple[Any, Any]:
    """Return what a gradient scaler tells the step: its factor, and whether it overflowed."""
    return getattr(method, "grad_scale", None), getattr(method, "found_inf", None)


def is_left_out(plan: Plan | None, rest: list[Part], found_inf: Any) -> bool:
    """Whether the step is left out: an overflow was found, and no kernel looks for it."""
    looks_itself = plan is not None and plan.on_gpu and not rest
    return found_inf is not None and not looks_itself and bool(found_inf)


def step_once(method: "GradientMethod") -> None:
    """Check all groups, transform all gradients, and only then write."""
    for group in method.param_groups:
        check_group(method, group)
    params = all_params(method.param_groups)
    grads = [param.grad for param in params]
    plan, rest = share_work(method, params, grads)
    scale, found_inf = words_of_scaler(method)
    if not is_left_out(plan, rest, found_inf):
        shaped = shape_gradients(method, rest, params, grads, scale)
        if plan is not None:
            plan.run(grads, shaped, scale, found_inf)
        update_all(method, rest, params, shaped, set() if plan is None else plan.compiled)
    keep_plan(method, plan)


def fill_in(method: "CheckedOptimizer", given: Any) -> None:
    """Check a new group with the options that it lacks; its chain becomes a `Chain`."""
    if isinstance(given, dict):  # or else torch refuses it
        group = {**method.defaults, **given}
        given["transforms"] = group["transforms"] = Chain.of(group["transforms"])
        check_reach(group["transforms"], method._made_by_zero)
        method.check(group)


@contextlib.contextmanager
def undone_on_error(groups: list[Group], given: Any) -> Iterator[None]:
    """Take back a new group, and what it was filled in with, where the block raises."""
    kept = dict(given) if isinstance(given, dict) else None
    before = len(groups)
    try:
        yield
    except BaseException:
        del groups[before:]
        if kept is not None:
            given.clear()
            given.update(kept)
        raise


class CheckedOptimizer(RecordedOptimizer):
    """What a method says of itself, and the checks of every group that it gets."""

    counts_steps = True
    number_of_betas = 2
    weight_decay_acts_on = "gradient"
    numbers: tuple[str, ...] = COMMON
    _made_by_zero = False

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        check_decay(self.weight_decay_acts_on)
        self._made_by_zero = made_by_zero()
        super().__init__(params, defaults)
        keep_step_outside_graphs(type(self))

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Return the rule and the names of the state tensors that it reads and writes.

        Parameters are written one after the other: a rule that raises leaves those before updated.
        """
        raise NotImplementedError

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]:
        """Return the rule's scalars for the given step, counted from 1, in double precision.

        Where steps are not counted, it is 1 while a state tensor is still to be made, else 2.
        """
        raise NotImplementedError

    def initial_value(self, group: Group, key: str) -> float:
        """Return the number that a state tensor is filled with before the first step."""
        return 0.0

    def check(self, group: Group) -> None:
        """Raise ValueError or RuntimeError for options that this method cannot work with."""
        check_options(group, self.numbers)
        check_betas(group, self.number_of_betas)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; its options are checked as the constructor's are.

        As in torch.optim, the dictionary becomes the group: what it lacks is filled in. One that is
        refused stays as it was.
        """
        with undone_on_error(self.param_groups, param_group):
            fill_in(self, param_group)
            super().add_param_group(param_group)
            if param_group["fused"]:
                refuse_devices(param_group["params"])
        seed_rounding(param_group)  # now, whatever is drawn before a step

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves the unscaling, and an overflow, to the step."""
        return any(group["fused"] for group in self.param_groups)


class GradientMethod(CheckedOptimizer):
    """An optimizer made of gradient transforms and one update rule; `step` is written here only.

    A subclass names its rule and state (`update_rule`), the rule's scalars (`scalars`; lr may be a
    tensor), and what its attributes say. A rule is a pure function in plain arithmetic without
    number literals, ``(grad, param, *state, *scalars) -> (param, *state)``, of real tensors with
    axes, float32 for half precision. `weight_decay_acts_on` the "gradient" (weight_decay * param is
    added), the "parameter" (lr * weight_decay * param comes off before the rule) or the "rule". A
    constructor takes what follows `defaults` as ``**options: Unpack[Options]``.

    Args:
        params: parameters, named or not, or groups of them with their own values of any options.
        defaults: the method's own options; "lr" and "weight_decay" must be among them. Each number
            may be a tensor of one element, which is read anew at every step.
        transforms: gradient transforms, applied left to right before the rule. Checkpoints record
            their names, so give different functions different names.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility with torch.optim; None or False.
        fused: None takes compiled kernels where it pays, from 65,536 parameters on; True always, or
            raises the reason why not; False runs the rule on tensors. Under `torch.amp.GradScaler`,
            True unscales or skips within the step, as torch's do: `p.grad` stays scaled.
        capturable: keep `step` on the parameter's device, so that a step never waits for it.
        differentiable: let autograd record the step.
        state_dtype: floating-point type of the state; None takes the parameter's.
        stochastic_rounding: round bfloat16 parameters stochastically, seeded by torch's seed, the
            number of groups seeded from it before, the parameter's step and its index; a group may
            hold a `rounding_seed` of its own.

    Raises:
        ValueError: a hyperparameter is negative, NaN, infinite or out of range.
        TypeError: a transform is not callable, or `transforms` is not a list.
        RuntimeError: `foreach=True`, `fused=True` where no kernel can be made, or a transform over
            all tensors within a ZeroRedundancyOptimizer.

    Example:
        >>> class SignDescent(GradientMethod):
        ...     counts_steps = False
        ...     def update_rule(self, group):
        ...         return (lambda grad, param, lr: (param - lr * torch.sign(grad),)), ()
        ...     def scalars(self, group, lr, step):
        ...         return (lr,)
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> weight.grad = torch.tensor([0.3, -0.1])
        >>> SignDescent([weight], dict(lr=0.5, weight_decay=0.0)).step()
        >>> weight.data
        tensor([ 0.5000, -1.5000])

    Source: chapter "The anatomy of an optimizer".
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        complete(cls)
        cls.numbers = numbers_of(cls)

    @refuse_unknown
    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        *,
        transforms: Iterable[Callable[[Tensor], Tensor]] = (),
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        shared = dict(transforms=Chain.of(transforms), maximize=maximize, foreach=foreach)
        shared |= dict(fused=fused, capturable=capturable, differentiable=differentiable)
        shared |= dict(state_dtype=state_dtype, stochastic_rounding=stochastic_rounding)
        super().__init__(params, {**defaults, **shared})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters with gradients; a refusal or an error in a transform changes none.

        Args:
            closure: evaluates the model again, calls backward and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse.
            TypeError, ValueError: a transform returned no tensor, or one of another shape.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            step_once(self)
        return loss
