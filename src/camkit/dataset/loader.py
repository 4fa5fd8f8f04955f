"""The loader of a job, and the batches that it gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from camkit._tools import checks
from camkit._tools.colormaps import TABLES
from camkit._tools.nested import map_leaves
from camkit.model.inputs import Input
from camkit.targets.binding import Target


def check_arguments(
    loader: Any, read: object, colormap: object, shard_size: object, progress: object
) -> None:
    def refuse(kind: type[Exception], expected: str, got: object, hint: str = "") -> None:
        raise kind(checks.error_message("loader", expected, got, hint))

    part = "torch.utils.data.Subset makes a data set of a part of one, in any order"
    if not isinstance(loader, DataLoader):
        refuse(TypeError, "a torch.utils.data.DataLoader", type(loader).__name__)
    if isinstance(loader.dataset, IterableDataset):
        kind = type(loader.dataset).__name__
        refuse(TypeError, "one over a data set with indices", f"{kind}, an IterableDataset")
    if type(loader).__iter__ is not DataLoader.__iter__:
        got = f"{type(loader).__name__}, with an __iter__ of its own"
        refuse(TypeError, "a torch.utils.data.DataLoader", got, "collate_fn= and read= change batches")
    if loader.batch_size is None:
        got = "none" if loader.batch_sampler is None else f"{type(loader.batch_sampler).__name__}"
        refuse(ValueError, "one with a batch_size", got)
    if type(loader.sampler) is not SequentialSampler:
        shared = isinstance(loader.sampler, DistributedSampler)
        hint = "processes share the items out by themselves" if shared else part
        refuse(ValueError, "one in the data set's order", type(loader.sampler).__name__, hint)
    if len(loader.sampler) != len(loader.dataset):
        refuse(ValueError, f"one of all {len(loader.dataset)} items", len(loader.sampler), part)
    if loader.drop_last:
        refuse(ValueError, "one of all items", "drop_last=True", part)
    for name, function, expected in (
        ("read", read, "a function from a batch to (x, target)"),
        ("progress", progress, "a function that wraps an iterable, such as tqdm.tqdm"),
    ):
        if function is not None and not callable(function):
            raise TypeError(checks.error_message(name, expected, type(function).__name__))
    if colormap is not None:
        checks.one_of("colormap", colormap, TABLES)
    checks.positive("shard_size", shard_size)


def load_batches(loader: DataLoader[Any], batches: Sequence[range]) -> DataLoader[Any]:
    """A loader with the same settings, of these batches."""
    # A loader draws a seed for its workers: neither from the global state nor from the caller's.
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
    """The input and the target in a batch of the loader."""
    expected = "a function from a batch to (x, target)"
    if read is not None:
        found: Any = read(batch)
        if not isinstance(found, tuple) or len(found) != 2:
            got = f"{len(found)} items" if isinstance(found, tuple) else type(found).__name__
            raise TypeError(checks.error_message("read", expected, f"one to {got}"))
        return found
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if not isinstance(batch, torch.Tensor | Mapping):
        raise TypeError(
            checks.error_message("read", expected, f"none, for batches of {type(batch).__name__}")
        )
    return batch, None


def move_to_device(x: Any, device: torch.device) -> Any:
    nested = dict(x) if isinstance(x, Mapping) else x
    return map_leaves(lambda tensor: tensor.to(device), nested)
