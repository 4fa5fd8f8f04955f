"""A method over a whole data set: maps in shards, written as they come, by one process or by many."""

import copy
import datetime
import hashlib
import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from camkit import _checks, maps
from camkit._colormaps import TABLES
from camkit._modules import modules_of
from camkit._nested import mapped, tensors_in
from camkit.explainer import Explanation
from camkit.inputs import Input
from camkit.overlays import colorize
from camkit.smoothing import Smoothed
from camkit.targets import Target

_MANIFEST, _HEATMAPS, _PART = "manifest.json", "heatmaps", "part"
# Ranks wait for the slowest of them, however long it takes; one that dies breaks the connection.
_PATIENCE = datetime.timedelta(days=30)


def explain_dataset(
    method: Callable[[Any, Target], Explanation],
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
    model = _model_of(method)
    _check(loader, read, colormap, shard_size, progress)
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), None)
    folder = Path(folder)
    manifest = _manifest(method, model, loader, shard_size, colormap)
    step, shards = manifest["batch_size"], manifest["shards"]
    with _group() as group:
        rank, world = (0, 1) if group is None else (distributed.get_rank(), distributed.get_world_size())
        todo = _agreed(folder, manifest, group)[rank::world]
        ends = {n: shards[n]["first"] + shards[n]["count"] for n in todo}
        batches = [
            range(start, min(start + step, end))
            for n, end in ends.items()
            for start in range(shards[n]["first"], end, step)
        ]
        shown = batches if progress is None or rank > 0 else progress(batches)
        held: list[dict[str, np.ndarray[Any, Any]]] = []
        for indices, given in zip(shown, _loaded(loader, batches), strict=True):
            x, target = _read(given, read)
            explanation = method(x if device is None else _moved(x, device), target)
            held.append(_arrays(explanation, indices, held))
            if colormap is not None:
                _paint(folder / _HEATMAPS, explanation, indices, colormap)
            shard = shards[indices.start // shard_size]
            if indices.stop == shard["first"] + shard["count"]:
                whole: dict[str, Any] = {
                    key: np.concatenate([batch[key] for batch in held]) for key in held[0]
                }
                _write(folder / shard["file"], partial(np.savez, **whole))
                held = []
        if group is not None:
            distributed.barrier(group)
    return folder / _MANIFEST


def _model_of(method: Any) -> nn.Module:
    model = getattr(method, "model", None)
    if isinstance(method, type | nn.Module) or not callable(method) or not isinstance(model, nn.Module):
        got = method if isinstance(method, type) else type(method).__name__
        raise TypeError(_checks.complaint("method", "a method such as camkit.GradCAM(model)", got))
    _checks.has_numbers(modules_of(model))
    while isinstance(method, Smoothed):
        method = method.method
    if getattr(method, "differentiable", False):  # it runs in training mode, where maps depend on the order
        raise ValueError(_checks.complaint("method", "one with differentiable=False", "True"))
    return model


def _check(loader: Any, read: object, colormap: object, shard_size: object, progress: object) -> None:
    def refuse(kind: type[Exception], expected: str, got: object, hint: str = "") -> None:
        raise kind(_checks.complaint("loader", expected, got, hint))

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
            raise TypeError(_checks.complaint(name, expected, type(function).__name__))
    if colormap is not None:
        _checks.one_of("colormap", colormap, TABLES)
    _checks.positive("shard_size", shard_size)


def _manifest(
    method: Any, model: nn.Module, loader: DataLoader[Any], shard_size: int, colormap: str | None
) -> dict[str, Any]:
    """All that the files depend on, as far as it is known; the same at every start and in every process."""
    items = len(loader.dataset)  # type: ignore[arg-type]
    return {
        "camkit": version("camkit"),
        "method": _described(method),
        "model": type(model).__qualname__,
        "weights": _digest(model),
        "items": items,
        "batch_size": loader.batch_size,  # which changes rounding
        "colormap": colormap,
        "shard_size": shard_size,
        "shards": [
            {"file": f"shard-{n:05d}.npz", "first": first, "count": min(shard_size, items - first)}
            for n, first in enumerate(range(0, items, shard_size))
        ],
    }


def _described(method: Any) -> str:
    """A method in words, without what changes from process to process or nothing in the maps."""
    if isinstance(method, Smoothed):
        return f"Smoothed({_described(method.method)}, {_no_addresses(method.views)})"
    if getattr(method, "progress", None) is not None:
        method = copy.copy(method)
        method.progress = None
    return _no_addresses(method)


def _no_addresses(value: object) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers, of any type and on any device."""
    found = hashlib.sha256()
    # Quantized layers keep theirs in tuples; some buffers are in no state_dict.
    for name, value in (dict(model.named_buffers()) | model.state_dict()).items():
        for tensor in tensors_in(value):
            found.update(f"{name} {tensor.dtype} {_checks.shape_of(tensor)}\n".encode())
            numbers = tensor.detach().cpu()
            if numbers.is_quantized:
                numbers = numbers.dequantize()
            if numbers.layout != torch.strided:
                numbers = numbers.to_dense()
            numbers = numbers.resolve_conj().resolve_neg().contiguous().flatten()
            found.update(numbers.view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextmanager
def _group() -> Iterator["distributed.ProcessGroup | None"]:
    """The processes that share the job: a group of its own, on the CPU, for this time; none for one process.

    A group on GPUs would send what is agreed on by way of them, and give up on slow ranks too soon.
    """
    if not distributed.is_available():
        yield None
        return
    ours = not distributed.is_initialized()
    if ours and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # as torchrun sets it
        from torch.distributed.rendezvous import rendezvous

        store, rank, world = next(rendezvous("env://", timeout=_PATIENCE))
        store = _fresh(store, rank, world)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    elif ours or distributed.get_world_size() == 1:
        yield None
        return
    group: Any = distributed.group.WORLD if ours else distributed.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield group
    finally:
        distributed.destroy_process_group(group)


def _fresh(store: Any, rank: int, world: int) -> Any:
    """A part of a store that is new to all ranks.

    torchrun keeps one for all starts of a job. What a rank that was killed, or the last call, left there is
    taken for what the others are waiting for. So each rank asks by a name of its own, which is new, and the
    first one answers with another until all have it.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"camkit/{rank}", name)
        given = store.get(f"camkit/{name}").decode()
        store.set(f"camkit/{given}/{rank}", "")
        return PrefixStore(f"camkit/{given}", store)
    waiting = set(range(1, world))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"camkit/{other}"]):
                store.set(f"camkit/{store.get(f'camkit/{other}').decode()}", name)
            if store.check([f"camkit/{name}/{other}"]):
                waiting.remove(other)
        time.sleep(0.01)
    return PrefixStore(f"camkit/{name}", store)


