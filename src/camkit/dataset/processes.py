"""The processes that share a job."""

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
from camkit.dataset.files import MANIFEST, PART
from camkit.dataset.manifest import prepare_folder, require_equal

# Ranks wait for the slowest of them, however long it takes; one that dies breaks the connection.
_TIMEOUT = datetime.timedelta(days=30)


@contextmanager
def process_group() -> Iterator["distributed.ProcessGroup | None"]:
    """The processes that share the job: a group of its own, on the CPU, for this time; none for one process.

    A group on GPUs would send what is agreed on by way of them, and give up on slow ranks too soon.
    """
    if not distributed.is_available():
        yield None
        return
    ours = not distributed.is_initialized()
    if ours and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # as torchrun sets it
        from torch.distributed.rendezvous import rendezvous

        store, rank, world = next(rendezvous("env://", timeout=_TIMEOUT))
        store = _new_store(store, rank, world)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    elif ours or distributed.get_world_size() == 1:
        yield None
        return
    group: Any = distributed.group.WORLD if ours else distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    try:
        yield group
    finally:
        distributed.destroy_process_group(group)


def _new_store(store: Any, rank: int, world: int) -> Any:
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


def agree_on_shards(
    folder: Path, manifest: dict[str, Any], group: "distributed.ProcessGroup | None"
) -> Sequence[int]:
    """The numbers of the shards still to do, as the first rank found them; or its error, on every rank."""
    if group is None:
        return prepare_folder(folder, manifest)
    each: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(each, manifest, group)
    for other in each:
        require_equal("method, loader", "the same in every process", each[0], other)
    found: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            found = [(prepare_folder(folder, manifest), f"{MANIFEST}.{uuid.uuid4().hex}.{PART}")]
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
        raise ValueError(checks.error_message("folder", "one that all processes share", got))
    return todo  # type: ignore[no-any-return]
