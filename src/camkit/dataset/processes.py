"""The processes that share a job: finding each other, and agreeing on the shards to write."""

import datetime
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed

from camkit._tools import checks
from camkit.dataset.files import MANIFEST, partial_file
from camkit.dataset.manifest import prepare_folder, require_equal_manifests

# Ranks that are done wait for the slowest one, which may take days. A rank that dies still ends their wait,
# because its connection breaks.
_TIMEOUT = datetime.timedelta(days=30)


@contextmanager
def process_group() -> Iterator["distributed.ProcessGroup | None"]:
    """Connects the processes that share the job while its ``with`` block runs.

    The group is a new one on the CPU. A group that the caller has may be one on GPUs: it would send our
    messages through the GPUs, and its timeout may be too short for slow ranks.

    Yields:
        The process group; ``None`` if this process is alone.
    """
    if not distributed.is_available():
        yield None
        return
    # If the caller has initialised torch.distributed already, only add a group to it.
    initialise = not distributed.is_initialized()
    if initialise and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun sets WORLD_SIZE
        from torch.distributed.rendezvous import rendezvous

        store, rank, world = next(rendezvous("env://", timeout=_TIMEOUT))
        store = _agree_on_new_store(store, rank, world)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    elif initialise or distributed.get_world_size() == 1:
        yield None
        return
    group: Any = (
        distributed.group.WORLD if initialise else distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    )
    try:
        yield group
    finally:
        distributed.destroy_process_group(group)


def _agree_on_new_store(store: Any, rank: int, world: int) -> Any:
    """Returns a part of ``store`` under a prefix that no earlier call has used, the same for all ranks.

    torchrun keeps one store for all starts of a job. An entry that an earlier call or a killed rank left
    there would be read as a new message. Therefore each rank makes up a name and asks for the prefix under
    that name, and rank 0 answers each name until every rank has confirmed the prefix.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"camkit/{rank}", name)
        prefix = store.get(f"camkit/{name}").decode()  # waits for the answer of rank 0
        store.set(f"camkit/{prefix}/{rank}", "")
        return PrefixStore(f"camkit/{prefix}", store)
    unconfirmed = set(range(1, world))
    while unconfirmed:
        for other in sorted(unconfirmed):
            # The name may be one that a killed rank left. Then nobody reads this answer, and the next round
            # answers the name of the rank that took its place.
            if store.check([f"camkit/{other}"]):
                store.set(f"camkit/{store.get(f'camkit/{other}').decode()}", name)
            if store.check([f"camkit/{name}/{other}"]):
                unconfirmed.remove(other)
        time.sleep(0.01)
    return PrefixStore(f"camkit/{name}", store)


def agree_on_shards(
    folder: Path, manifest: dict[str, Any], group: "distributed.ProcessGroup | None"
) -> Sequence[int]:
    """Prepares the folder in the first rank; returns the numbers of the missing shards in every rank.

    Raises:
        ValueError: if the processes differ in method, loader or folder; if the folder belongs to another job.
        Exception: whatever the first rank raises when it prepares the folder, in every rank.
    """
    if group is None:
        return prepare_folder(folder, manifest)
    from_each: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(from_each, manifest, group)
    for other in from_each:
        require_equal_manifests("method, loader", "the same in every process", from_each[0], other)
    answer: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            marker = partial_file(folder / MANIFEST)
            answer = [(prepare_folder(folder, manifest), marker.name)]
            marker.touch()
        except Exception as error:
            # Send the error to the other ranks, which would otherwise wait for an answer for ever.
            answer = [error]
    distributed.broadcast_object_list(answer, 0, group)
    if isinstance(answer[0], Exception):
        raise answer[0]
    todo: Sequence[int] = answer[0][0]
    # On another machine the same path may be another folder, where nobody would look for the shards. So every
    # rank looks for a file that the first rank made.
    marker = folder / answer[0][1]
    distributed.all_gather_object(from_each, marker.exists(), group)
    marker.unlink(missing_ok=True)
    if not all(from_each):
        got = f"another one in process {from_each.index(False)}"
        raise ValueError(checks.error_message("folder", "one that all processes share", got))
    return todo
