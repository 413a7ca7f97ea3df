# Exported from book/plan.md: edit the chapter, not this file.
"""Which parameters go through which kernel, what waits for what, and how long that holds.

Derived in the chapter "A plan for a step".
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agrlib.arithmetic import Unsupported, meaning, meanings
from agrlib.batch import Batch, Member
from agrlib.checks import Group, Method, check_tensors, with_numbers
from agrlib.compilers import broken_compiler, refuse, takes_triton, told, warn_once
from agrlib.cpu import CPUBatch
from agrlib.distributed import (
    add_totals,
    is_sharded,
    local,
    part_number,
    placements,
    places_of,
)
from agrlib.gpu import GPUBatch
from agrlib.layout import form_obstacle, is_aligned, like_param, obstacle
from agrlib.precision import first_state, state_dtype, widened
from agrlib.program import Program, Recipe, named, power_of, recipe_of, stage_of
from agrlib.transforms import FIELDS, Part, Transform, over_all, parts_of_groups


class Inventory(NamedTuple):
    """The parameters of a step, their gradients, the number of each one's group, and reasons."""

    params: list[Tensor]
    grads: list[Tensor | None]
    groups: list[int]
    reasons: dict[int, str]  # why a parameter goes the eager way

    @classmethod
    def of(cls, method: Method, grads: list[Tensor | None]) -> "Inventory":
        """List all parameters of an optimizer, in the order of its groups."""
        pairs = [(p, g) for g, group in enumerate(method.param_groups) for p in group["params"]]
        return cls([p for p, _ in pairs], grads, [g for _, g in pairs], {})

    def ready(self, g: int) -> list[int]:
        """Return the numbers of a group's parameters that have a gradient."""
        return [i for i, h in enumerate(self.groups) if h == g and self.grads[i] is not None]


def name_of(method: Method, inventory: Inventory, i: int) -> str:
    """Return what a user calls a parameter: its name or its place, and its shape."""
    g = inventory.groups[i]
    place, names = i - inventory.groups.index(g), method.param_groups[g].get("param_names")
    name = names[place] if names else f"group {g}, parameter {place}"
    return f"{name}, {tuple(inventory.params[i].shape)}"


def send_eager(method: Method, inventory: Inventory, i: int, reason: str) -> None:
    """Note why a parameter goes the eager way, and raise where its group demands a kernel."""
    inventory.reasons[i] = reason
    group = method.param_groups[inventory.groups[i]]
    if group["fused"]:
        refuse(group, f"{name_of(method, inventory, i)}: {reason}")


def recipes_of(method: Method, inventory: Inventory) -> list[Recipe | None]:
    """Return what a kernel for each group computes; None where there is none, or no gradient."""
    recipes: list[Recipe | None] = []
    for g, group in enumerate(method.param_groups):
        recipes.append(None)
        try:
            recipes[g] = recipe_of(method, group) if inventory.ready(g) else None
        except Unsupported as error:
            inventory.reasons.update(dict.fromkeys(inventory.ready(g), str(error)))
            refuse(group, error, error)
    return recipes


def reason_of(
    method: Method, group: Group, recipe: Recipe, param: Tensor, grad: Tensor
) -> str | None:
    """Say why a parameter cannot go through a kernel, or None."""
    state = method.state.get(param, {})
    tensors = {f"state {k!r}": state[k] for k in recipe.state if state.get(k) is not None}
    rows = any(f.over == "row" for f in recipe.compiled)
    return obstacle(param, tensors if recipe.eager else {"the gradient": grad, **tensors}, rows)


def candidates(method: Method, inventory: Inventory, recipes: Sequence[Recipe | None]) -> list[int]:
    """Return the numbers of the parameters for which a kernel is to be had."""
    fast, groups = [], method.param_groups
    often = Counter(map(id, inventory.params))
    for i, (param, grad, g) in enumerate(zip(*inventory[:3], strict=True)):
        recipe = recipes[g]
        if grad is None or recipe is None or groups[g]["fused"] is False:
            continue
        reason = reason_of(method, groups[g], recipe, param, grad)
        if often[id(param)] > 1:
            reason = "it was given twice, and a kernel updates all parameters at once"
        if reason is None:
            fast.append(i)
            continue
        send_eager(method, inventory, i, reason)
        if broken := broken_compiler(param.device):
            warn_once(f"steps go the eager way, because {broken}")
    return fast


