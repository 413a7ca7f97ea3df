"""Train a small transformer on characters, sharded over processes, with AdamW(AGR).

    torchrun --standalone --nproc-per-node 2 train_transformer.py --steps 60 --save checkpoint
    torchrun --standalone --nproc-per-node 4 train_transformer.py --steps 120 --load checkpoint

The number of processes changes nothing but the time: each step's batch is drawn for all of them
together, and a checkpoint can be loaded into any number. The text is generated, so nothing is
downloaded. With GPUs, each process takes one.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import agrlib

CONTEXT = 64
UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
UNITS = [*UNITS.split(), "fifteen", "sixteen", "seventeen", "eighteen"]


def write_text() -> str:
    """Return a text to learn from: all sums of two numbers up to nine, in words."""
    sums = [(a, 7 * b % 10) for a in range(10) for b in range(10)]
    return " ".join(f"{UNITS[a]} and {UNITS[b]} is {UNITS[a + b]}." for a, b in sums)


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a norm and beside an identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        projected = self.project(self.norm1(x)).view(batch, length, 3 * self.heads, -1)
        q, k, v = projected.transpose(1, 2).chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class Transformer(nn.Module):
    """Predict each next character of a text."""

    def __init__(self, characters: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        place = torch.arange(text.shape[1], device=text.device)
        x = self.blocks(self.embed(text) + self.place(place))
        return self.head(self.norm(x).flatten(0, 1))


def batch_of(text: Tensor, step: int, size: int) -> tuple[Tensor, Tensor]:
    """Return this process's share of the batch that all processes draw for a step."""
    starts = torch.randint(
        len(text) - CONTEXT, (size,), generator=torch.Generator().manual_seed(step)
    )
    mine = starts.chunk(dist.get_world_size())[dist.get_rank()]
    windows = torch.stack([text[i : i + CONTEXT + 1] for i in mine.tolist()])
    return windows[:, :-1], windows[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="number of the last step")
    parser.add_argument("--batch", type=int, default=16, help="windows of text, all processes")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--load", help="folder of a checkpoint to go on from")
    parser.add_argument("--save", help="folder for a checkpoint")
    parser.add_argument("--save-after", type=int, help="the step for it; the last one if left out")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpu else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    letters = sorted(set(write_text()))
    text = torch.tensor([letters.index(letter) for letter in write_text()], device=device)
    torch.manual_seed(0)  # the same weights everywhere, before they are cut into shards
    model = Transformer(len(letters)).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = agrlib.AdamW(  # made of the sharded parameters
        model.parameters(), lr=options.lr, transforms=[agrlib.agr], fused=True
    )

    first = 0
    if options.load:
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "step": 0}
        dcp.load(saved, checkpoint_id=options.load)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        first = saved["step"]
    for step in range(first + 1, options.steps + 1):
        inputs, targets = batch_of(text, step, options.batch)
        loss = F.cross_entropy(model(inputs), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == first + 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean)  # a plain tensor: its sum over processes, made a mean
            if dist.get_rank() == 0:
                print(f"step {step:4}  loss {mean.item() / dist.get_world_size():.4f}", flush=True)
        if options.save and step == (options.save_after or options.steps):
            weights, state = get_state_dict(model, optimizer)
            saved = {"model": weights, "optimizer": state, "step": step}
            dcp.save(saved, checkpoint_id=options.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
