# Exported from book/experiment.md: edit the chapter, not this file.
"""What a fair comparison of optimizers needs: data, seeds, small models, training, intervals.

Derived in the chapter "A fair experiment"; every other chapter trains with these functions.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Data:
    """Inputs and labels of a classification problem, cut into three parts once and for all.

    Runs that choose are measured on `valid`. Final runs take `dataclasses.replace(data,
    valid=data.test)`, which measures them on what no choice has seen.
    """

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def three_parts(labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the places of a training part and of a validation and a test part of that size."""
    from sklearn.model_selection import train_test_split

    order = np.arange(len(labels))
    rest, test = train_test_split(order, test_size=size, stratify=labels, random_state=0)
    train, valid = train_test_split(rest, test_size=size, stratify=labels[rest], random_state=0)
    return train, valid, test


def load_digits() -> Data:
    """Return scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, 10 classes.

    The cut into 1,097 training, 350 validation and 350 test images is stratified by class and
    always the same; choosing it anew would be one more hidden source of luck.

    Returns:
        Float32 inputs of shape (n, 64) with pixels in [0, 1], int64 labels of shape (n,).

    Raises:
        ImportError: scikit-learn is missing.

    Example:
        >>> data = load_digits()
        >>> data.train[0].shape, data.valid[0].shape, data.test[0].shape
        (torch.Size([1097, 64]), torch.Size([350, 64]), torch.Size([350, 64]))

    Source: chapter "A fair experiment".
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    return Data(*((x[part], y[part]) for part in three_parts(labels, size=350)))


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch.

    Args:
        seed: any integer from 0 to 2^32 - 1.

    Example:
        >>> seed_everything(1)
        >>> first = torch.rand(2)
        >>> seed_everything(1)
        >>> bool((torch.rand(2) == first).all())
        True

    Source: chapter "A fair experiment".
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def softmax_regression() -> nn.Module:
    """Return a linear classifier of 8 x 8 images: a convex problem with 650 parameters."""
    return nn.Linear(64, 10)


def mlp(width: int = 64, depth: int = 2) -> nn.Module:
    """Return a ReLU network for 8 x 8 images with `depth` hidden layers of `width` units."""
    sizes = [64] + [width] * depth
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def convnet(channels: int = 16) -> nn.Module:
    """Return a convolutional network for 8 x 8 images: two 3 x 3 layers, pooling, one linear."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * channels, 10),
    )


def notebook_bar(items: Sequence[Any], label: str) -> Iterator[Any]:
    """Yield the items and draw a bar below the cell; it vanishes at the end."""
    from IPython.display import HTML, display

    def bar(done: int) -> HTML:
        return HTML(f"{label} <progress value={done} max={len(items)}></progress>")

    shown = display(bar(0), display_id=True)
    for done, item in enumerate(items, start=1):
        yield item
        shown.update(bar(done))
    shown.update(HTML(""))


def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
    """Yield the items and show how far it is: a bar in a notebook, which vanishes, or a terminal.

    Where neither is watching, nothing is printed.

    Example:
        >>> [2 * item for item in progress([1, 2], "doubling")]
        [2, 4]
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        yield from notebook_bar(items, label)
    else:
        from tqdm import tqdm

        yield from tqdm(items, label, leave=False, disable=None)


@dataclass
class History:
    """What one training run measured: one number per epoch, the first before any step."""

    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_accuracy: list[float] = field(default_factory=list)


@torch.no_grad()
def evaluate(model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the mean cross-entropy, in nats, and the share of right answers."""
    was_training = model.training
    model.eval()
    logits = model(part[0])
    model.train(was_training)
    loss = functional.cross_entropy(logits, part[1])
    return loss.item(), (logits.argmax(1) == part[1]).float().mean().item()


