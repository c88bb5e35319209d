"""Checkpoints of servers: runs, versions and jobs that never mix, fall-backs, and failures that do not end training."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_job import SimulatedJob

import sparsecomm as sc
from sparsecomm.errors import StateError, WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.server.shard_file import read_facts
from sparsecomm.ps.server.versions import Listing
from sparsecomm.ps.worker.link import Link, Steps

Checkpoints = sc.ps.Checkpoints


def network(hidden: int = 5) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(7, hidden, dtype=torch.float32),
        torch.nn.Tanh(),
        torch.nn.Linear(hidden, 3, dtype=torch.float32),
    )


def task(link: Link, steps: int, hidden: int = 5) -> Steps[torch.Tensor]:
    model = network(hidden)
    worker = sc.ps.Worker(model, sc.Dense(), link=link)
    yield from worker.connecting()
    first = worker.versions[0]
    for step in range(first, steps):
        model.zero_grad()
        g = torch.Generator().manual_seed(100 * worker.rank + step)
        model(torch.randn(4, 7, generator=g, dtype=torch.float32)).square().mean().backward()
        yield from worker.stepping()
    yield from worker.leaving()
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


class Run:
    """A job of two workers that has ended: its parameters, and the events of all servers in one text."""

    def __init__(self, servers: int, steps: int, checkpoints: Any = None, **options: Any) -> None:
        between = options.pop("between", lambda job, turn: None)
        model = {"hidden": options.pop("hidden", 5)}
        job = SimulatedJob(2, servers, checkpoints=checkpoints, **{"optimizer": adamw, **options})
        out = job.run([task(link, steps, **model) for link in job.links], between=lambda turn: between(job, turn))
        for each in out:
            if isinstance(each, BaseException):
                raise each
        assert torch.equal(out[0], out[1])
        self.values: torch.Tensor = out[0]
        self.events = "\n".join(event for server in job.servers for event in server.events)


def flip(path: Path, at: int = -40) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def versions(folder: Path) -> list[int]:
    """Complete versions in a folder."""
    listing = Listing.of(folder)
    return sorted({s.version for s in listing.saved if listing.is_complete(s)})


def contents(folder: Path) -> dict[str, bytes]:
    """All files, unfinished ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- resuming ---


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_job_resumes_with_another_number_of_servers(tmp_path: Path, before: int, after: int) -> None:
    straight = Run(1, 10).values
    Run(before, 7, Checkpoints(folder=tmp_path, every=3))
    resumed = Run(after, 10, Checkpoints(folder=str(tmp_path), every=1, resume=True))
    assert torch.allclose(resumed.values, straight, rtol=1e-6, atol=1e-7), "parameters and Adam's moments continue"
    assert "resuming version 6 of run" in resumed.events
    again = Run(before, 12, Checkpoints(folder=tmp_path, resume=True))
    assert "resuming version 10 of run" in again.events, "the files of the first job do not count against the second"
    assert versions(tmp_path) == [9, 10], "and are pruned, whatever its number of servers was"


def test_resume_in_an_empty_folder_begins_a_run_and_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        run = Run(2, 2, Checkpoints(folder=folder, every=2, resume=True))
        assert "holds no checkpoint; a new run begins" in run.events
        assert versions(folder) == [2]
        shutil.rmtree(folder / "version-000000002")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    Run(2, 4, Checkpoints(folder=tmp_path, every=2))
    with pytest.raises(sc.RemoteError, match="checkpoint of another model"):
        Run(2, 4, Checkpoints(folder=tmp_path, resume=True), hidden=6)


