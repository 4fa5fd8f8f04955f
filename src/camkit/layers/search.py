"""The layer that a map is made at if none is named."""

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
    """The last spatial layer: what the model pools, flattens or picks a token from.

    Raises:
        ValueError: if there is none, or no module gives it.
    """
    return nearest_location(dry, _last_spatial(dry))


def _last_spatial(dry: DryRun) -> int:
    """The last spatial value: walks back from the output to those that have a spatial size."""
    found = _nearest_to_output(dry, dry.is_spatial)
    if found:
        return _last_shared(dry, found)
    # Perhaps of other rows than images: there are errors that say so.
    found = _nearest_to_output(dry, dry.grows)
    if not found:
        got = f"{dry.kind}, where nothing is spatial at input {checks.shape_of(dry.trace.input_shape[1:])}"
        raise ValueError(checks.error_message("model", "a model with a spatial layer", got))
    return max(found)


def _nearest_to_output(dry: DryRun, wanted: Callable[[int], bool]) -> list[int]:
    """The wanted values that are met first on the ways back from the output; the input's own are none."""
    trace = dry.trace
    found, seen, queue = [], set[int](), [trace.output]
    while queue:
        value = queue.pop()
        if value in seen or value == trace.input or value in trace.parameters:
            continue
        seen.add(value)
        if wanted(value) and not _is_the_input(trace, value):
            found.append(value)
        elif (operation := trace.producer(value)) is not None:
            queue.extend(operation.inputs)
    return found


def _is_the_input(trace: Trace, value: int) -> bool:
    """Whether a value is the input, scaled, padded or cut: nothing learnt is in it."""
    above = set(trace.ancestors(value))
    if trace.input not in above or not above.isdisjoint(trace.parameters):
        return False
    # Of a quantized model no weight is ever seen.
    return any(v in trace.parameters for operation in trace.operations for v in operation.inputs)


def _last_shared(dry: DryRun, spatial: Sequence[int]) -> int:
    """Of several spatial values the last.

    But a detector, whose output has not a row per image, has a head for each of several resolutions, side by
    side: there it is the last that all are made of, the end of the backbone.
    """
    trace = dry.trace
    made_of = {value: set(trace.ancestors(value)) for value in spatial}
    ends = [v for v in spatial if not any(v in made_of[w] for w in spatial if w != v)]
    has_heads = trace.shapes[trace.output][:1] != trace.input_shape[:1]
    if not has_heads or len({_size(dry, v) for v in ends}) == 1:
        return max(ends)
    shared = set.intersection(*(made_of[v] for v in ends)) & trace.from_input - {trace.input}
    again = [v for v in shared if dry.is_spatial(v)]
    return _last_shared(dry, again) if again else max(ends)


def _size(dry: DryRun, value: int) -> tuple[int, ...]:
    shape = dry.trace.shapes[value]
    try:
        layout = dry.layout(value)
    except ValueError:  # whichever way it reads
        layout = None
    return shape[2:] if layout is None else layout.size(shape)


def find_features(dry: DryRun) -> Location:
    """The last spatial layer of features.

    It is :func:`find_before_pooling`'s. But where that is class maps already, which are pooled or resized and
    no more (SqueezeNet, segmentation), it is what their convolution took in.

    Raises:
        ValueError: if there is none, or no module gives it.
    """
    return nearest_location(dry, _features(dry, _last_spatial(dry)))


def _features(dry: DryRun, value: int) -> int:
    """What the convolution took in that made ``value``, if that is class maps; else ``value``."""
    trace = dry.trace
    after = {o.name for o in trace.between(value, trace.output)}
    if not after <= POOLINGS | RESHAPES | ACTIVATIONS | RESIZES:
        return value
    operation = trace.producer(value)
    passed = set[str]()
    while operation is not None and operation.name in ACTIVATIONS | RESIZES | SUMS:
        if operation.name in SUMS and passed.isdisjoint(RESIZES):
            return value
        passed.add(operation.name)
        operation = trace.producer(max(operation.inputs))  # of a sum the way that was made last
    if operation is None or operation.name not in CONVOLUTIONS:
        return value
    # A model that ends in a convolution may be a trunk; in one that mixes channels only, it has class maps.
    if not after | passed and any(n > 1 for n in trace.shapes[operation.inputs[1]][2:]):
        return value
    return operation.inputs[0]


def find_for_gradient(dry: DryRun) -> Location:
    """The last spatial layer of which every position reaches the output.

    It is :func:`find_features`'; or, where no module gives that, the last layer before it that everything
    goes through. But of models that read one token only nothing of the others reaches the output after the
    last attention; there it is what that attention takes in.

    Raises:
        ValueError: if there is none.
    """
    last = _features(dry, _last_spatial(dry))
    try:
        place = nearest_location(dry, last)
        if math.prod(place.size) == 1:  # of which a map would show nothing
            place = next(_bottlenecks(dry, last), place)
    except ValueError:
        found = next(_bottlenecks(dry, last), None)
        if found is None:
            raise
        place = found
    earlier: Iterable[Location | None]
    if attentions := attentions_inside(place):
        earlier = (input_layer_of(dry, attention) for attention in attentions)
    elif reads_only_beside_grid(place):
        above = (input_layer_of(dry, attention) for attention in attentions_above(place))
        pictures = (p for p in _bottlenecks(dry, place.value) if p.layout.prefix + p.layout.suffix == 0)
        earlier = itertools.chain(above, pictures)
    else:
        return place
    return next(filter(None, earlier), place)


def _bottlenecks(dry: DryRun, last: int) -> Iterator[Location]:
    """The layers up to ``last`` that everything goes through, of two positions or more, the last first."""
    for value in dry.trace.bottlenecks(last):
        if dry.is_spatial(value) and is_only_output_of_a_layer(dry, value):
            place = nearest_location(dry, value)
            if math.prod(place.size) > 1:
                yield place


def find_stages(dry: DryRun) -> list[Location]:
    """The last layer of each resolution on the way to :func:`find_for_gradient`'s, that one included.

    It is the last of the outermost modules there. What only reduces the resolution (a pooling) is left out,
    and so is a resolution that one layer alone has (a first convolution with a stride).

    Raises:
        ValueError: if there is no spatial layer.
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
        except ValueError:  # no map can be made here
            continue
        stages.setdefault(place.size, []).append(place)
    stages.pop(last.size, None)
    several = [stage for stage in stages.values() if len(stage) > 1]
    return [*(min(reversed(stage), key=lambda place: place.name.count(".")) for stage in several), last]