WORTH_COMPILING = 2**16  # parameters; below, making a kernel takes longer than it saves


def few_of(entries: int) -> str:
    """Say that kernels do not pay."""
    return f"kernels begin at {WORTH_COMPILING:,} entries, not {entries:,}"


def worth_it(method: Method, inventory: Inventory, fast: list[int]) -> list[int]:
    """Return the candidates for which making a kernel pays, or is asked for."""
    entries = sum(inventory.params[i].numel() for i in fast)
    if entries >= WORTH_COMPILING:
        return fast
    few = few_of(entries)
    kept = [i for i in fast if method.param_groups[inventory.groups[i]]["fused"]]
    inventory.reasons.update(dict.fromkeys(set(fast) - set(kept), few))
    return kept


def totals_elsewhere(
    method: Method, inventory: Inventory, recipes: Sequence[Recipe | None], fast: Sequence[int]
) -> set[Transform]:
    """Return the transforms over all tensors that run on the eager way."""
    chosen, found = set(fast), set()
    for i, (grad, g) in enumerate(zip(inventory.grads, inventory.groups, strict=True)):
        recipe, chain = recipes[g], method.param_groups[g]["transforms"]
        if grad is not None:
            found |= over_all(recipe.eager if recipe and i in chosen else chain)
    return found


def without_conflicts(
    method: Method, inventory: Inventory, recipes: Sequence[Recipe | None], fast: list[int]
) -> list[int]:
    """Take out groups that share a total over all tensors with parameters on the eager way."""
    while True:
        eager = totals_elsewhere(method, inventory, recipes, fast)
        kept = []
        for i in fast:
            recipe = recipes[inventory.groups[i]]
            assert recipe is not None
            if shared := over_all(recipe.compiled) & eager:
                reason = f"{shared.pop()} also covers tensors that no kernel takes"
                send_eager(method, inventory, i, reason)
            else:
                kept.append(i)
        if kept == fast:
            return fast
        fast = kept


def sort_parameters(method: Method, inventory: Inventory) -> tuple[list[Recipe | None], list[int]]:
    """Return each group's recipe, and the parameters that are to go through kernels."""
    recipes = recipes_of(method, inventory)
    fast = worth_it(method, inventory, candidates(method, inventory, recipes))
    return recipes, without_conflicts(method, inventory, recipes, fast)


Pending = list[tuple[Tensor, str, Tensor]]  # state that the first run is to store


def missing_step(method: Method, group: Group, param: Tensor) -> Tensor | None:
    """Make the number of a parameter's steps where there is none that its kernel can count."""
    if not (method.counts_steps or group["stochastic_rounding"]):
        return None
    home = param.device if takes_triton(param.device) else torch.device("cpu")
    step = method.state.get(param, {}).get("step")
    if step is None:
        return torch.zeros((), dtype=torch.float32, device=home)  # whatever the default
    counted = (step.dtype, step.device) == (torch.float32, home)
    return None if counted else step.to(home, torch.float32)


def missing_state(method: Method, group: Group, recipe: Recipe, param: Tensor) -> Pending:
    """Make the state that a parameter lacks; nothing is stored."""
    state, dtype = method.state.get(param, {}), state_dtype(group, param)
    made: Pending = [
        (param, key, first_state(param, dtype, float(method.initial_value(group, key))))
        for key in recipe.state
        if state.get(key) is None
    ]
    step = missing_step(method, group, param)
    return [*made, *([] if step is None else [(param, "step", step)])]


