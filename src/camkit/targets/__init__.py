"""Targets: the question that a map answers, as a score that is computed from the model's output.

A target is passed to a method as ``target=``. It is ``None`` (the predicted class of each image), one or more
classes, the key of one entry of the output, or any function from the output to one score per image ``(N,)``
or K scores per image ``(N, K)``. The functions of this module make the usual ones::

    from camkit import targets

    explain = camkit.GradCAM(model)
    explain(x, 281)  # class 281 in every image
    explain(x, targets.contrast(281, 207))  # why class 281 rather than class 207
    explain(x, targets.key("out", targets.pixels(mask, 15)))  # category 15 in part of output["out"]
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