def test_elements_without_optimizer_state_begin_with_zeros(tmp_path: Path) -> None:
    """One of two servers has never stepped a part of a tensor: no uninitialised memory takes the place of its state."""

    def late(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        own = optimizer.step

        def step() -> None:
            own()
            if any(p.numel() > 30 for p in parameters):  # the first shard
                optimizer.state.clear()

        optimizer.step = step  # type: ignore[method-assign,assignment]
        return optimizer

    Run(2, 2, Checkpoints(folder=tmp_path, every=2), optimizer=late, hidden=8)
    job = SimulatedJob(2, 1, optimizer=adamw, checkpoints=Checkpoints(folder=tmp_path, resume=True))
    job.run([task(link, 2, hidden=8) for link in job.links])
    shard = job.servers[0].shards[0]
    states = [s["momentum_buffer"] for s in shard.piece_states() if "momentum_buffer" in s]
    assert any(bool((s[:1] == 0).all()) and bool(s.any()) for s in states), "half of one tensor has state"
    assert all(bool((s.abs() < 10).all()) for s in states)


# --- runs ---


@pytest.mark.parametrize("servers", [1, 2])
def test_a_new_run_does_not_begin_among_checkpoints_of_another(tmp_path: Path, servers: int) -> None:
    Run(2, 4, Checkpoints(folder=tmp_path, every=2))
    before = contents(tmp_path)
    with pytest.raises(sc.RemoteError, match=r"holds checkpoints of another run \(run \w{16} up to version 4\)"):
        Run(servers, 4, Checkpoints(folder=tmp_path, every=1))
    assert contents(tmp_path) == before
    Run(servers, 4, Checkpoints(folder=tmp_path))  # saves none


def test_damaged_checkpoints_are_not_lost_to_a_new_run_either(tmp_path: Path) -> None:
    Run(1, 2, Checkpoints(folder=tmp_path, every=2))
    flip(tmp_path / "version-000000002" / "shard-0-of-1.pt", at=3)
    with pytest.raises(sc.RemoteError, match="holds checkpoints of another run"):
        Run(1, 4, Checkpoints(folder=tmp_path, every=2))


def test_a_new_run_overwrites_when_told_to(tmp_path: Path) -> None:
    Run(2, 8, Checkpoints(folder=tmp_path, every=2))
    flip(tmp_path / "version-000000008" / "shard-0-of-2.pt", at=3)
    (tmp_path / "notes.txt").write_text("mine")
    run = Run(3, 3, Checkpoints(folder=tmp_path, every=1, existing="overwrite"))
    assert "removed the checkpoints of other runs" in run.events
    assert versions(tmp_path) == [2, 3], "nothing it has written makes room for older runs"
    assert {p.name for p in tmp_path.iterdir()} <= {f"version-00000000{v}" for v in (1, 2, 3)} | {"notes.txt"}
    assert "resuming version 3" in Run(1, 4, Checkpoints(folder=tmp_path, resume=True)).events


def test_checkpoints_of_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    for seed in ("a", "b"):
        Run(2, 4, Checkpoints(folder=tmp_path / seed, every=2))
    shutil.copytree(tmp_path / "b" / "version-000000004", tmp_path / "a" / "version-000000006")
    shutil.copytree(tmp_path / "b" / "version-000000002", tmp_path / "a" / "version-000000002", dirs_exist_ok=True)
    with pytest.raises(
        sc.RemoteError,
        match=r"several runs: \w{16} up to version 4, \w{16} up to version 2|"
        r"several runs: \w{16} up to version 2, \w{16} up to version 4",
    ):
        Run(2, 6, Checkpoints(folder=tmp_path / "a", resume=True))


def test_two_jobs_that_resumed_the_same_version_are_refused(tmp_path: Path) -> None:
    Run(2, 2, Checkpoints(folder=tmp_path / "a", every=2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    Run(2, 4, Checkpoints(folder=tmp_path / "a", every=2, resume=True))
    Run(2, 6, Checkpoints(folder=tmp_path / "b", every=3, resume=True))
    shutil.copytree(tmp_path / "b" / "version-000000006", tmp_path / "a" / "version-000000006")
    with pytest.raises(sc.RemoteError, match="several jobs have resumed the same version"):
        Run(2, 8, Checkpoints(folder=tmp_path / "a", resume=True))


def test_a_job_leaves_files_of_other_runs_and_later_jobs_alone(tmp_path: Path) -> None:
    """A job that is believed dead must not write over its successor's files, nor two jobs over each other's."""
    Run(1, 4, Checkpoints(folder=tmp_path / "b", every=4))
    theirs = tmp_path / "b" / "version-000000004" / "shard-0-of-1.pt"

    def between(job: SimulatedJob, turn: int) -> None:
        if turn == 4:  # the job has begun
            target = tmp_path / "new" / "version-000000004" / theirs.name
            target.parent.mkdir(parents=True)
            shutil.copy(theirs, target)

    run = Run(1, 5, Checkpoints(folder=tmp_path / "new", every=1), between=between)
    assert f"of run {read_facts(theirs).saved.attempt.run} has written it" in run.events
    assert (tmp_path / "new" / "version-000000004" / theirs.name).read_bytes() == theirs.read_bytes()
    assert "shard 0 is saved as usual again" in run.events


def test_a_resumed_run_keeps_its_own_versions_and_not_older_higher_ones(tmp_path: Path) -> None:
    Run(2, 20, Checkpoints(folder=tmp_path, every=5, keep=3))
    for version in (15, 20):
        flip(tmp_path / f"version-0000000{version}" / "shard-0-of-2.pt")
    run = Run(2, 12, Checkpoints(folder=tmp_path, every=1, keep=3, resume=True))
    assert "resuming version 10" in run.events
    assert {11, 12} <= set(versions(tmp_path))
    assert "resuming version 12" in Run(2, 13, Checkpoints(folder=tmp_path, every=1, keep=3, resume=True)).events
    assert versions(tmp_path) == [11, 12, 13]


# --- damage ---


def test_only_whole_versions_count_and_old_ones_go(tmp_path: Path) -> None:
    Run(2, 9, Checkpoints(folder=tmp_path, every=2))
    assert versions(tmp_path) == [6, 8]
    assert not (tmp_path / "version-000000002").exists()
    (tmp_path / "version-000000008" / "shard-0-of-2.pt").unlink()
    run = Run(2, 9, Checkpoints(folder=tmp_path, resume=True))
    assert "version-000000008 is incomplete" in run.events
    assert "has saved no shard 0 of 2" in run.events
    assert "resuming version 6" in run.events
    (tmp_path / "version-000000006" / "shard-1-of-2.pt").unlink()
    with pytest.raises(sc.RemoteError, match=r"no version that is complete and undamaged; .*existing=\"overwrite\""):
        Run(2, 9, Checkpoints(folder=tmp_path, resume=True))


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def old_format(path: Path) -> None:
    torch.save(
        {"format": 1, "version": 4, "model": "1", "span": [0, 1], "values": torch.zeros(1, dtype=torch.float32)}, path
    )


def replaced(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of a value": (flip, "its checksum is 0x"),
    "a bit of the facts": (lambda p: flip(p, at=50), "its facts' checksum is 0x"),
    "a bit of the head": (lambda p: flip(p, at=12), "head_crc"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-50]), "bytes, it should have"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes, it should have"),
    "empty": (lambda p: p.write_bytes(b""), "length = 0"),
    "another": (lambda p: shutil.copy(p.parent / "shard-0-of-2.pt", p), "shard 0 of 2 at version 4: it was copied"),
    "older": (
        lambda p: shutil.copy(p.parent.parent / "version-000000002" / p.name, p),
        "shard 1 of 2 at version 2: it was copied",
    ),
    "folder": (replaced(Path.mkdir), "shard-1-of-2.pt"),
    "pipe": (replaced(os.mkfifo), "it is no regular file"),
    "link to nothing": (replaced(lambda p: p.symlink_to("nowhere")), "No such file"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(Code())), "magic"),
    "torch pickle": (replaced(lambda p: torch.save(Code(), p)), "an earlier version of sparsecomm has written it"),
    "old format": (replaced(old_format), "an earlier version of sparsecomm has written it"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_version_falls_back_to_an_older_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, reason = DAMAGES[name]
    folder = tmp_path / "saved"
    Run(2, 4, Checkpoints(folder=folder, every=2))
    path = folder / "version-000000004" / "shard-1-of-2.pt"
    damage(path)
    run = Run(1, 6, Checkpoints(folder=folder, resume=True))
    assert str(path) in run.events
    assert reason in run.events
    assert "resuming version 2 of run" in run.events
    straight = Run(1, 6).values
    assert torch.allclose(run.values, straight, rtol=1e-6, atol=1e-7)
    shutil.rmtree(folder / "version-000000002")
    with pytest.raises(sc.RemoteError, match=r"no version that is complete and undamaged") as caught:
        Run(1, 6, Checkpoints(folder=folder, resume=True))
    assert str(path) in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_files_of_other_runs_jobs_and_counts_never_make_a_version_complete(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Run(2, 4, Checkpoints(folder=tmp_path / name, every=2))
    Run(3, 4, Checkpoints(folder=tmp_path / "c", every=2))
    four = tmp_path / "a" / "version-000000004"
    shutil.copy(tmp_path / "b" / four.name / "shard-1-of-2.pt", four)
    shutil.copy(tmp_path / "c" / four.name / "shard-1-of-3.pt", four)
    run = Run(2, 4, Checkpoints(folder=tmp_path / "a", resume=True))
    assert run.events.count("version-000000004 is incomplete") == 3
    assert "resuming version 2 of run" in run.events


def test_damage_after_the_decision_is_an_error(tmp_path: Path) -> None:
    Run(2, 4, Checkpoints(folder=tmp_path, every=2))

    job = SimulatedJob(1, 2, optimizer=adamw, checkpoints=Checkpoints(folder=tmp_path, resume=True))
    job.serve()
    flip(tmp_path / "version-000000004" / "shard-1-of-2.pt")
    (out,) = job.run([task(job.links[0], 6)])
    assert isinstance(out, sc.RemoteError)
    assert "shard-1-of-2.pt is damaged" in str(out)


# --- agreement of the servers ---


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("victim", [0, 1])
def test_servers_agree_though_one_dies_while_the_job_begins(tmp_path: Path, turn: int, victim: int) -> None:
    Run(3, 4, Checkpoints(folder=tmp_path, every=2))

    def between(job: SimulatedJob, now: int) -> None:
        if now == turn:
            job.mailboxes.kill(2 + victim)

    run = Run(3, 8, Checkpoints(folder=tmp_path, every=2, resume=True), between=between)
    assert torch.allclose(run.values, Run(1, 8).values, rtol=1e-6, atol=1e-7)
    assert versions(tmp_path)[-1] == 8
    newest = {read_facts(p).saved for p in (tmp_path / "version-000000008").iterdir()}
    assert len(newest) == 1
    assert newest.pop().attempt.number == 1


def test_a_decision_that_reached_some_servers_is_replaced(tmp_path: Path) -> None:
    """The first server dies after it has told the third, and not the second."""
    job = SimulatedJob(2, 3, optimizer=adamw, checkpoints=Checkpoints(folder=tmp_path, every=2))
    said = {"run": "0" * 16, "number": 0, "key": "1" * 16}
    body = ms.json_body({"attempt": said, "source": {}, "error": ""})
    job.mailboxes.by_rank[2].send(4, ms.pack(Envelope(Kind.BEGIN, 0, 2), body))
    job.servers[2].turn()
    assert job.servers[2]._saving.decided
    job.mailboxes.kill(2)
    out = job.run([task(link, 4) for link in job.links])
    assert not [each for each in out if isinstance(each, BaseException)], out
    attempts = {read_facts(p).saved.attempt for p in (tmp_path / "version-000000004").iterdir()}
    assert len(attempts) == 1
    assert attempts.pop().run != "0" * 16


def test_a_contradiction_or_nonsense_of_another_server_is_an_error(tmp_path: Path) -> None:
    job = SimulatedJob(1, 2, optimizer=adamw, checkpoints=Checkpoints(folder=tmp_path))
    saving = job.servers[1]._saving
    envelope = Envelope(Kind.BEGIN, 0, 1)
    attempt = {"run": "0" * 16, "number": 0, "key": "1" * 16}
    saved = {"attempt": attempt, "version": 3, "shards": 2, "model": "1"}
    for bad in ({"attempt": {}}, {"attempt": attempt | {"number": -1}}, {"attempt": attempt | {"x": 1}}):
        with pytest.raises(WireError):
            saving.hear(envelope, ms.json_body({"source": {}, "error": "", **bad}))
    for bad in ({"attempt": attempt}, saved | {"shards": 0}, saved | {"version": "3"}, saved | {"attempt": 3}):
        with pytest.raises(WireError):
            saving.hear(envelope, ms.json_body({"attempt": attempt, "source": bad, "error": ""}))
    saving.hear(envelope, ms.json_body({"attempt": attempt, "source": saved, "error": ""}))
    with pytest.raises(StateError, match="server rank 1 resumes"):
        saving.hear(envelope, ms.json_body({"attempt": attempt, "source": saved | {"version": 2}, "error": ""}))


# --- failures to save ---


@contextlib.contextmanager
def limit(kind: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def assert_trains_on(folder: Path, error: str, around: contextlib.AbstractContextManager[Any]) -> None:
    """Trains with checkpoints that cannot be written; nothing of them stays."""
    with around:
        run = Run(2, 6, Checkpoints(folder=folder, every=2))
    assert torch.allclose(run.values, Run(1, 6).values, rtol=1e-6, atol=1e-7)
    assert run.events.count("was not saved") == 2, "each shard says it once"
    assert error in run.events
    assert str(folder) in run.events
    assert not folder.is_dir() or not contents(folder)
    assert not folder.is_dir() or not [p for p in folder.iterdir() if p.name.startswith("version")]


@pytest.mark.parametrize("nbytes", [0, 10, 100, 500])
def test_training_goes_on_when_files_cannot_grow(tmp_path: Path, nbytes: int) -> None:
    assert_trains_on(tmp_path, "File too large", limit(resource.RLIMIT_FSIZE, nbytes))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_training_goes_on_when_the_disk_is_full(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("this root cannot mount")
    try:
        (tmp_path / "full").write_bytes(bytes(8192))
        run = Run(2, 6, Checkpoints(folder=tmp_path, every=2))
        assert "No space left on device" in run.events
        assert [p.name for p in tmp_path.iterdir()] == ["full"]
        (tmp_path / "full").unlink()
        with (tmp_path / "full").open("wb") as file:
            file.write(bytes(4096))  # one of the two files fits
        Run(2, 6, Checkpoints(folder=tmp_path, every=6))
        assert not list(tmp_path.glob(".*"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_training_goes_on_with_too_many_open_files(tmp_path: Path) -> None:
    assert_trains_on(tmp_path, "Too many open files", limit(resource.RLIMIT_NOFILE, 3))


def test_training_goes_on_in_a_folder_without_rights(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_trains_on(tmp_path / "file" / "sub", "Not a directory", contextlib.nullcontext())
    assert_trains_on(Path("/sys/sparsecomm"), "/sys/sparsecomm", contextlib.nullcontext())


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so the rights are taken away from Python's call."""
    Run(1, 4, Checkpoints(folder=tmp_path, every=2))
    real = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(sc.RemoteError, match=r"cannot be read or removed.*Permission denied"):
        Run(1, 6, Checkpoints(folder=tmp_path, resume=True))
    run = Run(1, 6, Checkpoints(folder=tmp_path, every=2))
    assert "cannot look for checkpoints of other runs" in run.events
    assert "has written it, not this one" in run.events


def test_state_that_a_file_cannot_hold_is_an_event(tmp_path: Path) -> None:
    def odd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        optimizer.state[parameters[0]]["history"] = [torch.zeros(1, dtype=torch.float32)]
        return optimizer

    run = Run(1, 4, Checkpoints(folder=tmp_path, every=2), optimizer=odd)
    assert "the optimizer's state has 'history', a list" in run.events
    assert not contents(tmp_path)


def test_files_that_a_killed_job_left_unfinished_go(tmp_path: Path) -> None:
    Run(1, 2, Checkpoints(folder=tmp_path, every=2))
    left = tmp_path / f".shard-0-of-1.pt.{'0' * 16}"
    other = tmp_path / ".shard-0-of-1.pt.mine"
    for path in (left, other):
        path.write_bytes(b"half")
    with pytest.raises(sc.RemoteError):
        Run(1, 4, Checkpoints(folder=tmp_path, every=2))
    assert left.exists(), "a job that is refused changes nothing"
    Run(1, 4, Checkpoints(folder=tmp_path, every=2, resume=True))
    assert not left.exists()
    assert other.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("every", -1), ("keep", 0), ("every", 1.5), ("resume", "yes"), ("folder", ""), ("folder", None)],
        *[("existing", "keep"), ("existing", True)],
    ],
)
def test_bad_options(name: str, value: Any) -> None:
    with pytest.raises(sc.ConfigError, match=name):
        Checkpoints(**{"folder": "x", name: value})


def test_resume_and_overwrite_exclude_each_other() -> None:
    with pytest.raises(sc.ConfigError, match="resume=True"):
        Checkpoints(folder="x", resume=True, existing="overwrite")