def _agreed(
    folder: Path, manifest: dict[str, Any], group: "distributed.ProcessGroup | None"
) -> Sequence[int]:
    """The numbers of the shards still to do, as the first rank found them; or its error, on every rank."""
    if group is None:
        return _opened(folder, manifest)
    each: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(each, manifest, group)
    for other in each:
        _compare("method, loader", "the same in every process", each[0], other)
    found: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            found = [(_opened(folder, manifest), f"{_MANIFEST}.{uuid.uuid4().hex}.{_PART}")]
            (folder / found[0][1]).touch()
        except Exception as error:
            found = [error]
    distributed.broadcast_object_list(found, 0, group)
    if isinstance(found[0], Exception):
        raise found[0]
    todo, name = found[0]
    # On another machine the same path may be another folder, in which nobody would look for the shards.
    distributed.all_gather_object(each, (folder / name).exists(), group)
    (folder / name).unlink(missing_ok=True)
    if not all(each):
        got = f"another one in process {each.index(False)}"
        raise ValueError(_checks.complaint("folder", "one that all processes share", got))
    return todo  # type: ignore[no-any-return]


def _opened(folder: Path, manifest: dict[str, Any]) -> Sequence[int]:
    """The numbers of the shards still to do, in a folder that is ready for them."""
    path = folder / _MANIFEST
    there = {shard.name for shard in folder.glob("shard-*.npz")}
    if path.exists():
        _compare("folder", f"the job of its {_MANIFEST}", json.loads(path.read_text()), manifest)
    elif there:
        raise ValueError(_checks.complaint("folder", f"{_MANIFEST} beside {min(there)}", "none"))
    (folder if manifest["colormap"] is None else folder / _HEATMAPS).mkdir(parents=True, exist_ok=True)
    for name in (_MANIFEST, "shard-*.npz", f"{_HEATMAPS}/*.png"):
        for left_over in folder.glob(f"{name}.*.{_PART}"):
            left_over.unlink()
    if not path.exists():
        _write(path, lambda file: file.write((json.dumps(manifest, indent=1) + "\n").encode()))
    return [n for n, shard in enumerate(manifest["shards"]) if shard["file"] not in there]


