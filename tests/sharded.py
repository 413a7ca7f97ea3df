"""What tests/test_distributed.py runs on several processes: `sharded.py RANK WORLD FOLDER [NAME]`.

Each check returns what the tests look at; an exception is returned as its text. All processes run
the same checks in the same order, those with NAME in their names or all, and each process writes
what it found to FOLDER/WORLD-RANK.json.
"""

import functools
import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import agrlib
from agrlib import compilers, distributed

CHAINS = {
    "none": [],
    "value": [agrlib.clip_value(0.05)],
    "gc": [agrlib.centralize],
    "agr": [agrlib.agr],
    "gc-agr": [agrlib.centralize, agrlib.agr],
    "gn": [agrlib.normalize],
    "clip": [agrlib.clip_norm(0.1)],
    "global": [agrlib.clip_global_norm(0.1)],
    "agr-global": [agrlib.agr, agrlib.clip_global_norm(0.05)],
}
METHODS = {"AdamW": agrlib.AdamW, "Adan": agrlib.Adan}
OPTIONS = dict(lr=1e-2, weight_decay=0.1, eps=1e-3)
STEPS = 5


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 5, generator=generator), torch.randn(8, 2, generator=generator)


def network(a: int = 7, b: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(5, a), nn.Tanh(), nn.Linear(a, b), nn.Tanh(), nn.Linear(b, 2)
    return nn.Sequential(*layers)


def even_network() -> nn.Sequential:
    """Tensor parallel layers cannot be split unevenly."""
    return network(8, 4)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model, method, inputs, targets, steps=STEPS, missing=(), scaler=None, spoil=False):
    """Take steps; the gradients of what is no DTensor are averaged over the processes by hand."""
    for _ in range(steps):
        method.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if any(isinstance(p, DTensor) for p in model.parameters()):
            for param in model.parameters():
                if not isinstance(param, DTensor):
                    dist.all_reduce(param.grad)
                    param.grad /= dist.get_world_size()
        for name, param in model.named_parameters():
            if name in missing:
                param.grad = None
        if spoil and dist.get_rank() == dist.get_world_size() - 1:
            model[0].weight.grad.to_local()[0, 0] = float("inf")
        if scaler is None:
            method.step()
        else:
            scaler.step(method)
            scaler.update()


def alone(build, method, chains, steps=STEPS, **more) -> list[torch.Tensor]:
    """Return the parameters after the same training in one process, on the eager way."""
    model = build()
    train(model, make(method, model, chains, fused=False), *data(), steps, **more)
    return [whole(p) for p in model.parameters()]


def make(method, model, chain, **options):
    """Make an optimizer; a dict of chains gives each parameter a group of its own."""
    if isinstance(chain, list):
        return METHODS[method](model.parameters(), transforms=chain, **OPTIONS, **options)
    named = dict(model.named_parameters())
    groups = [dict(params=[named[name]], transforms=chain.get(name, [])) for name in named]
    return METHODS[method](groups, **OPTIONS, **options)


def distance(model, expected) -> float:
    pairs = zip(model.parameters(), expected, strict=True)
    return max((whole(p) - q).abs().max().item() for p, q in pairs)


def share(count: int, number: int) -> list[torch.Tensor]:
    return [part.chunk(count)[number] for part in data()]


def way(method) -> list[str]:
    """Return which kernels ran, and "eager" if something went that way."""
    plan = method.__dict__.get("_plan")
    if plan is None or not plan.batches:
        return ["eager"]
    kinds = {type(batch).__name__ for batch in plan.batches}
    return sorted(kinds | ({"eager"} if plan.rest else set()))


def measured(model, method, expected, inputs, targets, **more) -> dict[str, Any]:
    """Train, count the collectives of the last step, and compare with one process."""
    train(model, method, inputs, targets, STEPS - 1, **more)
    counter = CommDebugMode()
    step = method.step

    def counted():
        with counter:
            step()

    method.step = counted
    train(model, method, inputs, targets, 1, **more)
    counts = {str(key).split(".")[-1]: n for key, n in counter.get_comm_counts().items()}
    return dict(error=distance(model, expected), counts=counts, way=way(method))


# --- the checks -----------------------------------------------------------------------------------


def sharded_network(mesh) -> nn.Module:
    """Return a network with two sharded layers and one that each process holds in full."""
    model = network()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[2], mesh=mesh)
    return model


def fsdp(mesh, method, chain, fused, **more):
    chain = CHAINS[chain] if isinstance(chain, str) else chain
    expected = alone(network, method, chain, **more)
    model = sharded_network(mesh)
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    made = make(method, model, chain, fused=fused)
    found = measured(model, made, expected, *share(world, rank), **more)
    return found | dict(sizes=sizes)


