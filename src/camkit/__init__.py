"""camkit shows where a network looked.

The nouns:

- A **layer** is what is tapped: a module, its dotted name, several, or nothing (found by a dry run).
- A **target** says what is explained: the predicted class, a class, several, one of :mod:`camkit.targets`, or
  a function of the output.
- A **method** (:class:`CAM`, :class:`GradCAM`, :class:`ScoreCAM`, ...; :data:`METHODS` names them all)
  explains a batch and leaves the model exactly as it was found.
- An :class:`Explanation` is the result: raw maps, the model's output, heatmaps in [0, 1].
- **Surgery** (:func:`attach_gap_head`) makes a network whose class activation maps are exact of any
  backbone.
- **Smoothing** (:class:`Smoothed`) averages a method's maps over views of the input.
- An **overlay** is a heatmap over a picture (:func:`overlay`, :func:`blend`, :func:`grid`).
"""

from importlib.metadata import version

from camkit import targets
from camkit.dataset.job import explain_dataset
from camkit.deployment import export, export_onnx
from camkit.layers.layouts import Layout
from camkit.layers.location import LayerInfo, list_layers
from camkit.maps import normalize
from camkit.methods import METHODS
from camkit.methods.activation import FEM, KPCACAM, EigenCAM, RandomCAM
from camkit.methods.base import Explanation, Method
from camkit.methods.cam import CAM
from camkit.methods.explainer import Explainer
from camkit.methods.fullgrad import FullGrad
from camkit.methods.gradient import (
    EigenGradCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    ShapleyCAM,
    SmoothGradCAMPlusPlus,
    XGradCAM,
)
from camkit.methods.guided import GuidedGradCAM, guided_backprop
from camkit.methods.legrad import LeGrad
from camkit.methods.perturbation import ISCAM, SSCAM, AblationCAM, PolyCAM, ScoreCAM
from camkit.methods.relevance import LIFTCAM, RelevanceCAM
from camkit.methods.smoothing import Smoothed, View, flip_views, noise_views
from camkit.model.inputs import Inputs
from camkit.overlays import blend, colorize, denormalize, grid, overlay
from camkit.passes.evidence import Evidence
from camkit.surgery import CAMHead, CAMNet, ClassMaps, attach_gap_head

__version__ = version("camkit")
__all__ = [
    "CAM",
    "FEM",
    "ISCAM",
    "KPCACAM",
    "LIFTCAM",
    "METHODS",
    "SSCAM",
    "AblationCAM",
    "CAMHead",
    "CAMNet",
    "ClassMaps",
    "EigenCAM",
    "EigenGradCAM",
    "Evidence",
    "Explainer",
    "Explanation",
    "FullGrad",
    "GradCAM",
    "GradCAMPlusPlus",
    "GuidedGradCAM",
    "HiResCAM",
    "Inputs",
    "LayerCAM",
    "LayerInfo",
    "Layout",
    "LeGrad",
    "Method",
    "PolyCAM",
    "RandomCAM",
    "RelevanceCAM",
    "ScoreCAM",
    "ShapleyCAM",
    "SmoothGradCAMPlusPlus",
    "Smoothed",
    "View",
    "XGradCAM",
    "attach_gap_head",
    "blend",
    "colorize",
    "denormalize",
    "explain_dataset",
    "export",
    "export_onnx",
    "flip_views",
    "grid",
    "guided_backprop",
    "list_layers",
    "noise_views",
    "normalize",
    "overlay",
    "targets",
]

# Public classes live in `camkit` and nowhere else: pickles and error texts stay valid if a file moves.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
