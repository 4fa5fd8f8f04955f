"""Targets: what turns a model's output into one score per explained thing.

A target is a class, several, nothing (the predicted class), or any function from the model's output to
scores ``(N,)`` or ``(N, K)``. The functions here make the usual ones::

    from camkit import targets

    explain(x, targets.contrast(281, 207))  # why this class and not that one
    explain(x, targets.key("out", targets.pixels(mask, 15)))  # of a dict's entry, the pixels of a mask
"""

from camkit.targets.binding import Bound, Classes, Target, bind, class_indices, key, logit, softmax
from camkit.targets.classes import contrast, finer, negative, probability
from camkit.targets.outputs import box, pixels, similarity

__all__ = [
    "Bound",
    "Classes",
    "Target",
    "bind",
    "box",
    "class_indices",
    "contrast",
    "finer",
    "key",
    "logit",
    "negative",
    "pixels",
    "probability",
    "similarity",
    "softmax",
]
