"""camkit shows where a network looked: class activation maps for PyTorch models.

A network that classifies images computes feature maps. In its last layers these are still pictures, only
smaller, with 7 x 7 positions for example. A class activation map (CAM) combines them into one picture that
shows which positions speak for a class. To explain a prediction, wrap the model in a method and call it with
images::

    explanation = camkit.GradCAM(model)(x)  # x: images as the model takes them, (N, C, H, W)
    explanation.heatmaps()  # (N, H, W), in [0, 1]

The nouns of the library, in the order in which a call meets them:

- The **model** is any ``torch.nn.Module``. A call leaves it exactly as it was found: its parameters, mode,
  buffers and hooks, and the random state. The only exception is ``differentiable=True``, for losses on maps,
  where the call is part of a training step.
- The **inputs** (:class:`Inputs`) are the images, together with everything else that the model takes, such as
  a mask.
- A **layer** is the module whose output the map is made of. Name it with ``layer=``, or let camkit choose
  one. :func:`list_layers` lists the layers that have positions, each as a :class:`LayerInfo`.
- The **activation** is the output of the layer, read as ``(N, C, h, w)``: N images, C channels (one feature
  map each), and positions. A :class:`Layout` says how to read it if the layer puts the channels last, or
  returns tokens.
- A **target** is the question to answer, as a number that is computed from the model's output, the **score**.
  By default it is the logit of the predicted class. It can be any class, several classes, one of
  :mod:`camkit.targets`, or a function of your own.
- A **method** is a way to make a map, usually a formula of the activation: :class:`CAM`, :class:`GradCAM`,
  :class:`ScoreCAM` and others. :data:`METHODS` has them all by name. All derive from :class:`Method`, and
  those that make their map at a layer from :class:`Explainer`. Derive from that class to try a formula of
  your own.
- The **evidence** (:class:`Evidence`) is everything that such a formula can use at one layer: the activation,
  the score and its gradient, and further passes of the model.
- An :class:`Explanation` is the result: raw **maps**, usually with the size of the layer, such as 7 x 7, the
  model's output, and the target that was explained. Its **heatmaps** are the maps scaled to [0, 1], as by
  :func:`normalize`, with the size of the images.
- An **overlay** is a heatmap in colours over a picture. :func:`overlay` makes one picture, :func:`blend` and
  :func:`colorize` work on batches of tensors, and :func:`grid` puts pictures side by side.
  :func:`denormalize` turns the images of the model back into pictures.

Around these:

- **Smoothing** (:class:`Smoothed`) averages the maps of a method over several **views** (:class:`View`),
  changed copies of the images: with noise (:func:`noise_views`) or mirrored (:func:`flip_views`).
- **Guided backpropagation** (:func:`guided_backprop`) is a gradient with respect to the images. It shows
  pixels instead of positions.
- **Surgery** (:func:`attach_gap_head`) copies a model and replaces its end by global pooling and one new
  linear layer, which you then train. The class activation maps of the result, a :class:`CAMNet`, are exact:
  with average pooling, the mean of a map plus the bias is the logit.
- **Deployment** (:func:`export`, :func:`export_onnx`) writes a :class:`CAMNet` together with its maps as one
  graph, which runs without camkit.
- A **data set job** (:func:`explain_dataset`) explains a whole data set, and writes the maps to a folder.
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

# Public classes say that they are defined in `camkit` itself. Otherwise a pickle or an error message would
# name the file that defines them today, and a pickle would break if the class moved to another file.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
