"""The optimizers of deep learning, each derived in a chapter of the book and exported from it."""

from importlib.metadata import version

from agrlib.adagrad import Adagrad
from agrlib.adam import Adam, AdamW
from agrlib.adan import Adan
from agrlib.amsgrad import AMSGrad
from agrlib.attachment import Attachment, attach
from agrlib.centralization import centralize
from agrlib.clipping import clip_global_norm, clip_norm, clip_value
from agrlib.normalization import normalize
from agrlib.optimizer import GradientMethod
from agrlib.padam import Padam
from agrlib.regularization import agr
from agrlib.rmsprop import RMSprop
from agrlib.schedules import refine_schedule
from agrlib.sgd import SGD
from agrlib.transforms import Transform, transform

__all__ = [
    "SGD",
    "AMSGrad",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adan",
    "Attachment",
    "GradientMethod",
    "Padam",
    "RMSprop",
    "Transform",
    "agr",
    "attach",
    "centralize",
    "clip_global_norm",
    "clip_norm",
    "clip_value",
    "normalize",
    "refine_schedule",
    "transform",
]
__version__ = version("agrlib")