def program_of(
    method: Method, group: Group, recipe: Recipe, param: Tensor, grad: Tensor
) -> Program:
    """Return what a kernel for a parameter computes, types included."""
    state = method.state.get(param, {})
    kinds = [param.dtype, widened(grad.dtype) if recipe.eager else grad.dtype]
    for key in recipe.state:
        known = state.get(key)
        kinds.append(state_dtype(group, param) if known is None else known.dtype)
    stochastic = bool(group["stochastic_rounding"]) and param.dtype == torch.bfloat16
    stages, acts_on = tuple(map(stage_of, recipe.compiled)), method.weight_decay_acts_on
    kept = recipe.rule, recipe.state, stages, acts_on, recipe.power
    return Program(*kept, tuple(kinds), stochastic)


def members_of(
    method: Method, inventory: Inventory, recipes: Sequence[Recipe | None], fast: Iterable[int]
) -> tuple[dict[Any, list[Member]], Pending]:
    """Put together what one kernel can update, and make the state that is missing."""
    pending: Pending = []
    found: dict[Any, list[Member]] = {}
    for i in fast:
        param, grad, g = inventory.params[i], inventory.grads[i], inventory.groups[i]
        group, recipe = method.param_groups[g], recipes[g]
        assert recipe is not None and grad is not None
        missing = missing_state(method, group, recipe, param)
        pending += missing
        new = any(key != "step" for _, key, _ in missing)
        program = program_of(method, group, recipe, param, grad)
        aligned = not takes_triton(param.device) or is_aligned(local(param), recipe.compiled)
        counts = bool(group["stochastic_rounding"])  # of any type, as the eager way does
        place = (program, recipe.compiled, bool(recipe.eager), param.device, aligned, counts)
        member = Member(param, g, i, new, i + part_number(param))
        found.setdefault(place, []).append(member)
    return found, pending


def give_up(
    method: Method, inventory: Inventory, members: Sequence[Member], error: Exception
) -> None:
    """Say why there is no kernel for some parameters."""
    reason = str(error) if isinstance(error, Unsupported) else told(error)
    inventory.reasons.update(dict.fromkeys((member.number for member in members), reason))
    for g in dict.fromkeys(member.group for member in members):
        refuse(method.param_groups[g], reason, error)
    warn_once(f"steps go the eager way, because {reason}")


def make_batches(
    method: Method, inventory: Inventory, recipes: Sequence[Recipe | None], fast: list[int]
) -> tuple[list[Batch], Pending, list[int]]:
    """Make the kernels; parameters for which that fails go the eager way."""
    while True:
        batches: list[Batch] = []
        failed: set[int] = set()
        found, pending = members_of(method, inventory, recipes, fast)
        for (program, chain, _, device, *_), members in found.items():
            kind = GPUBatch if takes_triton(device) else CPUBatch
            try:
                batches.append(kind(method, program, chain, members))
            except Exception as error:  # of a compiler, a disk, a device
                give_up(method, inventory, members, error)
                failed |= {member.number for member in members}
        if not failed:
            return batches, pending, fast
        left = [i for i in fast if i not in failed]
        fast = without_conflicts(method, inventory, recipes, left)


def needs_others(batch: Batch) -> bool:
    """Whether a total of the batch depends on other batches or on other processes."""
    return bool(batch.whole) and (batch.layout.sharded or any(f.over == "all" for f in batch.whole))


Ready = list[tuple[Batch, int]]  # totals that are summed together: a batch, and which of its sums


def ready_in(rest: Sequence[tuple[Batch, list[int]]]) -> Ready:
    """Return the totals that need no other total which is to come."""
    ready = []
    for batch, waiting in rest:
        if waiting:
            head = batch.whole[waiting[0]]
            later = (head in [b.whole[q] for q in w] and b.whole[w[0]] != head for b, w in rest)
            if head.over != "all" or not any(later):
                ready.append((batch, waiting[0]))
    return ready