def one_epoch(
    model: nn.Module,
    part: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Make a step for each mini-batch of a part of the data, in a new order."""
    x, y = part
    for batch in torch.randperm(len(x), generator=generator).split(batch_size):
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def train(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int = 64,
    seed: int = 0,
    scheduler: Any = None,
) -> History:
    """Train a classifier with cross-entropy on shuffled mini-batches.

    Args:
        model: maps inputs of shape (n, 64) to logits of shape (n, 10).
        data: the problem, on the model's device; the test part is not touched.
        optimizer: over the model's parameters.
        epochs: passes over the training part; 0 measures the start.
        batch_size: images per step; the last batch of an epoch may be smaller.
        seed: of the order of the batches.
        scheduler: a learning-rate scheduler, stepped after each epoch.

    Returns:
        Losses and accuracies before the first step and after each epoch.

    Raises:
        ValueError: `epochs` or `batch_size` is out of range.

    Example:
        >>> seed_everything(0)
        >>> model = softmax_regression()
        >>> history = train(model, load_digits(), torch.optim.SGD(model.parameters(), 0.5), 5)
        >>> history.train_loss[0] > 2 > 1 > history.train_loss[5]
        True

    Source: chapter "A fair experiment".
    """
    if epochs < 0 or batch_size < 1:
        raise ValueError(f"need epochs >= 0 and batch_size >= 1, not {epochs} and {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    history = History()
    for epoch in range(epochs + 1):
        if epoch > 0:
            one_epoch(model, data.train, optimizer, batch_size, generator)
            if scheduler is not None:
                scheduler.step()
        valid_loss, valid_accuracy = evaluate(model, data.valid)
        history.train_loss.append(evaluate(model, data.train)[0])
        history.valid_loss.append(valid_loss)
        history.valid_accuracy.append(valid_accuracy)
    return history


def run_seeds(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    data: Data,
    seeds: Sequence[int],
    epochs: int,
    batch_size: int = 64,
) -> list[History]:
    """Train once per seed; a seed fixes the start and the order of the batches.

    Args:
        make_model: builds the model; called after seeding.
        make_optimizer: builds the optimizer from the model's parameters.
        data: the problem; for final runs with the test part in the place of `valid`, see `Data`.
        seeds: one run each; two methods run with the same seeds can be compared in pairs.
        epochs: passes over the training part.
        batch_size: images per step.

    Returns:
        One history per seed, in their order.

    Source: chapter "A fair experiment".
    """
    histories = []
    for seed in progress(seeds, "seeds"):
        seed_everything(seed)
        model = make_model()
        optimizer = make_optimizer(model.parameters())
        histories.append(train(model, data, optimizer, epochs, batch_size, seed))
    return histories


def tune(
    make_model: Callable[[], nn.Module],
    candidates: Mapping[Any, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]],
    data: Data,
    seeds: Sequence[int],
    epochs: int,
    batch_size: int = 64,
) -> Any:
    """Return the key of the candidate with the smallest mean final validation loss.

    A run that diverges counts as an infinite loss.

    Args:
        make_model: builds the model.
        candidates: an optimizer builder for each setting; equal tuning means equally many.
        data: the problem; only its training and validation parts are used.
        seeds: of the tuning runs, other than those of the final runs.
        epochs: passes over the training part, as many as the final runs have.
        batch_size: images per step.

    Returns:
        A key of `candidates`.

    Source: chapter "A fair experiment".
    """
    scores = {}
    for key, make_optimizer in candidates.items():
        runs = run_seeds(make_model, make_optimizer, data, seeds, epochs, batch_size)
        score = float(np.mean([run.valid_loss[-1] for run in runs]))
        scores[key] = score if np.isfinite(score) else np.inf
    return min(scores, key=lambda key: scores[key])


def student_quantile(confidence: float, degrees: int) -> float:
    """Return t such that Student's distribution has this share between -t and t."""
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def paired_interval(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return the mean of first - second and Student's interval around it.

    With d_i = first_i - second_i for runs of the same seed: mean(d) -+ t * std(d) / sqrt(n), where
    t is the quantile of Student's distribution with n - 1 degrees of freedom.

    Args:
        first: one result per seed.
        second: the other method's results, for the same seeds in the same order.
        confidence: the share of such intervals that hold the true mean, if d is normal.

    Returns:
        The mean difference, the lower end, the upper end.

    Raises:
        ValueError: the lengths differ, or there are fewer than two pairs.

    Example:
        >>> mean, low, high = paired_interval([3.0, 4.0, 5.0], [1.0, 3.0, 2.0])
        >>> print(f"{mean:.2f} [{low:.2f}, {high:.2f}]")
        2.00 [-0.48, 4.48]

    Source: Student (1908); chapter "A fair experiment".
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"need two or more pairs, not {len(first)} and {len(second)} results")
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean = difference.mean()
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    reach = student_quantile(confidence, len(difference) - 1) * error
    return float(mean), float(mean - reach), float(mean + reach)


COLORS = dict(
    grey="#8c8c8c",
    blue="#2a85c7",
    orange="#de8f05",
    green="#029e73",
    red="#d55e00",
    purple="#b878b5",
)


STYLE: dict[Any, Any] = {
    "figure.figsize": (6.4, 3.4),
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "font.size": 10,
}
INK = "#222832"
INKED: tuple[str, ...] = ("text.color", "xtick.color", "ytick.color", "grid.color")
INKED += ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor")


def use_book_style() -> None:
    """Set matplotlib to the figures of this book: dark ink on white.

    Colors are told apart by color-blind readers; chapters vary the line style as well.

    Source: chapter "A fair experiment".
    """
    import matplotlib
    from cycler import cycler

    colors: dict[Any, Any] = {"axes.prop_cycle": cycler(color=list(COLORS.values())[1:])}
    matplotlib.rcParams.update(STYLE | dict.fromkeys(INKED, INK) | colors)


def plot_runs(
    axes: Any, runs: Sequence[Sequence[float]], label: str, color: str, style: str = "-"
) -> None:
    """Draw the mean of several curves and a band from the lowest to the highest.

    Args:
        axes: matplotlib axes.
        runs: one curve per seed, all of one length; epochs on the horizontal axis.
        label: for the legend.
        color: a key of `COLORS`.
        style: a matplotlib line style, so that color is not the only difference.

    Source: chapter "A fair experiment".
    """
    curves = np.asarray(runs)
    epochs = np.arange(curves.shape[1])
    axes.plot(epochs, curves.mean(0), style, color=COLORS[color], label=label)
    axes.fill_between(epochs, curves.min(0), curves.max(0), color=COLORS[color], alpha=0.25, lw=0)
