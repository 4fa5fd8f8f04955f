"""Kills a job over a data set at each of its file operations, starts it again, and checks the files.

``python killed_job.py FOLDER`` works in a folder. It prints the number of times that it killed the job, and
the number of times that a file was half written then.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import camkit

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir"}


def run_job(method: camkit.CAM, x: torch.Tensor, folder: Path) -> None:
    """Explains three images in two shards, and saves a picture of each heatmap."""
    loader = DataLoader(TensorDataset(x), batch_size=2)
    camkit.explain_dataset(method, loader, folder, shard_size=2, colormap="gray")


def is_killed(method: camkit.CAM, x: torch.Tensor, folder: Path, last: int) -> bool:
    """Runs the job in a process that is killed at its event number ``last``; false if it ended before."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    events = 0

    def count() -> None:
        nonlocal events
        events += 1
        if events == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and str(args[0]).startswith(str(folder)):
            count()

    def called(frame: Any, event: str, function: Any) -> None:
        # Pillow writes a picture with many calls of the same function. Killing the job at each of them would
        # take long and test nothing new.
        inside = "PIL" not in frame.f_code.co_filename
        if event == "c_call" and inside and function.__name__ in ("write", "fsync"):
            count()

    sys.addaudithook(audited)
    sys.setprofile(called)
    run_job(method, x, folder)
    os._exit(0)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by its path in the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main(folder: Path) -> None:
    """Kills the job at its first event, then at its second, and so on, until it ends before it is killed."""
    torch.set_num_threads(1)
    x = torch.randn(3, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    method = camkit.CAM(model)  # needs no backward pass, which is unsafe in a forked process

    # Run the job here first, so that the forked processes need not import anything.
    run_job(method, x, folder / "whole")
    whole, stopped = contents(folder / "whole"), folder / "stopped"
    assert len(whole) == 6, whole.keys()
    last, halves = 1, 0
    while is_killed(method, x, stopped, last):
        there = contents(stopped)
        parts = {name for name in there if name.endswith(".part")}
        halves += any(0 < len(there[name]) < len(whole[name.rsplit(".", 2)[0]]) for name in parts)
        assert len(parts) <= 1, (last, parts)
        for name in there.keys() - parts:
            assert there[name] == whole[name], (last, name)
        done = [name for name in there if name.startswith("shard-")]
        for name in done:
            for index in ([0, 1], [2])[int(name[6:11])]:
                assert f"heatmaps/{index:08d}.png" in there, (last, name, index)
        if last % 5 == 0:  # kill the second start as well
            is_killed(method, x, stopped, last // 2)
        run_job(method, x, stopped)
        assert contents(stopped) == whole, last
        shutil.rmtree(stopped)
        last += 1
    assert contents(stopped) == whole
    print(last - 1, halves)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
