"""Several processes that share one job over a data set."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

import camkit
from helpers.jobs import (
    PROGRAMS,
    contents,
    loader,
)


class Shared:
    """A job of twelve items in six shards that several processes share, and the notes of these processes."""

    def __init__(self, folder: Path) -> None:
        x, self.folder = torch.randn(12, 3, 8, 8), folder
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        method = camkit.GradCAM(model.eval())
        torch.save((method, x), folder / "job.pt")
        camkit.explain_dataset(method, loader(x, batch_size=2), folder / "one", shard_size=2, colormap="jet")
        self.whole = contents(folder / "one")

    def run(self, processes: int, *, dies_at: int = -1, restarts: int = 0, own_group: bool = False) -> int:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
        command += [str(PROGRAMS / "shared_job.py"), str(self.folder), str(dies_at), str(own_group)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as started:
            try:
                return started.wait(120)
            except subprocess.TimeoutExpired:
                started.terminate()  # this ends its worker processes too
                raise

    def noted(self, kind: str, attempt: int) -> dict[int, list[str]]:
        """The lines that each rank noted."""
        files = self.folder.glob(f"{kind}-{attempt}-*")
        return {int(file.name.rpartition("-")[2]): file.read_text().splitlines() for file in files}

    def check(self, ranks: int, attempt: int, done: set[int]) -> None:
        """Asserts that the job is complete, and that the ranks of this attempt shared the missing shards."""
        assert contents(self.folder / "job") == self.whole
        loaded = self.noted("loaded", attempt)
        missing = [i for n in range(6) if n not in done for i in (2 * n, 2 * n + 1)]
        assert sorted(int(i) for each in loaded.values() for i in each) == missing
        counts = [len(loaded.get(rank, [])) for rank in range(ranks)]
        assert max(counts) - min(counts) <= 2  # ranks differ by one shard at most
        assert self.noted("shown", attempt) == {0: [str(-(-counts[0] // 2))]}
        assert self.noted("missing", attempt) == {rank: ["[]"] for rank in range(ranks)}
        for first, second, third in self.noted("refused", attempt).values():
            assert first == "folder: expected the job of its manifest.json, with shard_size 2, got 3"
            assert second == "folder: expected one that all processes share, got another one in process 1"
            assert "method, loader: expected the same in every process, with weights " in third
        assert len(self.noted("refused", attempt)) == ranks
        assert not (self.folder / "other").exists()


def numbers(names: Iterable[str]) -> set[int]:
    return {int(name[6:11]) for name in names if re.fullmatch(r"shard-\d{5}\.npz", name)}


def test_two_processes_one_of_them_killed_and_started_again(tmp_path: Path) -> None:
    job = Shared(tmp_path)
    assert job.run(2, dies_at=6, restarts=1) == 0
    before = job.noted("loaded", 0)
    assert before[1] == ["2", "3", "6"]  # rank 1 did its first shard and began its second
    assert before[0] in (["0", "1", "4", "5", "8", "9"][:n] for n in range(7))
    again = {int(i) // 2 for each in job.noted("loaded", 1).values() for i in each}
    assert {3, 5} <= again
    assert 1 not in again
    job.check(2, 1, set(range(6)) - again)


@pytest.mark.slow
def test_four_processes_one_of_them_killed_and_two_that_go_on(tmp_path: Path) -> None:
    job = Shared(tmp_path)
    assert job.run(4, dies_at=10) != 0
    there = contents(tmp_path / "job")
    assert all(content == job.whole[name] for name, content in there.items() if not name.endswith(".part"))
    done = numbers(there)
    assert 1 in done
    assert 5 not in done
    assert job.noted("loaded", 0)[1] == ["2", "3", "10"]
    for file in tmp_path.glob("*-0-*"):
        file.unlink()
    assert job.run(2, own_group=True) == 0
    job.check(2, 0, done)


@pytest.mark.slow
def test_four_processes_undisturbed(tmp_path: Path) -> None:
    job = Shared(tmp_path)
    assert job.run(4) == 0
    job.check(4, 0, set())