def groups(mesh, fused):
    chains = {
        "0.weight": CHAINS["agr"],
        "0.bias": CHAINS["gn"],
        "2.weight": CHAINS["global"],
        "2.bias": CHAINS["global"],
        "4.weight": CHAINS["gc-agr"],
        "4.bias": [agrlib.clip_norm(0.2)],
    }
    return fsdp(mesh, "AdamW", chains, fused)


def mixed(mesh):
    """Where a total over all tensors covers one without a kernel, its whole group goes eager."""
    chain = [agrlib.agr, agrlib.clip_global_norm(0.05)]
    chains = {"0.weight": chain, "0.bias": chain, "4.weight": [torch.sin, *chain]}
    return fsdp(mesh, "AdamW", chains, fused=None)


def tensor_parallel(mesh, chain, fused):
    split = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(even_network(), mesh, split)
    expected = alone(even_network, "AdamW", CHAINS[chain])
    before = [whole(p) for p in model.parameters()]
    method = make("AdamW", model, CHAINS[chain], fused=fused)
    try:
        return measured(model, method, expected, *data())
    except RuntimeError as error:
        return dict(refused=str(error), error=distance(model, before), state=len(method.state))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last = nn.LayerNorm(5), nn.Linear(5, 2)
        nn.init.normal_(self.norm.weight)

    def forward(self, inputs):
        return self.last(self.norm(inputs[None]))[0]


def sequence_parallel(mesh, fused):
    """The norm's gradients are sums that each process has a summand of: Partial."""
    last = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    model = parallelize_module(Normed(), mesh, {"norm": SequenceParallel(), "last": last})
    method = make("AdamW", model, CHAINS["agr"], fused=fused)
    part, targets = share(dist.get_world_size(), dist.get_rank())[0], data()[1]
    try:
        train(model, method, part, targets)
    except RuntimeError as error:
        return dict(refused=str(error))
    partial = [p.grad.placements[0].is_partial() for p in model.parameters()]
    return dict(error=distance(model, alone(Normed, "AdamW", CHAINS["agr"])), partial=partial)


def column(param):
    """Say to FSDP2 that it shall split the columns of the layer whose columns are split already."""
    return Shard(1 if param.shape == (4, 8) else 0)


def two_dimensional(mesh, chain, fused, placement=None):
    """Tensor parallel within a host, FSDP2 between hosts."""
    split = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(even_network(), mesh["model"], split)
    fully_shard(model, mesh=mesh["data"], shard_placement_fn=placement)
    method = make("AdamW", model, CHAINS[chain], fused=fused)
    expected = alone(even_network, "AdamW", CHAINS[chain])
    batch = share(2, mesh.get_local_rank(0))
    try:
        return measured(model, method, expected, *batch)
    except RuntimeError as error:
        return dict(refused=str(error))


def hybrid(mesh, chain, fused):
    """HSDP: copies along the first dimension of the mesh, parts along the second."""
    expected = alone(network, "AdamW", CHAINS[chain])
    model = network()
    fully_shard(model, mesh=mesh)
    method = make("AdamW", model, CHAINS[chain], fused=fused)
    return measured(model, method, expected, *share(4, dist.get_rank()))


def data_parallel(fused):
    model = nn.parallel.DistributedDataParallel(network())
    method = make("AdamW", model, CHAINS["agr-global"], fused=fused)
    expected = alone(network, "AdamW", CHAINS["agr-global"])
    batch = share(dist.get_world_size(), dist.get_rank())
    return measured(model, method, expected, *batch)


def zero(fused):
    """Whole tensors, some on each process: what is summed over all of them is refused within."""
    chain, refused = CHAINS["agr-global"], []
    model = nn.parallel.DistributedDataParallel(network())
    batch = share(dist.get_world_size(), dist.get_rank())
    within = dict(params=model.parameters(), optimizer_class=agrlib.AdamW, fused=fused, **OPTIONS)
    method = ZeroRedundancyOptimizer(transforms=CHAINS["agr"], **within)
    train(model, method, *batch)
    errors = [distance(model, alone(network, "AdamW", CHAINS["agr"]))]
    for group in method.param_groups:
        group["transforms"] = chain
    within["params"] = list(model.parameters())
    for late in (lambda: ZeroRedundancyOptimizer(transforms=chain, **within), method.step):
        try:
            late()
        except RuntimeError as error:
            refused.append(str(error))
    errors.append(distance(model, alone(network, "AdamW", CHAINS["agr"])))
    model = nn.parallel.DistributedDataParallel(network())
    method = ZeroRedundancyOptimizer(**{**within, "params": model.parameters()})
    agrlib.attach(method, chain)
    train(model, method, *batch)
    errors.append(distance(model, alone(network, "AdamW", chain)))
    return dict(error=max(errors), refused=refused)


