"""Rendezvous folders with dead jobs, other jobs and junk in them, and connections that are up to no good."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_mailbox import SimulatedMailboxes

import sparsecomm as sc
from sparsecomm.ps.addresses import Address, claim, read_addresses, write
from sparsecomm.ps.joining import JoinListener, RunningJob, connect
from sparsecomm.transport.mailbox import tcp
from sparsecomm.transport.mailbox.tcp import MOST_JOINERS, TCPMailbox

GOOD = Address("127.0.0.1", 4, bytes(range(16)), "job", 0, (1,), (0,), 2, "Synchronous()")


class Served:
    """A job's servers, which take messages in a thread."""

    def __init__(self, folder: Path, job: str, monkeypatch: pytest.MonkeyPatch, servers: int = 1) -> None:
        monkeypatch.setenv("PMIX_NAMESPACE", job)
        ranks = tuple(range(1, 1 + servers))
        facts = {"servers": ranks, "workers": (0,), "world": 1 + servers, "mode": f"mode of {job}"}
        boxes = SimulatedMailboxes(1 + servers).by_rank
        place = sc.ps.Rendezvous(folder, host="127.0.0.1")
        self.listeners = [JoinListener(place, boxes[rank], i, facts) for i, rank in enumerate(ranks)]
        self.got: list[tuple[int, torch.Tensor]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._end.wait(0.001):
            for listener in self.listeners:
                message = listener.mailbox.receive()
                if message is not None:
                    self.got.append(message)
                listener.mailbox.lost()

    def die(self) -> None:
        """Stops as if killed: addresses stay."""
        self._end.set()
        self._thread.join()
        for listener in self.listeners:
            listener.mailbox.close()

    def close(self) -> None:
        """Ends."""
        self._end.set()
        self._thread.join()
        for listener in self.listeners:
            listener.close()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(job: str, servers: int = 1) -> Served:
        made.append(Served(tmp_path, job, monkeypatch, servers))
        return made[-1]

    yield make
    for each in made:
        each.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def joined(folder: Path, timeout: float = 30.0) -> RunningJob:
    job = connect(folder, timeout)
    job.mailbox.close()
    return job


def later(seconds: float, action: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


# --- other jobs ---


def test_a_joiner_that_is_early_waits_for_the_restarted_job(tmp_path: Path, serve: Callable[..., Served]) -> None:
    """The addresses of the dead job are still there."""
    serve("old", servers=2).die()
    old = names(tmp_path)
    timer = later(1.0, lambda: serve("new", servers=2))
    job = joined(tmp_path)
    timer.join()
    assert job.mode == "mode of new"
    assert old < names(tmp_path), "a job removes only its own files"


def test_a_joiner_that_comes_before_everything_waits(tmp_path: Path, serve: Callable[..., Served]) -> None:
    timer = later(0.5, lambda: serve("new"))
    assert joined(tmp_path).mode == "mode of new"
    timer.join()


def test_a_restarted_job_of_the_same_name(tmp_path: Path, serve: Callable[..., Served]) -> None:
    """Of the same name are jobs that a scheduler has started again. The first server comes before the second."""
    serve("same", servers=2).die()
    timer = later(0.7, lambda: serve("same", servers=2))
    job = connect(tmp_path, 30.0)
    timer.join()
    assert job.mailbox.answered() == 2
    job.mailbox.close()


def test_an_old_address_at_which_another_job_listens(tmp_path: Path, serve: Callable[..., Served]) -> None:
    """It listens at the dead job's port, which is what its later address says."""
    other = serve("other")
    ((address, _),) = read_addresses(tmp_path)[0]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for number in range(3):
            dead = replace(address, job=f"dead {number}", token=bytes([number] * 16), mode="mode of the dead")
            write(tmp_path, dead if number else replace(dead, port=silent.getsockname()[1]))
        assert joined(tmp_path).mode == "mode of other"
    assert other.got == []


def test_a_server_that_is_slow_to_answer_is_joined_in_the_end(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as slow:
        write(tmp_path, replace(GOOD, port=slow.getsockname()[1]))
        assert joined(tmp_path, 0.5).mode == GOOD.mode


def test_two_jobs_in_one_folder(tmp_path: Path, serve: Callable[..., Served]) -> None:
    first = serve("first", servers=2)
    of_first = names(tmp_path)
    assert len(of_first) == 2
    mailbox = connect(tmp_path, 30.0).mailbox
    second = serve("second", servers=2)
    assert len(names(tmp_path)) == 5, "two addresses each, and a rank that is taken"
    assert joined(tmp_path).mode == "mode of second", "the newest"
    second.close()
    assert names(tmp_path) >= of_first
    assert not any("second" in name for name in names(tmp_path))
    assert joined(tmp_path).mode == "mode of first"
    mailbox.send(1, torch.ones(3, dtype=torch.uint8))
    end = time.monotonic() + 20
    while not first.got and time.monotonic() < end:
        mailbox.flushed()
        time.sleep(0.001)
    assert first.got[0][0] == 3
    mailbox.close()
    first.close()
    assert names(tmp_path) == set()


def test_a_job_leaves_a_file_alone_that_is_not_its_own_any_more(tmp_path: Path, serve: Callable[..., Served]) -> None:
    job = serve("first")
    (path,) = tmp_path.iterdir()
    path.unlink()
    write(tmp_path, GOOD)
    (tmp_path / "joiner-job-7").touch()
    (tmp_path / "joiner-first-x").touch()
    job.close()
    assert names(tmp_path) == {"server-0.json", "joiner-job-7", "joiner-first-x"}


def test_ranks_are_taken_per_job(tmp_path: Path) -> None:
    other = replace(GOOD, job="job!", world=9)
    assert [claim(tmp_path, GOOD), claim(tmp_path, other), claim(tmp_path, GOOD)] == [2, 9, 3]
    assert claim(tmp_path, replace(GOOD, job="job?", world=9)) == 9


def test_no_more_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsecomm.ps.addresses.MOST_JOINERS", 3)
    assert [claim(tmp_path, GOOD) for _ in range(3)] == [2, 3, 4]
    with pytest.raises(sc.LaunchError, match="3 workers have joined job 'job' already"):
        claim(tmp_path, GOOD)


# --- junk ---


def fields(**changes: Any) -> bytes:
    return json.dumps(vars(GOOD) | {"token": GOOD.token.hex()} | changes).encode()


JUNK: dict[str, bytes] = {
    "nothing": b"",
    "half": fields()[:-7],
    "binary": bytes(range(256)),
    "no utf-8": fields(mode="x").replace(b"x", b"\xff"),
    "list": b"[]",
    "number": b"3",
    "deep": b"[" * 100_000,
    "digits": b'{"port": ' + b"9" * 10_000 + b"}",
    "other fields": b'{"host": 3}',
    "one more": fields(more=1),
    "host": fields(host=3),
    "no host": fields(host=""),
    "zero in host": fields(host="a\0b"),
    "long host": fields(host="h" * 300),
    "port": fields(port="80"),
    "port 0": fields(port=0),
    "large port": fields(port=1 << 16),
    "true port": fields(port=True),
    "float": fields(port=80.0),
    "token": fields(token="zz" * 16),
    "short token": fields(token="00"),
    "servers": fields(servers={}),
    "no servers": fields(servers=[]),
    "texts": fields(servers=["1"]),
    "lists": fields(servers=[[1]]),
    "twice": fields(servers=[1, 1]),
    "beyond": fields(servers=[2]),
    "negative": fields(servers=[-1]),
    "both": fields(workers=[1]),
    "world": fields(world=1 << 40),
    "null world": fields(world=None),
    "index": fields(index=1),
    "negative index": fields(index=-1),
    "mode": fields(mode=[]),
    "job": fields(job="\n"),
    "huge": b" " * (1 << 21),
}


@pytest.mark.parametrize("kind", JUNK)
def test_a_file_that_is_no_address_is_skipped_with_a_warning(
    kind: str, tmp_path: Path, serve: Callable[..., Served]
) -> None:
    (tmp_path / "server-0.json").write_bytes(JUNK[kind])
    serve("good")
    with pytest.warns(UserWarning, match=r"server-0\.json' is no address of a server: ."):
        assert joined(tmp_path).mode == "mode of good"
    assert (tmp_path / "server-0.json").read_bytes() == JUNK[kind]


def junk_of_other_kinds(folder: Path) -> list[str]:
    """Makes files that are none, and returns their names."""
    (folder / "server-x.json").mkdir()
    (folder / "server-dangling.json").symlink_to(folder / "nowhere")
    (folder / "server-loop.json").symlink_to(folder / "server-loop.json")
    os.mkfifo(folder / "server-pipe.json")
    with (folder / "server-sparse.json").open("wb") as file:
        file.truncate(1 << 40)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(folder):  # the path of a socket is short
        listener.bind("server-socket.json")
    (folder / "server-link.json").symlink_to("/dev/zero")
    (folder / "server-0-0-0.json").write_text("{}")
    (folder / "server-\udcff.json").write_text("{}")
    return [path.name for path in folder.iterdir()]


def test_junk_that_is_no_file_is_skipped_with_a_warning(tmp_path: Path, serve: Callable[..., Served]) -> None:
    made = junk_of_other_kinds(tmp_path)
    (tmp_path / "server").mkdir()
    (tmp_path / "joiner-good-2").mkdir()
    (tmp_path / ".server-1").mkdir()
    serve("good")
    with pytest.warns(UserWarning, match="is no address of a server") as caught:
        assert joined(tmp_path).mode == "mode of good"
    assert len(caught) == len(made) == 9
    assert set(made) <= names(tmp_path)


def test_junk_alone_is_no_job(tmp_path: Path) -> None:
    junk_of_other_kinds(tmp_path)
    text = "is no address of a server"
    with pytest.warns(UserWarning, match=text), pytest.raises(sc.LaunchError, match=text):
        connect(tmp_path, 0.3)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_folder_that_is_none(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / "here").write_text("")
    with pytest.raises(sc.LaunchError, match="no server has left its address"):
        connect(tmp_path / "here", 0.2)


def test_an_address_that_vanishes_is_no_junk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    real = os.open

    def gone(path: Any, *rest: Any) -> int:
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()
        return real(path, *rest)

    monkeypatch.setattr(os, "open", gone)
    assert read_addresses(tmp_path) == ([], {})


def test_addresses_have_names_of_their_own_and_no_other_user_can_read_them(tmp_path: Path) -> None:
    paths = [write(tmp_path, replace(GOOD, job=str(i))) for i in range(3)]
    assert [path.name for path in paths] == ["server-0.json", "server-0-1.json", "server-0-2.json"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in paths)
    assert {a.job for a, _ in read_addresses(tmp_path)[0]} == {"0", "1", "2"}


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    paths = [write(tmp_path, GOOD) for _ in range(2)]
    assert names(tmp_path) == {"server-0.json", "server-0-1.json"}
    assert [a for a, _ in read_addresses(tmp_path)[0]] == [GOOD] * len(paths)


def test_invented_folders(tmp_path: Path) -> None:
    """Mutations of an address: each is the address of a job, or is skipped; nothing else happens."""
    rng, good = random.Random(7), fields()
    tries = int(os.environ.get("SPARSECOMM_HOSTILE", "3000"))
    path = tmp_path / "server-0.json"
    kept = 0
    for _ in range(tries):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randrange(1, 9)]
            elif kind == 2:
                data[at:at] = rng.choice(
                    [b"-", b"0", b"9" * 30, b"null", b"[", b"]", b'"', b"{}", b",", b"1e9", b"\\u0000"]
                )
            else:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randrange(9)]
        path.write_bytes(data)
        found, skipped = read_addresses(tmp_path)
        assert len(found) + len(skipped) == 1, bytes(data)
        for address, _ in found:
            kept += 1
            assert 0 < address.port < 1 << 16
            assert len(address.token) == 16
            assert len(address.servers) > address.index >= 0
            assert all(0 <= r < address.world for r in (*address.servers, *address.workers))
    assert 0 < kept < tries


# --- connections ---


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[JoinListener]:
    facts = {"servers": (1,), "workers": (0,), "world": 2, "mode": "m"}
    made = JoinListener(sc.ps.Rendezvous(tmp_path, "127.0.0.1"), SimulatedMailboxes(2).by_rank[1], 0, facts)
    yield made
    made.close()


def port_and_token(folder: Path) -> tuple[int, bytes]:
    ((address, _),) = read_addresses(folder)[0]
    return address.port, address.token


def poll(listener: JoinListener, until: Callable[[], bool]) -> list[tuple[int, torch.Tensor]]:
    """Lets the server take messages until something has happened; returns them."""
    end, got = time.monotonic() + 20, []
    while not until():
        assert time.monotonic() < end
        message = listener.mailbox.receive()
        listener.mailbox.lost()
        got += [] if message is None else [message]
    return got


def test_connections_that_do_not_greet_are_few(tmp_path: Path, listener: JoinListener) -> None:
    port, token = port_and_token(tmp_path)
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            listener.mailbox.receive()
        poll(listener, lambda: len(listener.mailbox._greeting) <= 64)
        late = TCPMailbox(2, 2, {1: ("127.0.0.1", port, token)}, 5.0)
        poll(listener, lambda: late.answered() == 1)
        late.close()


def test_connections_that_do_not_greet_are_closed_after_a_while(
    tmp_path: Path, listener: JoinListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_GREETING_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", port_and_token(tmp_path)[0])) as sock:
        sock.settimeout(0.001)

        def closed() -> bool:
            with contextlib.suppress(TimeoutError):
                return sock.recv(1) == b""
            return False

        poll(listener, closed)
    assert listener.mailbox._greeting == []


def test_ranks_are_bounded(tmp_path: Path, listener: JoinListener) -> None:
    port, token = port_and_token(tmp_path)
    for rank in (2 + MOST_JOINERS, (1 << 32) - 1):
        mailbox = TCPMailbox(rank, 2, {1: ("127.0.0.1", port, token)}, 5.0)
        poll(listener, lambda mailbox=mailbox: mailbox.answered() == 0 and bool(mailbox.lost()))
    last = TCPMailbox(1 + MOST_JOINERS, 2, {1: ("127.0.0.1", port, token)}, 5.0)
    poll(listener, lambda: last.answered() == 1)
    last.close()


def test_a_length_alone_takes_no_memory(tmp_path: Path, listener: JoinListener) -> None:
    port, token = port_and_token(tmp_path)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(token + struct.pack("<II", 2, 2) + struct.pack("<Q", 1 << 30) + bytes(100_000))
        connections = listener.mailbox._joiners.by_rank
        poll(listener, lambda: 2 in connections and connections[2]._filled == 100_000)
        assert connections[2]._frame.numel() <= 1 << 18


def test_whoever_does_not_read_is_not_read_from(tmp_path: Path, listener: JoinListener) -> None:
    """And it takes no more memory than one answer beyond the bound."""
    port, token = port_and_token(tmp_path)
    answer, asked = torch.zeros(1 << 20, dtype=torch.uint8), struct.pack("<Q", 1) + b"?"
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        sock.sendall(token + struct.pack("<II", 2, 2) + asked * 200)
        quiet = time.monotonic()
        while time.monotonic() - quiet < 0.5:
            if listener.mailbox.receive() is not None:
                quiet = time.monotonic()
                listener.mailbox.send(2, answer)
        assert listener.mailbox._joiners.by_rank[2]._unsent <= 2 << 20
        sock.settimeout(0.05)
        got, answered = 0, 0
        while got < 32 + 200 * (8 + answer.numel()):
            if listener.mailbox.receive() is not None:
                listener.mailbox.send(2, answer)
                answered += 1
            with contextlib.suppress(TimeoutError):
                got += len(sock.recv(1 << 22))
        assert answered > 150


def test_a_joiner_that_takes_nothing_for_long_is_dropped(
    tmp_path: Path, listener: JoinListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has ended had waited for it without end."""
    monkeypatch.setattr(tcp, "_STALLED", 0.3)
    port, token = port_and_token(tmp_path)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(token + struct.pack("<II", 2, 2))
        poll(listener, lambda: 2 in listener.mailbox._joiners.by_rank)
        listener.mailbox.send(2, torch.zeros(1 << 26, dtype=torch.uint8))
        assert not listener.mailbox.flushed()
        poll(listener, lambda: listener.mailbox.flushed())
        assert listener.mailbox.lost() == {2}


def test_a_wrong_proof_closes_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor, warnings.catch_warnings():
        mailbox = TCPMailbox(2, 2, {1: ("127.0.0.1", impostor.getsockname()[1], bytes(16))}, 5.0)
        sock, _ = impostor.accept()
        with sock:
            sock.sendall(bytes(32) + struct.pack("<Q", 3) + b"abc")
            end = time.monotonic() + 20
            while not mailbox.lost() and time.monotonic() < end:
                assert mailbox.receive() is None
        assert mailbox.lost() == {1}
