"""camkit shows where a network looked.

The nouns:

- A **layer** is what is tapped: a module, its dotted name, or nothing (found by a dry run).
- A **target** says what is explained: the predicted class, a class, several, or a function of the output.
- A **method** (:class:`CAM`, :class:`GradCAM`) explains a batch in one forward pass and leaves the model
  exactly as it was found.
- An :class:`Explanation` is the result: raw maps, the model's output, heatmaps in [0, 1].
- **Surgery** (:func:`attach_gap_head`) makes a network whose class activation maps are exact of any
  backbone.
- An **overlay** is a heatmap over a picture (:func:`overlay`, :func:`blend`, :func:`grid`).
"""

from importlib.metadata import version

from camkit.explainer import Explainer, Explanation
from camkit.layers import LayerInfo, list_layers
from camkit.maps import normalize
from camkit.methods.cam import CAM
from camkit.methods.gradient import GradCAM
from camkit.overlays import blend, colorize, denormalize, grid, overlay
from camkit.surgery import CAMHead, CAMNet, ClassMaps, attach_gap_head

__version__ = version("camkit")

__all__ = [
    "CAM",
    "CAMHead",
    "CAMNet",
    "ClassMaps",
    "Explainer",
    "Explanation",
    "GradCAM",
    "LayerInfo",
    "attach_gap_head",
    "blend",
    "colorize",
    "denormalize",
    "grid",
    "list_layers",
    "normalize",
    "overlay",
]
