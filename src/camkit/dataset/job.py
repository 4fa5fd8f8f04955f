"""A method over a whole data set: maps in shards, written as they come, by one process or by many."""

import itertools
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed
from torch.utils.data import DataLoader

from camkit._tools import checks
from camkit.dataset.files import HEATMAPS, MANIFEST, to_arrays, write_atomically, write_heatmaps
from camkit.dataset.loader import check_arguments, load_batches, move_to_device, read_batch
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
    """Explains every item of a data set, and writes the maps to a folder as they come.

    A job that was stopped, at whatever moment and by whatever, goes on where it was when it is started again,
    and ends with the same files, byte for byte if the data set gives the same items and the method the same
    maps. No file under its final name is ever half-written. Under ``torchrun``, or in a process group of
    ``torch.distributed``, each process takes its share of what is still to do, on one machine or on several
    with one file system; their number may change from start to start.

    The folder then holds

    - ``shard-00000.npz``, ...: for each ``shard_size`` items of the data set ``index`` ``(n,)``, ``maps``
      ``(n, h, w)`` or ``(n, K, h, w)``, raw, in single precision or better, and ``classes`` ``(n,)`` or
      ``(n, K)`` if the target is about classes; :func:`numpy.load` reads it;
    - ``heatmaps/00000000.png``, ... if there is a ``colormap``; of K maps ``00000000-0.png`` and so on;
    - ``manifest.json``: what was explained by what, and the list of shards. A later start must agree with it.
      What the items are, what ``read`` makes of them, and the settings of methods and views whose ``repr``
      does not show them, it does not know: another job needs another folder.

    Args:
        method: any method, such as ``camkit.GradCAM(model)``; also :class:`camkit.Smoothed`.
        loader: gives the items of a data set in their order, with a ``batch_size``. Only what is still to do
            is loaded, with the loader's settings; no batch reaches over the end of a shard.
        folder: where to write; made if it is not there.
        read: from a batch of the loader to ``(x, target)``, as the method takes them; ``x`` is then moved to
            the model's device. If not given: the batch itself where it is a tensor or a dict, the first item
            of a list or tuple (the images of images and labels); and the predicted classes.
        colormap: writes each heatmap, too, at the input's size in these colours: see :func:`overlay`. With
            ``"gray"`` a pixel is the number, 255 for 1.
        shard_size: number of items in one file. The maps of so many are held in memory.
        progress: shows how far the first process got, in batches: a function that wraps an iterable with a
            length, such as ``tqdm.tqdm``.

    Returns:
        Path: of the manifest, which names all shards.

    Raises:
        ValueError: for a loader in another order than the data set's, without a batch size or without the
            last batch; for a folder that another job wrote to; for maps of several sizes in one shard, or
            other than one for each item; for heatmaps of what is no image; for processes with a folder each;
            whatever else the method raises.
        TypeError: for a method, a loader or a batch of another kind.

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
    check_arguments(loader, read, colormap, shard_size, progress)
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), None)
    folder = Path(folder)
    manifest = make_manifest(method, model, loader, shard_size, colormap)
    step, shards = manifest["batch_size"], manifest["shards"]
    with process_group() as group:
        rank, world = (0, 1) if group is None else (distributed.get_rank(), distributed.get_world_size())
        todo = agree_on_shards(folder, manifest, group)[rank::world]
        ends = {n: shards[n]["first"] + shards[n]["count"] for n in todo}
        batches = [
            range(start, min(start + step, end))
            for n, end in ends.items()
            for start in range(shards[n]["first"], end, step)
        ]
        shown = batches if progress is None or rank > 0 else progress(batches)
        held: list[dict[str, np.ndarray[Any, Any]]] = []
        for indices, given in zip(shown, load_batches(loader, batches), strict=True):
            x, target = read_batch(given, read)
            explanation = method(x if device is None else move_to_device(x, device), target)
            held.append(to_arrays(explanation, indices, held))
            if colormap is not None:
                write_heatmaps(folder / HEATMAPS, explanation, indices, colormap)
            shard = shards[indices.start // shard_size]
            if indices.stop == shard["first"] + shard["count"]:
                whole: dict[str, Any] = {
                    key: np.concatenate([batch[key] for batch in held]) for key in held[0]
                }
                write_atomically(folder / shard["file"], partial(np.savez, **whole))
                held = []
        if group is not None:
            distributed.barrier(group)
    return folder / MANIFEST


def _check_method(method: object) -> Method:
    found = require_method(method)
    require_numbers(modules_of(found.model))
    # A differentiable method runs in the model's own mode; in training mode, maps depend on the other images.
    if found.differentiable:
        raise ValueError(checks.error_message("method", "one with differentiable=False", "True"))
    return found