def attached(mesh):
    """A torch optimizer that sees the transformed DTensors."""
    ends = []
    for build, batch in (
        (network, data()),
        (lambda: sharded_network(mesh), share(dist.get_world_size(), dist.get_rank())),
    ):
        model = build()
        method = torch.optim.AdamW(model.parameters(), **OPTIONS, foreach=False)
        agrlib.attach(method, [agrlib.centralize, *CHAINS["agr-global"]])
        train(model, method, *batch)
        ends.append(model)
    return dict(error=distance(ends[1], [whole(p) for p in ends[0].parameters()]))


def user_function(mesh, function):
    """A user's function before a transform that is compiled."""
    return fsdp(mesh, "AdamW", [USERS[function], agrlib.agr], fused=None)


USERS = {"sine": torch.sin, "moving": lambda grad: grad.cumsum(0)}


def overflow(mesh, fused):
    """A gradient scaler, and an infinite entry that only the last process holds."""
    expected = alone(network, "AdamW", CHAINS["agr-global"])
    model = network()
    fully_shard(model, mesh=mesh)
    method = make("AdamW", model, CHAINS["agr-global"], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    batch = share(dist.get_world_size(), dist.get_rank())
    train(model, method, *batch, steps=2, scaler=scaler)
    before = [whole(p) for p in model.parameters()]
    train(model, method, *batch, steps=1, scaler=scaler, spoil=True)
    same, scale = distance(model, before), scaler.get_scale()
    train(model, method, *batch, steps=STEPS - 2, scaler=scaler)
    return dict(error=distance(model, expected), skipped=same, scale=scale)


def rounded(mesh, fused):
    """Return this process's part of a bfloat16 tensor whose entries are all alike."""
    shards = mesh.ndim - 1  # the last dimension of the mesh
    placements = [Replicate()] * shards + [Shard(0)]
    param = nn.Parameter(distribute_tensor(torch.ones(64, 8).bfloat16(), mesh, placements))
    method = agrlib.AdamW([param], lr=1e-3, fused=fused, stochastic_rounding=True)
    method.param_groups[0]["rounding_seed"] = 7
    for _ in range(2):
        param.grad = distribute_tensor(torch.ones(64, 8).bfloat16(), mesh, placements)
        method.step()
    return param.to_local().flatten().tolist()


def different_orders(mesh):
    """One process has an empty part, which counts as aligned; its kernels sort otherwise."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((4, 16), (1, 5), (2, 16))]
    grads = [
        [torch.randn(t.shape, generator=generator) * 3**i for i, t in enumerate(start)]
        for _ in range(3)
    ]
    ends = []
    for place in (lambda t: t.clone(), lambda t: distribute_tensor(t.clone(), mesh, [Shard(0)])):
        params = [nn.Parameter(place(tensor)) for tensor in start]
        fused = len(ends) == 1
        method = agrlib.AdamW(params, transforms=CHAINS["gc-agr"], **OPTIONS, fused=fused)
        for step in grads:
            for param, grad in zip(params, step, strict=True):
                param.grad = place(grad)
            method.step()
        ends.append([whole(p) for p in params])
    order = [[m.number for m in batch.members] for batch in method.__dict__["_plan"].batches]
    error = max((a - b).abs().max().item() for a, b in zip(*ends, strict=True))
    return dict(error=error, order=order, way=way(method))


def wrong_totals():
    """What a chapter warns of, so that it is noticed when torch changes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    total = distribute_tensor(torch.ones(6), mesh, [Shard(0)]).sum()
    refused = ""
    try:
        distributed.split_over(total)
    except RuntimeError as error:
        refused = str(error)
    return dict(item=total.item(), full=total.full_tensor().item(), refused=refused)


def content(model, method) -> dict[str, Any]:
    params = {name: param.detach() for name, param in model.named_parameters()}
    return {"model": params, "optimizer": get_optimizer_state_dict(model, method)}


def broken_off(name):
    chain = CHAINS["gc-agr"] if name == "AdamW" else CHAINS["agr-global"]
    return (name, chain), alone(network, name, chain, steps=6)


def save(mesh, folder, name):
    (name, chain), _ = broken_off(name)
    model = sharded_network(mesh)
    method = make(name, model, chain, fused=True)
    train(model, method, *share(dist.get_world_size(), dist.get_rank()), steps=3)
    dcp.save(content(model, method), checkpoint_id=folder / f"checkpoint-{name}")
    plain = {"model": content(model, method)["model"], "optimizer": method.state_dict()}
    dcp.save(plain, checkpoint_id=folder / f"plain-{name}")
    return content(model, method)["optimizer"]["param_groups"][0]["transforms"]


def load(model, folder, name, fused, batch) -> dict[str, Any]:
    """Go on from a checkpoint, in a model that is sharded otherwise or not at all."""
    (name, chain), expected = broken_off(name)
    method = make(name, model, chain, fused=fused)
    saved = content(model, method)
    dcp.load(saved, checkpoint_id=folder / f"checkpoint-{name}")
    set_optimizer_state_dict(model, method, saved["optimizer"])
    train(model, method, *batch, steps=3)
    steps = [method.state[p]["step"].item() for p in model.parameters()]
    return dict(error=distance(model, expected), steps=steps)


def load_plain(model, folder, name, batch) -> dict[str, Any]:
    """The same through `optimizer.state_dict()`, whose tensors torch loads in place."""
    (name, chain), expected = broken_off(name)
    method = make(name, model, chain, fused=True)
    train(model, method, *batch, steps=1)  # makes the state
    saved = {"model": content(model, method)["model"], "optimizer": method.state_dict()}
    dcp.load(saved, checkpoint_id=folder / f"plain-{name}")
    method.load_state_dict(saved["optimizer"])
    train(model, method, *batch, steps=3)
    steps = [method.state[p]["step"].item() for p in model.parameters()]
    return dict(error=distance(model, expected), steps=steps)


def checks(world: int, folder: Path):
    """Yield the names of the checks of a number of processes, and the checks."""
    rank = dist.get_rank()
    line = init_device_mesh("cpu", (world,))
    each = functools.partial
    if compilers.interpreting():
        for chain in ("gc-agr", "agr-global"):
            yield f"fsdp AdamW {chain} True", each(fsdp, line, "AdamW", chain, True)
        yield "different orders", each(different_orders, line)
        return
    for chain in CHAINS if world == 2 else ("agr", "gc", "gc-agr", "agr-global"):
        for fused in (True, False):
            yield f"fsdp AdamW {chain} {fused}", each(fsdp, line, "AdamW", chain, fused)
    for chain in ("agr", "gc-agr", "agr-global"):
        for fused in (True, False) if world == 2 else (True,):
            yield f"fsdp Adan {chain} {fused}", each(fsdp, line, "Adan", chain, fused)
    for fused in (True, False):
        missing = functools.partial(fsdp, line, "AdamW", "agr-global", fused)
        yield f"missing {fused}", each(missing, missing=("0.bias", "4.weight"))
        yield f"groups {fused}", each(groups, line, fused)
    if world == 2:
        yield "mixed", each(mixed, line)
        yield "attached", each(attached, line)
        for function in USERS:
            yield f"user {function}", each(user_function, line, function)
        for chain in ("agr", "gc", "global"):
            for fused in (True, False, None):
                yield f"tp {chain} {fused}", each(tensor_parallel, line, chain, fused)
        for fused in (True, False, None):
            yield f"sp {fused}", each(sequence_parallel, line, fused)
        for fused in (True, False):
            yield f"zero {fused}", each(zero, fused)
            yield f"ddp {fused}", each(data_parallel, fused)
            yield f"overflow {fused}", each(overflow, line, fused)
            yield f"rounded {fused}", each(rounded, line, fused)
        yield "wrong totals", wrong_totals
        for name in METHODS:
            yield f"save {name}", each(save, line, folder, name)
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        for fused in (True, False):
            for chain in ("agr", "gc-agr", "agr-global"):
                yield f"hsdp {chain} {fused}", each(hybrid, grid, chain, fused)
            yield f"rounded {fused}", each(rounded, grid, fused)
            yield f"2d agr {fused}", each(two_dimensional, grid, "agr", fused)
        for fused in (True, None):
            yield f"2d gc {fused}", each(two_dimensional, grid, "gc", fused)
            yield f"2d columns {fused}", each(two_dimensional, grid, "gc", fused, column)
        for name in METHODS:
            for fused in (True, False):
                loaded = each(load, folder=folder, name=name, fused=fused, batch=share(4, rank))
                yield f"load {name} {fused}", lambda f=loaded: f(sharded_network(line))
            plain = each(load_plain, folder=folder, name=name, batch=share(4, rank))
            yield f"load plain {name}", lambda f=plain: f(sharded_network(line))


def main(rank: int, world: int, folder: Path, name: str = "") -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    agrlib.plan.WORTH_COMPILING = 0  # fused=None decides by what it can
    store, limit = f"file://{folder}/store-{world}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    found: dict[str, Any] = {}
    for each, check in checks(world, folder):
        if name not in each:
            continue
        try:
            found[each] = check()
        except Exception as error:
            found[each] = f"{type(error).__name__}: {error}"
        dist.barrier()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
