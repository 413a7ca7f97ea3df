"""The optimizers of deep learning, each derived in a chapter of the book and exported from it."""

from importlib.metadata import version

from agrlib.adam import Adam, AdamW
from agrlib.optimizer import Attachment, GradientMethod, Transform, attach, transform
from agrlib.regularization import agr
from agrlib.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Attachment",
    "GradientMethod",
    "Transform",
    "agr",
    "attach",
    "transform",
]
__version__ = version("agrlib")