def rounds_of(batches: Iterable[Batch]) -> list[Ready]:
    """Return which totals are summed together: all that need no other total that is to come."""
    rest = [(batch, list(range(len(batch.whole)))) for batch in batches]
    rounds = []
    while any(waiting for _, waiting in rest):
        ready = ready_in(rest)
        if not ready:
            raise ValueError("transforms over all tensors stand in a different order in two groups")
        for batch, waiting in rest:
            if any(batch is b for b, _ in ready):
                waiting.pop(0)
        rounds.append(ready)
    return rounds


def groups_over_all(ready: list[tuple[Batch, int]]) -> dict[Transform, list[tuple[Batch, int]]]:
    """Return, for each transform over all tensors, where its total is needed."""
    found: dict[Transform, list[tuple[Batch, int]]] = {}
    for batch, q in ready:
        if batch.whole[q].over == "all":
            found.setdefault(batch.whole[q], []).append((batch, q))
    return found


class Round:
    """Totals that are summed at once, over batches and over processes."""

    def __init__(self, ready: Ready) -> None:
        self.ready, self.shared = ready, list(groups_over_all(ready).values())
        members = [m for batch, _ in ready for m in batch.members]
        sharded = any(is_sharded(member.param) for member in members)
        self.places = places_of([(m.number, m.param) for m in members]) if sharded else {}
        for shared in self.shared:
            count = sum(batch.count_of(q) for batch, q in shared)
            for batch, q in shared:
                batch.counts[q] = count

    def run(self) -> None:
        """Sum, and share the sums."""
        for batch, q in self.ready:
            batch.reduce(q)
        if self.places:
            add_totals(self.places, [batch.totals[q] for batch, q in self.ready])
        for shared in self.shared:
            home = shared[0][0].device
            total = torch.stack([b.totals[q].sum().to(home) for b, q in shared]).sum()
            for batch, q in shared:
                batch.totals[q] = total.to(batch.device)


def signature_of(method: Method) -> list[tuple[Any, ...]]:
    """Return the options that decide what is compiled."""
    found: list[tuple[Any, ...]] = []
    for group in method.param_groups:
        rule, keys = method.update_rule(group)
        kinds = group["fused"], group["state_dtype"], group["stochastic_rounding"]
        found.append((group["transforms"], rule, keys, *kinds, len(group["params"])))
    return found


DECLARED = attrgetter(*FIELDS)


