"""The methods: one class for each, with its formula, its paper and its cost as class attributes."""

from camkit.methods.activation import FEM, KPCACAM, EigenCAM, RandomCAM
from camkit.methods.base import Method
from camkit.methods.cam import CAM
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
from camkit.methods.guided import GuidedGradCAM
from camkit.methods.legrad import LeGrad
from camkit.methods.perturbation import ISCAM, SSCAM, AblationCAM, PolyCAM, ScoreCAM
from camkit.methods.relevance import LIFTCAM, RelevanceCAM

#: The class of every method by its name. The documentation is generated from it, in this order.
METHODS: dict[str, type[Method]] = {
    method.__name__: method
    for method in (
        CAM,
        GradCAM,
        GradCAMPlusPlus,
        SmoothGradCAMPlusPlus,
        XGradCAM,
        HiResCAM,
        LayerCAM,
        EigenGradCAM,
        ShapleyCAM,
        FullGrad,
        GuidedGradCAM,
        EigenCAM,
        KPCACAM,
        FEM,
        RandomCAM,
        ScoreCAM,
        SSCAM,
        ISCAM,
        AblationCAM,
        PolyCAM,
        LeGrad,
        LIFTCAM,
        RelevanceCAM,
    )
}
