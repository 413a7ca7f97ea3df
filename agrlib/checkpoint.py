# Exported from book/checkpoint.md: edit the chapter, not this file.
"""What a state dict records, accepts and refuses.

Derived in the chapter "Checkpoints".
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from agrlib.checks import Group
from agrlib.precision import state_dtype
from agrlib.transforms import Chain


def name_transforms(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Write the names of the transforms where torch has packed the functions."""
    for group in state_dict["param_groups"]:
        group["transforms"] = str(Chain.of(group["transforms"]))
        acts_on = getattr(optimizer, "weight_decay_acts_on", None)
        if "betas" in group and acts_on in ("gradient", "parameter"):  # torch's mark for Adam
            group["decoupled_weight_decay"] = acts_on == "parameter"


def refuse_other_decay(acts_on: str, saved: Group) -> None:
    """Raise where a checkpoint was made with the other kind of weight decay."""
    decoupled = saved.get("decoupled_weight_decay")  # None in checkpoints that have no such mark
    if saved.get("weight_decay") and (acts_on, decoupled) == ("gradient", True):
        raise ValueError("the checkpoint was made with decoupled weight decay: load it into AdamW")
    if saved.get("weight_decay") and (acts_on, decoupled) == ("parameter", False):
        raise ValueError("the checkpoint was made with coupled weight decay: load it into Adam")


def refuse_other_options(group: Group, saved: Group) -> None:
    """Raise where a saved group was made by another method."""
    numbers = [key for key, value in group.items() if isinstance(value, float | tuple)]
    missing = [key for key in numbers if key not in saved and key != "transforms"]
    if missing:
        raise ValueError(f"the checkpoint is of another method: it has no {', '.join(missing)}")


def refuse_other_transforms(i: int, group: Group, saved: Group) -> None:
    """Raise where a saved group had other transforms."""
    chain = str(Chain.of(group["transforms"]))
    record = saved.get("transforms", chain)  # torch.optim keeps none
    if chain != record:
        raise ValueError(
            f"the checkpoint was made with transforms [{record}], this optimizer has [{chain}] in "
            f"group {i}. To load it on purpose, first set "
            f"state_dict['param_groups'][{i}]['transforms'] = {chain!r}"
        )


def refuse_other_shapes(group: Group, saved: Group, state: dict[int, Any]) -> None:
    """Raise where a saved state has another shape than its parameter."""
    for param, index in zip(group["params"], saved["params"], strict=False):
        for key, value in state.get(index, {}).items():
            if isinstance(value, Tensor) and key != "step" and value.shape != param.shape:
                raise ValueError(
                    f"the checkpoint's {key} has shape {tuple(value.shape)}, its parameter "
                    f"{tuple(param.shape)}: load it into the model it was saved with"
                )


def warn_of_no_record(groups: list[Group], loaded: list[Group]) -> None:
    """Warn, once, that the run which made a checkpoint may not have had these transforms."""
    chains = [
        str(Chain.of(group["transforms"]))
        for group, saved in zip(groups, loaded, strict=True)
        if group["transforms"] and "transforms" not in saved
    ]
    if chains:
        warnings.warn(
            "the checkpoint has no record of transforms, as torch.optim saves it: "
            f"this optimizer goes on from it with [{chains[0]}]",
            stacklevel=3,
        )


HOW_TO_RUN = ("foreach", "fused", "capturable", "differentiable")  # never from a checkpoint


def check_checkpoint(optimizer: "RecordedOptimizer", final: dict[str, Any]) -> None:
    """Raise where a checkpoint does not fit an optimizer."""
    groups = zip(optimizer.param_groups, final["param_groups"], strict=False)
    for i, (group, saved) in enumerate(groups):
        refuse_other_options(group, saved)
        refuse_other_transforms(i, group, saved)
        refuse_other_shapes(group, saved, final["state"])
        refuse_other_decay(optimizer.weight_decay_acts_on, saved)
        kept = {key: group[key] for key in ("transforms", *HOW_TO_RUN)}
        optimizer.check({**group, **saved, **kept})


def copy_state(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Take every state tensor from a checkpoint as it is, where torch has rounded it."""
    for group, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
        for param, index in zip(group["params"], saved["params"], strict=True):
            for key, value in loaded["state"].get(index, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    dtype = state_dtype(group, param)
                    optimizer.state[param][key] = value.to(param.device, dtype, copy=True)


def complete(group: Group, known: Group) -> None:
    """Give a loaded group the keys that torch.optim and older versions lack."""
    group.pop("decoupled_weight_decay", None)  # the class says it
    for key, value in known.items():
        if key in ("transforms", *HOW_TO_RUN):
            group[key] = value
        group.setdefault(key, value)


def count_at_home(group: Group, param: Tensor, state: dict[str, Any]) -> None:
    """Bring the number of a parameter's steps to where it is counted."""
    if "step" in state:
        step, home = state["step"], torch.device("cpu")
        if not isinstance(step, Tensor):
            step = torch.tensor(step, device=home)
        home = param.device if group["capturable"] else home
        state["step"] = step.to(home, torch.float32, copy=True)


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile calls as it is."""
    outside = torch.compiler.disable(function)
    vars(outside).pop("_torchdynamo_orig_callable", None)  # old torch looks there past wrappers
    outside.outside_graphs = True
    return outside


def keep_step_outside_graphs(cls: type[Optimizer]) -> None:
    """Let torch.compile call the step of a class, with torch's hooks around it, as it is."""
    if not hasattr(cls.step, "outside_graphs"):
        cls.step = outside_graphs(cls.step)  # type: ignore[method-assign]


class RecordedOptimizer(Optimizer):
    """A torch optimizer whose checkpoints record the gradient transforms of each group."""

    weight_decay_acts_on: str

    def check(self, group: Group) -> None:
        """Raise for options that the method cannot work with."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does, with each group's transforms as one string."""
        handle = self.register_state_dict_post_hook(name_transforms, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, or of its namesake in torch.optim.

        AMSGrad takes those of torch's Adam with ``amsgrad=True``. A checkpoint of torch.optim has
        no record of transforms: an optimizer that has transforms loads it with one warning.

        Args:
            state_dict: what `state_dict()` returned; the optimizer copies its tensors.

        Raises:
            ValueError: groups, shapes, options or transforms do not fit this optimizer. Nothing has
                been loaded then.
        """
        loaded: dict[str, Any] = {}

        def check(optimizer: Optimizer, final: dict[str, Any]) -> None:
            check_checkpoint(self, final)
            loaded.update(final)

        handles = [  # after the user's hooks that change the checkpoint, before those that follow
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(
                lambda optimizer: copy_state(self, loaded), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        warn_of_no_record(self.param_groups, loaded["param_groups"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = self.__dict__.get("param_groups", state["param_groups"])
        super().__setstate__(state)
        keep_step_outside_graphs(type(self))
        for group, old in zip(self.param_groups, own, strict=True):
            complete(group, {**self.defaults, **old})
            for param in group["params"]:
                count_at_home(group, param, self.state.get(param, {}))