class Sources:
    """The functions that kernels were made from, as they were then."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.functions = [f for batch in batches for f in named(batch.program).values()]
        self.codes = list(map(attrgetter("__code__"), self.functions))
        self.names = [(f, name, known) for f in self.functions for name, known in meanings(f)]
        self.chained = [f for batch in batches for f in batch.chain]
        self.declared = list(map(DECLARED, self.chained))

    def mean_the_same(self) -> bool:
        """Whether they still are what they were."""
        return (
            all(map(is_, map(attrgetter("__code__"), self.functions), self.codes))
            and all(meaning(function, name) is known for function, name, known in self.names)
            and list(map(DECLARED, self.chained)) == self.declared
        )


def kind_of(grad: Any) -> tuple[Any, ...]:
    """Return all that decides whether a kernel takes a gradient."""
    if grad is None or grad.layout != torch.strided:
        return (grad is None,)
    part = local(grad)
    return type(part), part.dtype, part.device, part.stride(), part.is_neg(), placements(grad)


def odd_ones(inventory: Inventory) -> dict[int, tuple[Any, ...]]:
    """Return the gradients that keep their parameters off a kernel, as they are now."""
    found = {}
    for i in inventory.reasons:
        param, grad = inventory.params[i], inventory.grads[i]
        if grad is not None and form_obstacle(param, grad, "the gradient"):
            found[i] = kind_of(grad)
    return found


def has_power(method: Method, group: Group, recipe: Recipe | None) -> bool:
    """Whether a kernel still raises to the exponents that the group asks for."""
    if recipe is None or recipe.power in ("", "general"):
        return True
    scalars = method.scalars(with_numbers(group), 1.0, 1)
    return recipe.power == power_of(recipe.rule, recipe.state, scalars)


def have_powers(method: Method, recipes: Sequence[Recipe | None]) -> bool:
    """Whether all kernels still raise to the exponents that their groups ask for."""
    pairs = zip(method.param_groups, recipes, strict=True)
    return all(has_power(method, group, recipe) for group, recipe in pairs)


def rest_of(
    parts: Sequence[Part], recipes: Sequence[Recipe | None], compiled: set[int]
) -> list[Part]:
    """Return what goes the eager way, if only through a chain."""
    found: list[Part] = []
    for (group, chain, ready), recipe in zip(parts, recipes, strict=True):
        found.append((group, chain, [i for i in ready if i not in compiled]))
        if recipe is not None and recipe.eager:
            found.append((group, recipe.eager, [i for i in ready if i in compiled]))
    return [part for part in found if part[2]]


def hand_over(
    batch: Batch, waits: bool, grads: list[Any], shaped: dict[int, Tensor], scaling: Sequence[Any]
) -> None:
    """Give a batch the gradients of a step, and what a gradient scaler says of them."""
    if shaped or not batch.lookup.tensors:  # users' functions may have moved anything
        given = [
            like_param(shaped[m.number], m.param) if waits else grads[m.number]
            for m in batch.members
        ]
        fits = batch.point(given)
        assert fits, "a kernel was made for tensors of another form"
    scale, found_inf = scaling
    batch.count(None if waits else scale, found_inf)  # eager transforms unscaled already


def kept(state: Any, pending: Pending) -> dict[Tensor, Group | None]:
    """Return what is known of the parameters whose missing state is about to be stored."""
    return {p: dict(state[p]) if p in state else None for p, _, _ in pending}


def put_back(state: Any, before: dict[Tensor, Group | None]) -> None:
    """Undo what was stored since."""
    for param, known in before.items():
        if known is None:
            state.pop(param, None)
        else:
            state[param].clear()
            state[param].update(known)


class Plan:
    """How a step of an optimizer is split: batches for kernels, and parts for the eager way.

    Args:
        method: the optimizer whose step it is.
        grads: the gradient of each of its parameters, or None.

    Raises:
        RuntimeError: a group with ``fused=True`` cannot go through a kernel.

    Source: chapter "A plan for a step".
    """

    def __init__(self, method: Method, grads: list[Tensor | None]) -> None:
        self.method: Any = weakref.proxy(method)  # which holds the plan: no circle
        self.signature = signature_of(method)
        inventory, parts = Inventory.of(method, grads), parts_of_groups(method.param_groups, grads)
        self.params = inventory.params
        for group, _, members in parts:
            check_tensors(method, group, [self.params[i] for i in members])
        self.recipes, fast = sort_parameters(method, inventory)
        made = make_batches(self.method, inventory, self.recipes, fast)
        self.batches, self.pending, fast = made
        self.compiled = set(fast)
        self.sources = Sources(self.batches)
        together = [batch for batch in self.batches if needs_others(batch)]
        self.alone = [batch for batch in self.batches if batch not in together]
        self.rounds = list(map(Round, rounds_of(together)))
        self.on_gpu = all(isinstance(batch, GPUBatch) for batch in self.batches)
        self.rest = rest_of(parts, self.recipes, self.compiled)
        self.absent = [i for i, grad in enumerate(grads) if grad is None]
        self.eager = {i for _, _, members in self.rest for i in members}  # others: see `has_form`
        self.odd, self.reasons = odd_ones(inventory), inventory.reasons

    def fits(self, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Whether the plan still is that of the optimizer; looks up all tensors again."""
        at_once = (batch for batch in self.batches if not self.waits(batch))
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and all(grads[i] is None for i in self.absent)
            and all(grads[i] is not None for i in self.eager)
            and all(kind_of(grads[i]) == kind for i, kind in self.odd.items())
            and signature_of(self.method) == self.signature
            and self.sources.mean_the_same()
            and have_powers(self.method, self.recipes)
            and all(batch.point(batch.own(grads)) for batch in at_once)
        )

    def waits(self, batch: Batch) -> bool:
        """Whether users' functions come before the kernel of a batch."""
        recipe = self.recipes[batch.members[0].group]
        return recipe is not None and bool(recipe.eager)

    def run(
        self, grads: list[Any], shaped: dict[int, Tensor], scale: Any = None, found_inf: Any = None
    ) -> None:
        """Run the kernels.

        Args:
            grads: the gradient of each parameter, in the order of the groups.
            shaped: what users' functions made of some of them, by number.
            scale: by what a gradient scaler has multiplied them, a tensor or None.
            found_inf: whether it has found a number that is not finite, a tensor or None.
        """
        before = kept(self.method.state, self.pending)
        try:
            self.prepare(grads, shaped, (scale, found_inf))
        except BaseException:
            put_back(self.method.state, before)
            raise
        self.pending = []
        for batch in self.batches:
            batch.run(alone=batch in self.alone)

    def prepare(self, grads: list[Any], shaped: dict[int, Tensor], scaling: Sequence[Any]) -> None:
        """Do all of a step that comes before the first write to a parameter."""
        for param, key, tensor in self.pending:
            self.method.state[param][key] = tensor
        for batch in self.batches:
            hand_over(batch, self.waits(batch), grads, shaped, scaling)
        for sums in self.rounds:
            sums.run()


