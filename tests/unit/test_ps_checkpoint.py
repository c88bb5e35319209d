"""Checkpoints of servers: complete versions that any number of servers can read, and refusal of all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_job import SimulatedJob

import sparsecomm as sc
from sparsecomm.ps.server.checkpoint import newest_complete
from sparsecomm.ps.worker.link import Link, Steps


def network(hidden: int = 5) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(7, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3))


def task(link: Link, steps: int, hidden: int = 5) -> Steps[torch.Tensor]:
    model = network(hidden)
    worker = sc.ps.Worker(model, sc.Dense(), link=link)
    yield from worker.connecting()
    first = worker.versions[0]
    for step in range(first, steps):
        model.zero_grad()
        g = torch.Generator().manual_seed(100 * worker.rank + step)
        model(torch.randn(4, 7, generator=g)).square().mean().backward()
        yield from worker.stepping()
    yield from worker.leaving()
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def train(servers: int, steps: int, checkpoints: sc.ps.Checkpoints | None, **options: Any) -> torch.Tensor:
    saving = {} if checkpoints is None else {"restore": checkpoints.restore, "saved": checkpoints.saved}
    job = SimulatedJob(2, servers, optimizer=adamw, **saving)
    out = job.run([task(link, steps, **options) for link in job.links])
    for each in out:
        if isinstance(each, BaseException):
            raise each
    assert torch.equal(out[0], out[1])
    return out[0]


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_job_resumes_with_another_number_of_servers(tmp_path: Path, before: int, after: int) -> None:
    straight = train(1, 10, None)
    train(before, 7, sc.ps.Checkpoints(folder=str(tmp_path), every=3))
    resumed = train(after, 10, sc.ps.Checkpoints(folder=str(tmp_path), resume=True))
    assert torch.allclose(resumed, straight, rtol=1e-6, atol=1e-7), "parameters and Adam's moments continue"


def test_only_whole_versions_count_and_old_ones_go(tmp_path: Path) -> None:
    train(2, 9, sc.ps.Checkpoints(folder=str(tmp_path), every=2))
    folders = {p.name for p in tmp_path.iterdir()}
    assert {"version-000000006", "version-000000008"} <= folders
    assert "version-000000002" not in folders
    assert newest_complete(tmp_path) == tmp_path / "version-000000008"
    (tmp_path / "version-000000008" / "shard-0-of-2.pt").unlink()
    assert newest_complete(tmp_path) == tmp_path / "version-000000006"
    assert newest_complete(tmp_path / "none") is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(2, 4, sc.ps.Checkpoints(folder=str(tmp_path), every=2))
    with pytest.raises(sc.RemoteError, match="checkpoint of another model"):
        train(2, 4, sc.ps.Checkpoints(folder=str(tmp_path), resume=True), hidden=6)


@pytest.mark.parametrize("damage", [lambda b: b[:-50], lambda b: b"", lambda b: b"x" + b[1:]])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: Any) -> None:
    train(2, 4, sc.ps.Checkpoints(folder=str(tmp_path), every=2))
    file = tmp_path / "version-000000004" / "shard-1-of-2.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(sc.RemoteError, match=r"shard-1-of-2\.pt is no checkpoint of a shard, or damaged"):
        train(1, 6, sc.ps.Checkpoints(folder=str(tmp_path), resume=True))


@pytest.mark.parametrize(("name", "value"), [("every", -1), ("keep", 0), ("every", 1.5)])
def test_bad_options(name: str, value: Any) -> None:
    with pytest.raises(sc.ConfigError, match=name):
        sc.ps.Checkpoints(folder="x", **{name: value})
