"""Explaining a whole data set: one process or several write the maps to a folder in shards."""

import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import distributed
from torch.utils.data import DataLoader

from camkit._tools import checks
from camkit._tools.colormaps import TABLES
from camkit.dataset.files import (
    HEATMAPS,
    MANIFEST,
    Arrays,
    batch_to_arrays,
    require_alike,
    write_heatmaps,
    write_shard,
)
from camkit.dataset.loader import (
    READ,
    loader_with_batches,
    move_to_device,
    read_batch,
    require_sequential,
)
from camkit.dataset.manifest import make_manifest
from camkit.dataset.processes import agree_on_shards, process_group
from camkit.methods.base import Method, require_method
from camkit.model.inputs import Input
from camkit.model.modules import modules_of, require_numbers
from camkit.targets.binding import Target


def explain_dataset(
    method: Method,
    loader: DataLoader[Any],
    folder: str | os.PathLike[str],
    *,
    read: Callable[[Any], tuple[Input, Target]] | None = None,
    colormap: str | None = None,
    shard_size: int = 1024,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Path:
    """Explains every item of a data set and writes the maps to a folder.

    A job that was stopped in any way, at any moment, continues with its missing shards when you start it
    again. It ends with the same files, byte for byte if the data set returns the same items and the method
    the same maps.
    No file under its final name is ever incomplete. Under ``torchrun``, or in a process group of
    ``torch.distributed``, each process takes its share of the missing shards. The processes may run on
    several machines with one file system, and their number may change between starts.

    The folder then holds

    - ``shard-00000.npz``, ...: one file for each ``shard_size`` items, to be read by :func:`numpy.load`. It
      holds ``index`` ``(n,)``, the numbers of the items; ``maps`` ``(n, h, w)`` or ``(n, K, h, w)``, raw, in
      single precision or better; and, if the target is about classes, ``classes`` ``(n,)`` or ``(n, K)``;
    - ``heatmaps/00000000.png``, ... if ``colormap`` is given; for K maps per item ``00000000-0.png`` and so
      on;
    - ``manifest.json``: a description of the job, and the list of shards. A later start must agree with it.
      It does not record the content of the items, the function ``read``, or settings of methods and views
      that their ``repr`` does not show. Use another folder when one of these changes.

    Args:
        method: any method, such as ``camkit.GradCAM(model)`` or a :class:`camkit.Smoothed` one.
        loader: a ``DataLoader`` over a data set with indices, in the order of the data set and with a
            ``batch_size``. Only the items of missing shards are loaded, with the settings of the loader. No
            batch crosses the end of a shard.
        folder: the folder to write to; it is made if it does not exist.
        read: a function from a batch of the loader to ``(x, target)``, as the method takes them; ``x`` is
            then moved to the device of the model. By default ``x`` is the batch itself if it is a tensor or
            a dict, and its first item if it is a list or tuple, such as images and labels. The target is
            then each image's predicted class.
        colormap: also writes each heatmap at the size of the input, in these colours; see :func:`overlay`.
            With ``"gray"`` a pixel is 255 times the value of the heatmap, rounded.
        shard_size: number of items in one file. The maps of one shard are held in memory.
        progress: a function that wraps an iterable with a length, such as ``tqdm.tqdm``, to show how many
            batches the first process has done.

    Returns:
        Path: the path of the manifest, which lists all shards.

    Raises:
        ValueError: for a loader that has another order than the data set, has no batch size or drops the
            last batch; for a folder of another job, or one that the processes do not share; if a batch has
            another number of maps than of items; if the maps of one shard differ in size, or only some have
            classes; for a ``colormap`` that is unknown, or if the inputs are not images; for a ``shard_size``
            below one; for a method with ``differentiable=True``; for the reasons of the method itself.
        TypeError: for a method, a loader, a batch or another argument of the wrong type.

    Example:
        >>> import camkit, tempfile, torch, torchvision
        >>> images = torch.utils.data.TensorDataset(torch.rand(5, 3, 64, 64))
        >>> loader = torch.utils.data.DataLoader(images, batch_size=2)
        >>> gradcam = camkit.GradCAM(torchvision.models.resnet18())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     camkit.explain_dataset(gradcam, loader, folder).name
        'manifest.json'
    """
    model = _check_method(method).model
    require_sequential(loader)
    _check_options(read, colormap, shard_size, progress)
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), None)
    folder = Path(folder)
    manifest = make_manifest(method, model, loader, shard_size, colormap)
    shards = manifest["shards"]
    with process_group() as group:
        rank, world = (0, 1) if group is None else (distributed.get_rank(), distributed.get_world_size())
        todo = agree_on_shards(folder, manifest, group)[rank::world]
        batches = [batch for n in todo for batch in _batches_of(shards[n], manifest["batch_size"])]
        shown = batches if progress is None or rank > 0 else progress(batches)
        held: list[Arrays] = []  # the batches of the current shard
        for indices, batch in zip(shown, loader_with_batches(loader, batches), strict=True):
            x, target = read_batch(batch, read)
            explanation = method(x if device is None else move_to_device(x, device), target)
            arrays = batch_to_arrays(explanation, indices)
            if held:
                require_alike(held[0], arrays, indices)
            held.append(arrays)
            # The heatmaps come before their shard: a shard that exists is never made again.
            if colormap is not None:
                write_heatmaps(folder / HEATMAPS, explanation, indices, colormap)
            shard = shards[indices.start // shard_size]
            if indices.stop == shard["first"] + shard["count"]:
                write_shard(folder / shard["file"], held)
                held = []
        # When this function returns in one process, the shards of all processes are there.
        if group is not None:
            distributed.barrier(group)
    return folder / MANIFEST


def _batches_of(shard: dict[str, Any], batch_size: int) -> list[range]:
    """Returns the numbers of the items in each batch of a shard; its last batch may be smaller."""
    end = shard["first"] + shard["count"]
    return [range(start, min(start + batch_size, end)) for start in range(shard["first"], end, batch_size)]


def _check_method(method: object) -> Method:
    """Returns ``method`` if it can explain a data set.

    Raises:
        TypeError: if it is not a method.
        ValueError: if it is differentiable, or if its model has no weights yet.
    """
    checked = require_method(method)
    require_numbers(modules_of(checked.model))
    # A differentiable method runs the model in its own mode. In training mode the map of an image depends on
    # the other images of its batch.
    if checked.differentiable:
        raise ValueError(checks.error_message("method", "one with differentiable=False", "True"))
    return checked


def _check_options(read: object, colormap: object, shard_size: object, progress: object) -> None:
    """Raises a ``TypeError`` or ``ValueError`` for an option that :func:`explain_dataset` cannot take."""
    checks.optional_function("read", READ, read)
    checks.optional_function("progress", checks.PROGRESS, progress)
    if colormap is not None:
        checks.one_of("colormap", colormap, TABLES)
    checks.positive("shard_size", shard_size)