def plan_for(method: Method, params: list[Tensor], grads: list[Tensor | None]) -> Plan | None:
    """Return the plan of a step, the last one if it still fits; None if no kernel is wanted."""
    ways = {group["fused"] for group in method.param_groups}
    if ways <= {False} or method.defaults["differentiable"]:
        return None
    last = method.__dict__.pop("_plan", None)
    small = last is None and sum(p.numel() for p in params) < WORTH_COMPILING
    if small and True not in ways:
        return None
    return last if last is not None and last.fits(params, grads) else Plan(method, grads)


def keep_plan(method: Method, plan: Plan | None) -> None:
    """Keep the plan of a step that has ended, for the next one."""
    if plan is not None:
        method.__dict__["_plan"] = plan


def ways_of(plan: Plan) -> dict[int, str]:
    """Say how the parameters of a plan are updated, by their numbers."""
    ways = {i: f"eager, because {reason}" for i, reason in plan.reasons.items()}
    for batch in plan.batches:
        recipe = plan.recipes[batch.members[0].group]
        before = f", after {recipe.eager} on tensors" if recipe and recipe.eager else ""
        ways |= {member.number: f"kernel{before}" for member in batch.members}
    return ways


def why_no_plan(method: Method, params: Iterable[Tensor]) -> str:
    """Say why all parameters of an optimizer go the eager way, or that nothing is known so far."""
    entries = sum(param.numel() for param in params)
    if method.defaults["differentiable"]:
        return "eager, because differentiable=True"
    if entries < WORTH_COMPILING and not any(group["fused"] for group in method.param_groups):
        return f"eager, because {few_of(entries)}"
    return "not known before the first step has ended"


def explain(method: Method) -> list[str]:
    """Say for each parameter of an optimizer which way its last step went, and why.

    Args:
        method: an optimizer of this library.

    Returns:
        A line for each parameter, in the order of the groups.

    Example:
        >>> import agrlib
        >>> weight = torch.nn.Parameter(torch.zeros(300, 200))
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer = agrlib.SGD([weight], lr=0.1)
        >>> optimizer.step()
        >>> print(*explain(optimizer))
        group 0, parameter 0, (300, 200): eager, because kernels begin at 65,536 entries, not 60,000

    Source: chapter "A plan for a step".
    """
    params = [param for group in method.param_groups for param in group["params"]]
    inventory, plan = Inventory.of(method, [p.grad for p in params]), method.__dict__.get("_plan")
    whole, ways = why_no_plan(method, params), ways_of(plan) if plan is not None else {}
    found = []
    for i, g in enumerate(inventory.groups):
        way = ways.get(i, "no gradient" if plan is not None else whole)
        if method.param_groups[g]["fused"] is False:
            way = "eager, because fused=False"
        found.append(f"{name_of(method, inventory, i)}: {way}")
    return found
