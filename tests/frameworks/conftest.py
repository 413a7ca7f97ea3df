"""Let timm load beside a torch for the CPU."""

import torch


def declare_compiled_part():
    """Declare what torchvision declares in its compiled part; timm's small models need none of it.

    That part needs the libraries of the GPU, which a torch for the CPU does not bring.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


try:
    import torchvision  # noqa: F401
except ImportError:  # the environment of the other frameworks
    pass
except RuntimeError:
    LIBRARY = declare_compiled_part()  # kept, as its end would take them back
