"""The loader of a job: refusing unsuitable loaders, and reading the batches of the others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from camkit._tools import checks
from camkit._tools.nested import map_leaves
from camkit.model.inputs import Input
from camkit.targets.binding import Target

# The wording for read= in errors.
READ = "a function from a batch to (x, target)"


def require_sequential(loader: Any) -> None:
    """Raises unless a loader returns all items of a data set with indices, in order and in batches.

    Only then does the number of a shard determine its items.

    Raises:
        TypeError: if it is not a plain ``DataLoader``, or is one over an ``IterableDataset``.
        ValueError: if it has another order or no batch size, or leaves out items.
    """

    def refuse(kind: type[Exception], expected: str, got: object, hint: str = "") -> None:
        raise kind(checks.error_message("loader", expected, got, hint))

    part = "torch.utils.data.Subset makes a data set of a part of one, in any order"
    if not isinstance(loader, DataLoader):
        refuse(TypeError, "a torch.utils.data.DataLoader", type(loader).__name__)
    if isinstance(loader.dataset, IterableDataset):
        kind = type(loader.dataset).__name__
        refuse(TypeError, "one over a data set with indices", f"{kind}, an IterableDataset")
    # The items are loaded by a new loader, which would ignore the __iter__ of a subclass.
    if type(loader).__iter__ is not DataLoader.__iter__:
        got = f"{type(loader).__name__}, with an __iter__ of its own"
        refuse(TypeError, "a torch.utils.data.DataLoader", got, "collate_fn= and read= change batches")
    if loader.batch_size is None:
        got = "none" if loader.batch_sampler is None else f"{type(loader.batch_sampler).__name__}"
        refuse(ValueError, "one with a batch_size", got)
    # Test the exact type, since a subclass may use another order.
    if type(loader.sampler) is not SequentialSampler:
        shared = isinstance(loader.sampler, DistributedSampler)
        hint = "processes share the items out by themselves" if shared else part
        refuse(ValueError, "one in the data set's order", type(loader.sampler).__name__, hint)
    if len(loader.sampler) != len(loader.dataset):
        refuse(ValueError, f"one of all {len(loader.dataset)} items", len(loader.sampler), part)
    if loader.drop_last:
        refuse(ValueError, "one of all items", "drop_last=True", part)


def loader_with_batches(loader: DataLoader[Any], batches: Sequence[range]) -> DataLoader[Any]:
    """Makes a loader with the settings of ``loader`` that loads these batches of indices."""
    # A loader draws a seed for its workers from its generator. The new loader gets a generator of its own, so
    # that the draw changes neither torch's global random state nor the caller's generator.
    generator = torch.Generator()
    if loader.generator is not None:
        generator.set_state(loader.generator.get_state())
    return DataLoader(
        loader.dataset,
        batch_sampler=map(list, batches),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
    )


def read_batch(batch: Any, read: Callable[[Any], tuple[Input, Target]] | None) -> tuple[Input, Target]:
    """Returns the input and the target in a batch of the loader.

    Args:
        batch: the batch.
        read: the user's function from a batch to both. Without it the input is the batch or its first item,
            and the target is the predicted class.

    Raises:
        TypeError: if ``read`` returns anything but a pair; without it, if no input can be found in the batch.
    """
    if read is not None:
        pair: Any = read(batch)
        if not isinstance(pair, tuple) or len(pair) != 2:
            got = f"{len(pair)} items" if isinstance(pair, tuple) else type(pair).__name__
            raise TypeError(checks.error_message("read", READ, f"one to {got}"))
        return pair
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if not isinstance(batch, torch.Tensor | Mapping):
        raise TypeError(checks.error_message("read", READ, f"none, for batches of {type(batch).__name__}"))
    return batch, None


def move_to_device(x: Any, device: torch.device) -> Any:
    """Moves all tensors in the input ``x`` to ``device``."""
    # The encodings that image processors return are mappings but not dicts.
    nested = dict(x) if isinstance(x, Mapping) else x
    return map_leaves(lambda tensor: tensor.to(device), nested)
