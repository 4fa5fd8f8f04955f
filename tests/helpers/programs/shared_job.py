"""One of several processes that share a job over a data set; ``torch.distributed.run`` starts them.

``shared_job.py FOLDER DIES_AT OWN_GROUP`` reads the method and the images from ``job.pt`` in the folder, and
records in the folder the items that it loads and the jobs that are refused. At the first start, the process
that loads the item DIES_AT kills itself. If OWN_GROUP is ``True``, the program makes the process group itself
before it calls camkit.
"""

import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset

import camkit

WORK, DIES_AT, OWN_GROUP = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
RANK, ATTEMPT = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]


def note(kind: str, value: object) -> None:
    """Appends a line to this process's file of the given kind."""
    with open(WORK / f"{kind}-{ATTEMPT}-{RANK}", "a") as file:
        print(value, file=file)


class Items(Dataset[torch.Tensor]):
    """The images; at the first start, loading the item DIES_AT kills the process."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        note("loaded", index)
        if index == DIES_AT and ATTEMPT == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[index]


def progress(batches: Iterable[Any]) -> Iterable[Any]:
    """Records the number of batches that the progress bar would show."""
    note("shown", len(batches))  # type: ignore[arg-type]
    return batches


def main() -> None:
    """Explains the images, and then starts jobs that every process must refuse."""
    torch.set_num_threads(1)
    method, x = torch.load(WORK / "job.pt", weights_only=False)
    if OWN_GROUP:
        distributed.init_process_group("gloo")
    loader = DataLoader(Items(x), batch_size=2)
    job: dict[str, Any] = {"folder": WORK / "job", "colormap": "jet"}
    manifest = camkit.explain_dataset(method, loader, **job, shard_size=2, progress=progress)
    files = [shard["file"] for shard in json.loads(manifest.read_text())["shards"]]
    note("missing", [file for file in files if not (WORK / "job" / file).exists()])
    try:
        camkit.explain_dataset(method, loader, **job, shard_size=3)
    except ValueError as error:
        note("refused", error)
    try:
        camkit.explain_dataset(method, loader, WORK / f"apart-{RANK}")
    except ValueError as error:
        note("refused", error)
    with torch.no_grad():
        method.model[-1].bias += int(RANK)
    try:
        camkit.explain_dataset(method, loader, WORK / "other")
    except ValueError as error:
        note("refused", error)
    assert distributed.is_initialized() == OWN_GROUP


if __name__ == "__main__":
    main()