def _compare(name: str, expected: str, there: dict[str, Any], came: dict[str, Any]) -> None:
    """Raise a ``ValueError`` unless two manifests are equal."""
    for key in there | came:
        if there.get(key) != came.get(key):
            expected = f"{expected}, with {key} {there.get(key)!r}"
            raise ValueError(_checks.complaint(name, expected, repr(came.get(key))))


def _loaded(loader: DataLoader[Any], batches: Sequence[range]) -> DataLoader[Any]:
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


def _read(batch: Any, read: Callable[[Any], tuple[Input, Target]] | None) -> tuple[Input, Target]:
    """The input and the target in a batch of the loader."""
    expected = "a function from a batch to (x, target)"
    if read is not None:
        found: Any = read(batch)
        if not isinstance(found, tuple) or len(found) != 2:
            got = f"{len(found)} items" if isinstance(found, tuple) else type(found).__name__
            raise TypeError(_checks.complaint("read", expected, f"one to {got}"))
        return found
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if not isinstance(batch, torch.Tensor | Mapping):
        raise TypeError(_checks.complaint("read", expected, f"none, for batches of {type(batch).__name__}"))
    return batch, None


def _moved(x: Any, device: torch.device) -> Any:
    nested = dict(x) if isinstance(x, Mapping) else x
    return mapped(lambda tensor: tensor.to(device), nested)


def _arrays(
    explanation: Explanation, indices: range, held: Sequence[Mapping[str, np.ndarray[Any, Any]]]
) -> dict[str, np.ndarray[Any, Any]]:
    """One batch of a shard, to be put behind those that are held."""
    found = {"index": np.asarray(indices), "maps": maps.wide(explanation.maps.detach()).cpu().numpy().copy()}
    if explanation.classes is not None:
        found["classes"] = explanation.classes.cpu().numpy()
    items = f"items {indices.start} to {indices.stop - 1}"
    if len(found["maps"]) != len(indices):
        got = f"{len(found['maps'])} maps for {items}"
        raise ValueError(_checks.complaint("loader", f"a batch of {len(indices)}", got))
    before, now = (
        f"maps of {_checks.shape_of(arrays['maps'].shape[1:])}{' with classes' * ('classes' in arrays)}"
        for arrays in (held[0] if held else found, found)
    )
    if before != now:
        hint = "a transform such as torchvision's Resize makes them alike"
        raise ValueError(
            _checks.complaint("loader", f"{before}, as before in its shard", f"{now} for {items}", hint)
        )
    return found


def _paint(folder: Path, explanation: Explanation, indices: range, colormap: str) -> None:
    """Writes the heatmaps of a batch, one picture for each."""
    if len(explanation.input_size) != 2:
        got = f"heatmaps of {_checks.shape_of(explanation.input_size)}"
        raise ValueError(_checks.complaint("colormap", "None where inputs are no images", got))
    values = explanation.heatmaps()
    if colormap != "gray":  # whose table rounds once more
        values = colorize(values, colormap).movedim(-3, -1)
    pixels = (values * 255).round().to(torch.uint8).cpu().numpy()
    several = explanation.maps.ndim > 3
    for index, of_item in zip(indices, pixels, strict=True):
        for k, picture in enumerate(of_item if several else [of_item]):
            name = f"{index:08d}-{k}.png" if several else f"{index:08d}.png"
            # A third of the time that the default takes, for files a third larger.
            save = partial(Image.fromarray(picture).save, format="PNG", compress_level=1)
            _write(folder / name, save)


def _write(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Writes a file that bears its name only when it is whole, and on the disk."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.{_PART}")
    try:
        with part.open("wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
