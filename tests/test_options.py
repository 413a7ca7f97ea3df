"""What classes show of the options that they share: to `help`, to programs, to copies of them."""

import inspect
import pickle
import subprocess
import sys
import typing

import cloudpickle
import pytest
import torch
import typing_extensions
from contract import OPTIMIZERS, parameters
from typing_extensions import Unpack

import agrlib
from agrlib.options import Options, arguments, complete_args

METHODS = list({entry.cls: None for entry in OPTIMIZERS})
SHARED = list(Options.__annotations__)
each = pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)


def names(cls):
    return list(inspect.signature(cls).parameters)


def test_the_type_is_the_signature():
    found = inspect.signature(agrlib.GradientMethod.__init__).parameters.values()
    expected = {p.name: p.annotation for p in found if p.kind is p.KEYWORD_ONLY}
    assert list(typing_extensions.get_type_hints(Options).items()) == list(expected.items())
    assert not Options.__required_keys__


@each
def test_the_signature_is_whole(cls):
    shown = inspect.signature(cls).parameters
    base = inspect.signature(agrlib.GradientMethod).parameters
    assert [shown[name] for name in SHARED] == [base[name] for name in SHARED]
    assert list(shown)[-len(SHARED) :] == SHARED
    assert list(inspect.signature(cls.__init__).parameters) == ["self", *shown]
    for name in SHARED:  # and what it shows is what holds
        cls(parameters(), **{name: shown[name].default})


@each
def test_every_keyword_is_explained(cls):
    assert list(arguments(cls.__doc__)) == names(cls)
    base = arguments(agrlib.GradientMethod.__doc__)
    assert all(arguments(cls.__doc__)[name] == base[name] for name in SHARED)


@each
def test_type_hints_are_found(cls):
    assert typing.get_type_hints(cls.__init__)["lr"] == float | torch.Tensor
    hints = typing_extensions.get_type_hints(cls.__init__)
    assert typing_extensions.get_args(hints["options"]) == (Options,)


@pytest.mark.parametrize(
    ("cls", "name", "hint"),
    [
        (agrlib.AdamW, "beta", "did you mean 'betas'?"),
        (agrlib.SGD, "weightdecay", "did you mean 'weight_decay'?"),
        (
            agrlib.Adan,
            "bias_correctoin",
            "it takes params, lr, betas, eps, weight_decay, no_prox, ",
        ),
        (agrlib.AMSGrad, "amsgrad", "it takes params, lr, betas, eps, weight_decay, bias_corr"),
    ],
)
def test_an_unknown_keyword_is_refused_by_name(cls, name, hint):
    with pytest.raises(TypeError) as caught:
        cls(parameters(), **{name: 1})
    start = f"{cls.__name__}() got an unexpected keyword argument {name!r}: {hint}"
    assert str(caught.value).startswith(start)


class Own(agrlib.AdamW):
    """AdamW with a warmup.

    Args:
        warmup: steps before the full lr.
    """

    def __init__(self, params, warmup: int = 5, **options: "Unpack[Options]") -> None:
        super().__init__(params, **options)


class Below(Own):
    """Only another name."""


class Loose(agrlib.AdamW):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Closed(agrlib.AdamW):
    """AdamW with one option.

    Args:
        lr: the option.
    """

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)


class Starred(agrlib.SGD):
    def __init__(self, params, *args, **options: Unpack[Options]):
        super().__init__(params, *args, **options)


def test_classes_of_users():
    assert names(Own) == names(Below) == ["params", "warmup", *SHARED]
    assert list(arguments(Own.__doc__)) == names(Own)
    assert Below.__doc__ == "Only another name."
    assert names(Loose) == ["args", "kwargs"] and Loose.__doc__ is None
    assert names(Closed) == list(arguments(Closed.__doc__)) == ["params", "lr"]
    assert "the option" in arguments(Closed.__doc__)["lr"]
    assert names(Starred) == ["params", "args", *SHARED]
    for cls, name in ((Loose, "beta"), (Below, "warmpu"), (Starred, "maximise")):
        with pytest.raises(TypeError, match=rf"{cls.__name__}\(\) got .*{name}'.*did you mean '"):
            cls(parameters(), **{name: 1})
    with pytest.raises(TypeError, match=r"Closed.__init__\(\) got an unexpected"):
        Closed(parameters(), maximize=True)


def test_a_docstring_of_another_style_is_left_alone():
    for doc in (
        "One line.",
        "One.\n\nParameters\n----------\nlr : float\n",
        "One.\n\n:param lr: x",
    ):
        assert complete_args(doc, ["lr"], dict(lr="lr: a number.")) == doc.strip()


def test_names_that_only_a_type_checker_knows_do_no_harm():
    names_ = dict(agrlib=agrlib)
    text = (
        "class C(agrlib.SGD):\n    def __init__(self, params: 'Later', **options: 'Unpack[X]'):\n"
    )
    exec(text + "        super().__init__(params, **options)", names_)
    assert names(names_["C"]) == ["params", "options"]
    names_["C"](parameters(), maximize=True)


def test_copies_of_classes_and_of_their_optimizers():
    class Local(agrlib.AMSGrad):
        """One in a function.

        Args:
            lr: its step size.
        """

        def __init__(self, params, lr=0.5, **options: Unpack[Options]):
            super().__init__(params, lr, **options)

    again = pickle.loads(cloudpickle.dumps(Local))
    assert names(again) == names(Local) and again.__doc__ == Local.__doc__
    optimizer = Own(parameters(), maximize=True)
    assert pickle.loads(pickle.dumps(optimizer)).defaults == optimizer.defaults


def test_amsgrad_is_an_adam_whose_rule_is_settled():
    optimizer = agrlib.AMSGrad(parameters())
    assert isinstance(optimizer, agrlib.Adam) and optimizer.defaults["amsgrad"] is True
    assert names(agrlib.AMSGrad) == [name for name in names(agrlib.Adam) if name != "amsgrad"]
    with pytest.raises(ValueError, match="take Adam to switch it off"):
        optimizer.add_param_group(dict(params=parameters(), amsgrad=False))
    optimizer.param_groups[0]["amsgrad"] = False  # a spoiled group keeps the maximum
    assert optimizer.update_rule(optimizer.param_groups[0])[1][-1] == "max_exp_avg_sq"


def test_without_docstrings():
    code = "import agrlib, inspect; assert agrlib.AdamW.__doc__ is None; "
    code += "print('maximize' in inspect.signature(agrlib.AdamW).parameters)"
    run = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr
