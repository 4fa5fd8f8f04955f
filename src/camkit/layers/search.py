"""Finding the layer at which a map is made if the user names none.

Every search walks back from the model's output through the recorded operations of a dry run, and stops on
each path at the first value that is spatial (see :mod:`camkit.layers.dryrun`). In ResNet it passes the logits
and the pooled activation and stops at the output of ``layer4``. This last spatial layer does not suit every
method, so there are four searches:

- :func:`find_before_pooling`, for :class:`camkit.CAM`, always returns it.
- :func:`find_features`, for :func:`camkit.attach_gap_head`, returns it unless it outputs class maps. Then it
  returns the features that these are computed from.
- :func:`find_for_gradient`, for Grad-CAM and most other methods, returns the layer of :func:`find_features`
  unless the score has no gradient at its positions. Then it returns an earlier layer.
- :func:`find_stages`, for :class:`camkit.PolyCAM`, returns the last layer of each resolution, up to that of
  :func:`find_for_gradient`.

For most classifiers of images the first three return the same layer.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from camkit._tools import checks
from camkit.functions import ACTIVATIONS, CONVOLUTIONS, POOLINGS, RESHAPES, RESIZES, SUMS
from camkit.layers.attention import (
    attentions_above,
    attentions_inside,
    input_layer_of,
    reads_only_beside_grid,
)
from camkit.layers.dryrun import DryRun
from camkit.layers.location import Location, is_only_output_of_a_layer, locate, nearest_location
from camkit.layers.trace import Trace


def find_before_pooling(dry: DryRun) -> Location:
    """Returns the last spatial layer: the one that the model pools, flattens or picks a token from.

    :class:`camkit.CAM` uses it, because its map is exact for the very activation that is pooled. SqueezeNet
    pools a map for each class, for example, and CAM returns these maps.

    Raises:
        ValueError: if the model has no spatial layer, or if no module outputs the last spatial value.
    """
    return nearest_location(dry, _last_spatial(dry))


def _last_spatial(dry: DryRun) -> int:
    """Returns the last spatial value of the model."""
    found = _nearest_to_output(dry, dry.is_spatial)
    if found:
        return _last_shared(dry, found)
    # A value that grows with the input may not have one row per image. Return it nevertheless: the error that
    # nearest_location then raises helps the user more than the one below.
    found = _nearest_to_output(dry, dry.grows)
    if not found:
        got = f"{dry.kind}, where nothing is spatial at input {checks.shape_of(dry.trace.input_shape[1:])}"
        raise ValueError(checks.error_message("model", "a model with a spatial layer", got))
    return max(found)


def _nearest_to_output(dry: DryRun, wanted: Callable[[int], bool]) -> list[int]:
    """Returns the first wanted value on each path back from the output, the input itself excluded."""
    trace = dry.trace
    found, seen, queue = [], set[int](), [trace.output]
    while queue:
        value = queue.pop()
        if value in seen or value == trace.input or value in trace.parameters:
            continue
        seen.add(value)
        if wanted(value) and not _is_transformed_input(trace, value):
            found.append(value)
        elif (operation := trace.producer(value)) is not None:
            queue.extend(operation.inputs)
    return found


def _is_transformed_input(trace: Trace, value: int) -> bool:
    """Whether a value is only the input, scaled, padded or cropped: it was made without any parameter."""
    above = set(trace.ancestors(value))
    if trace.input not in above or not above.isdisjoint(trace.parameters):
        return False
    # A quantized model passes its weights in packed objects, which the record does not show. No value of such
    # a model has a parameter among its ancestors, so the test above says nothing about it.
    return any(v in trace.parameters for operation in trace.operations for v in operation.inputs)


def _last_shared(dry: DryRun, spatial: Sequence[int]) -> int:
    """Returns the last of several spatial values.

    A detector, whose output does not have one row per image, is an exception. It has heads at several
    resolutions side by side, and the last of these values would belong to one head only. For a detector, the
    result is the last spatial value that all heads are computed from, which is the end of the backbone.
    """
    trace = dry.trace
    made_of = {value: set(trace.ancestors(value)) for value in spatial}
    ends = [v for v in spatial if not any(v in made_of[w] for w in spatial if w != v)]
    has_heads = trace.shapes[trace.output][:1] != trace.input_shape[:1]
    if not has_heads or len({_spatial_size(dry, v) for v in ends}) == 1:
        return max(ends)
    shared = set.intersection(*(made_of[v] for v in ends)) & trace.from_input - {trace.input}
    shared_spatial = [v for v in shared if dry.is_spatial(v)]
    return _last_shared(dry, shared_spatial) if shared_spatial else max(ends)


def _spatial_size(dry: DryRun, value: int) -> tuple[int, ...]:
    """Returns the spatial size of a value, read as channels first if its layout is ambiguous."""
    shape = dry.trace.shapes[value]
    try:
        layout = dry.layout(value)
    except ValueError:
        layout = None
    return shape[2:] if layout is None else layout.size(shape)


def find_features(dry: DryRun) -> Location:
    """Returns the last spatial layer that outputs features rather than class maps.

    :func:`camkit.attach_gap_head` uses it, because a new head needs features. It is the layer of
    :func:`find_before_pooling`, except where that layer already outputs a map for each class, which the model
    only pools or resizes (SqueezeNet, segmentation). Then it is the layer whose output is the input of the
    convolution that makes these class maps.

    Raises:
        ValueError: if the model has no spatial layer, or if no module outputs the value that was found.
    """
    return nearest_location(dry, _last_features(dry, _last_spatial(dry)))


def _last_features(dry: DryRun, value: int) -> int:
    """Returns the input of the convolution that made ``value`` if it is class maps, else ``value``."""
    trace = dry.trace
    after = {o.name for o in trace.between(value, trace.output)}
    if not after <= POOLINGS | RESHAPES | ACTIVATIONS | RESIZES:
        return value  # a linear layer or the like follows, so these are features
    # Walk back to the convolution through functions that keep one map for each class.
    operation = trace.producer(value)
    passed = set[str]()
    while operation is not None and operation.name in ACTIVATIONS | RESIZES | SUMS:
        # A segmentation network adds up class maps of several resolutions, which it has to resize. A sum
        # without a resize is the end of a residual block.
        if operation.name in SUMS and passed.isdisjoint(RESIZES):
            return value
        passed.add(operation.name)
        operation = trace.producer(max(operation.inputs))  # the summand that was made last
    if operation is None or operation.name not in CONVOLUTIONS:
        return value
    # A model that ends right after a convolution may be a trunk without a head, whose output is features.
    # Only a 1 x 1 convolution is taken to make class maps there.
    if not after | passed and any(n > 1 for n in trace.shapes[operation.inputs[1]][2:]):
        return value
    return operation.inputs[0]


def find_for_gradient(dry: DryRun) -> Location:
    """Returns the last spatial layer at which the score has a gradient at every position.

    Grad-CAM and all methods without a search of their own use it. It is the layer of :func:`find_features`,
    except in three cases:

    - If no module outputs that value, or if it has a single position, it is the last layer before it with two
      positions or more that all paths from the input pass through.
    - If the layer is a part of an attention, such as its projection to keys, it is the layer whose output is
      the input of that attention.
    - If the model reads the class token only and no attention follows the layer, it is the layer whose output
      is the input of the last attention. After that attention the other tokens no longer reach the output, so
      their gradient is zero.

    Raises:
        ValueError: if the model has no such layer.
    """
    last = _last_features(dry, _last_spatial(dry))
    try:
        place = nearest_location(dry, last)
        if math.prod(place.size) == 1:  # a map of one position shows nothing
            place = next(_bottleneck_layers(dry, last), place)
    except ValueError:
        found = next(_bottleneck_layers(dry, last), None)
        if found is None:
            raise
        place = found
    earlier: Iterable[Location | None]
    if attentions := attentions_inside(place):
        earlier = (input_layer_of(dry, attention) for attention in attentions)
    elif reads_only_beside_grid(place):
        above = (input_layer_of(dry, attention) for attention in attentions_above(place))
        # If no such layer is found, fall back to the last one before the class token is joined.
        maps = (p for p in _bottleneck_layers(dry, place.value) if p.layout.prefix + p.layout.suffix == 0)
        earlier = itertools.chain(above, maps)
    else:
        return place
    return next(filter(None, earlier), place)


def _bottleneck_layers(dry: DryRun, last: int) -> Iterator[Location]:
    """Yields the layers with two positions or more on all paths to ``last``, the last layer first."""
    for value in dry.trace.bottlenecks(last):
        if dry.is_spatial(value) and is_only_output_of_a_layer(dry, value):
            place = nearest_location(dry, value)
            if math.prod(place.size) > 1:
                yield place


def find_stages(dry: DryRun) -> list[Location]:
    """Returns the last layer of each resolution, in order; the last is that of :func:`find_for_gradient`.

    :class:`camkit.PolyCAM` uses them to refine a coarse map by finer ones. The outermost of nested modules is
    taken: a whole stage rather than its last ReLU. Poolings are left out, and so are resolutions with only
    one layer, such as that of a first convolution with a stride.

    Raises:
        ValueError: if the model has no spatial layer.
    """
    trace, last = dry.trace, find_for_gradient(dry)
    above = set(trace.ancestors(last.value)) & trace.from_input
    stages: dict[tuple[int, ...], list[Location]] = {}
    for name, value in trace.calls:
        operation = trace.producer(value) if value in above else None
        if operation is None or operation.name in POOLINGS or trace.outputs_of(name) != [value]:
            continue
        try:
            place = locate(dry, name)
        except ValueError:  # no map can be made at this layer
            continue
        stages.setdefault(place.size, []).append(place)
    # The last resolution is represented by the layer for the gradient, whatever other layers have its size.
    stages.pop(last.size, None)
    several = [stage for stage in stages.values() if len(stage) > 1]
    # The outermost module has the fewest dots in its name. Among several of these, take the last one.
    return [*(min(reversed(stage), key=lambda place: place.name.count(".")) for stage in several), last]
