"""Damaged and hostile files of checkpoints: a StateError, or what a right file may hold; never anything else.

`pytest --hypothesis-profile=deep tests/fuzz/test_fuzz_checkpoints.py` tries 70 times as many.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsecomm import kernels
from sparsecomm.errors import StateError
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.server.rules import Rules
from sparsecomm.ps.server.saved import Attempt, Facts, SavedVersion
from sparsecomm.ps.server.saving import fill
from sparsecomm.ps.server.shard import Shard
from sparsecomm.ps.server.shard_file import _ALIGN, _DTYPES, _HEAD, Content, load, read_facts, write
from sparsecomm.ps.server.versions import Listing, path_of

Count = Counter[tuple[str, str]]

MUTATIONS = 40  # of one drawn file
fuzz = settings(
    max_examples=max(30, settings().max_examples),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LAYOUT = ModelLayout(("weight", "bias"), ((4, 5), (6,)))
RULES = Rules(optimizer=lambda p: torch.optim.Adam(p, lr=0.1), workers=(0,), world=2)
ODD: list[Any] = [None, True, -1, 0, 1, 2, 2**31, 2**63 - 1, 2**63, 1e300, float("nan"), "", "0", "float32", "a" * 300]
ODD += [[], {}, [0], [[]], {"": 0}, {"dtype": "int64"}, [2**62, 0, 2**62], "values", "int8", 16, "0" * 16]


@pytest.fixture(scope="module", autouse=True)
def path() -> str:
    """The kernel path in use: the default one alone, since all compute the same checksum."""
    return kernels.current_path()


def content_of(rng: random.Random, version: int = 3, shards: int = 1, index: int = 0) -> Content:
    """The content of a shard's file with optimizer state of every kind."""
    spec = LAYOUT.shard(index, shards)
    saved = SavedVersion(Attempt("0" * 16, 0, "1" * 16), version, shards, str(LAYOUT.hash))
    states: list[dict[str, Any]] = []
    for piece in spec.pieces:
        n = piece.end - piece.start
        state: dict[str, Any] = {"step": torch.tensor(float(rng.randrange(9)), dtype=torch.float32)}
        for name, dtype in rng.sample(sorted(_DTYPES.items()), 3):
            state[name] = torch.randint(0, 100, rng.choice([(n,), (n, 1), (0,), (2, 3)])).to(dtype)
        states.append(state | {"number": rng.random(), "text": "µ", "none": None, "count": 2**40})
    return Content(Facts(saved, index, spec.start, spec.end), torch.randn(spec.numel, dtype=torch.float32), states)


def file_of(content: Content) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    write(file, content)
    return file.getvalue()


def parts_of(data: bytes) -> tuple[Any, Any, bytes]:
    """Facts, table and data of a file."""
    facts, table, *_ = _HEAD.read(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    rest = data[_HEAD.nbytes :]
    return json.loads(rest[:facts]), json.loads(rest[facts : facts + table]), rest[facts + table :]


def sealed(facts: Any, table: Any, data: bytes, rng: random.Random) -> bytes:
    """A file with right checksums, whatever it holds."""
    texts = [json.dumps(facts).encode(), json.dumps(table).encode()]
    if rng.random() < 0.1:
        texts[rng.randrange(2)] = rng.choice([b"", b"{", b"[" * 5000, b"\xff\xfe\x00", b"1" * 5000, b'"\\ud800"'])
    texts[1] += b" " * (-len(texts[1]) % _ALIGN)
    head = torch.empty(_HEAD.nbytes, dtype=torch.uint8)
    lengths = [len(texts[0]), len(texts[1]), len(data)]
    if rng.random() < 0.1:
        lengths[rng.randrange(3)] = rng.choice([0, 1, 2**31, 2**32 - 1])
    _HEAD.write(head, (*lengths, kernels.crc32c(texts[0]), kernels.crc32c(data, kernels.crc32c(texts[1]))))
    return bytes(head.numpy()) + texts[0] + texts[1] + data


def mutated(value: Any, rng: random.Random) -> Any:
    """A value of JSON with one place in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, rng.choice(["x", "", "run", "at"]): rng.choice(ODD)}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], *([] if rng.random() < 0.1 else [mutated(value[at], rng)]), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 16, -16, value, 2**40])
    return rng.choice(ODD)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, extended, flipped, overwritten, exchanged or repeated; never the same."""
    while True:
        out, at = bytearray(data), rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            out = out[:at]
        elif kind == 1:
            out += rng.randbytes(rng.randrange(1, 40))
        elif kind == 2:
            for _ in range(rng.randrange(1, 6)):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif kind == 3:
            length = rng.randrange(1, 200)
            out[at : at + length] = bytes([rng.choice([0, 255])]) * len(out[at : at + length])
        elif kind == 4:
            other = rng.randrange(len(out))
            out[at], out[other] = out[other], out[at]
        else:
            length = rng.randrange(1, 100)
            out[at:at] = out[at : at + length]
        if bytes(out) != data:
            return bytes(out)


def refuses(path: Path) -> bool:
    """Whether a file is refused by a StateError, which must name it."""
    try:
        load(path)
    except StateError as error:
        if str(path) not in str(error):
            raise AssertionError(f"does not name the file: {error}") from error
        return True
    return False


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a file of `content_of` belongs."""
    path = path_of(tmp_path, content_of(random.Random(0)).facts.saved, 0)
    path.parent.mkdir()
    return path


@fuzz
@given(seed=st.integers(0, 2**63))
def test_damage_of_any_kind_is_refused(count: Count, target: Path, seed: int) -> None:
    rng = random.Random(seed)
    good = file_of(content_of(rng))
    for _ in range(MUTATIONS):
        data = damaged(good, rng)
        count[kernels.current_path(), "checkpoint damaged"] += 1
        target.write_bytes(data)
        assert refuses(target), data.hex()


def test_every_cut_and_every_bit_is_found(count: Count, target: Path) -> None:
    content = content_of(random.Random(1))
    states: list[dict[str, Any]] = [{"step": 1.0}, {}]
    good = file_of(Content(content.facts, content.values, states))
    target.write_bytes(good)
    assert torch.equal(load(target).values, content.values)
    stride = 3 if settings().max_examples < 1000 else 1
    for length in range(0, len(good), stride):
        target.write_bytes(good[:length])
        assert refuses(target), length
    target.write_bytes(good)
    with target.open("r+b", buffering=0) as file:
        for bit in range(0, 8 * len(good), stride):
            at, changed = bit // 8, good[bit // 8] ^ (1 << bit % 8)
            os.pwrite(file.fileno(), bytes([changed]), at)
            assert refuses(target), bit
            os.pwrite(file.fileno(), good[at : at + 1], at)
            count[kernels.current_path(), "checkpoint bits"] += 1
    assert torch.equal(load(target).values, content.values)


@fuzz
@given(seed=st.integers(0, 2**63))
def test_hostile_content_with_right_checksums(count: Count, target: Path, seed: int) -> None:
    """Wrong types, places and numbers under right checksums: refused, or still parameters and state of a shard."""
    rng = random.Random(seed)
    facts, table, data = parts_of(file_of(content_of(rng)))
    for _ in range(MUTATIONS):
        count[kernels.current_path(), "checkpoint hostile"] += 1
        which = rng.randrange(3)
        hostile = sealed(
            mutated(facts, rng) if which == 0 else facts,
            mutated(table, rng) if which == 1 else table,
            damaged(data, rng) if which == 2 else data,
            rng,
        )
        target.write_bytes(hostile)
        if refuses(target):
            continue
        content = load(target)
        assert content.values.shape == (content.facts.end - content.facts.start,)
        assert content.values.dtype == torch.float32
        for state in content.states:
            assert all(isinstance(k, str) for k in state)
            assert all(isinstance(v, (torch.Tensor, int, float, str, type(None))) for v in state.values())
        assert read_facts(target) == content.facts


@fuzz
@given(seed=st.integers(0, 2**63))
def test_a_folder_with_a_hostile_file_resumes_from_the_older_version(count: Count, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    older = [content_of(rng, version=2, shards=2, index=i) for i in range(2)]
    newer = [content_of(rng, version=3, shards=2, index=i) for i in range(2)]
    for content in older + newer:
        path = path_of(tmp_path, content.facts.saved, content.facts.index)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file_of(content))
    victim = path_of(tmp_path, newer[1].facts.saved, 1)
    good = victim.read_bytes()
    facts, table, data = parts_of(good)
    for _ in range(MUTATIONS // 2):
        count[kernels.current_path(), "checkpoint folders"] += 1
        hostile = damaged(good, rng) if rng.random() < 0.5 else sealed(mutated(facts, rng), table, data, rng)
        victim.write_bytes(hostile)
        try:
            chosen, _ = Listing.of(tmp_path).newest_whole()
        except StateError as error:  # it may name another job, of which it is a whole version
            if "several" not in str(error):
                raise AssertionError(f"the older version is good, and yet: {error}") from error
            continue
        if chosen != older[0].facts.saved:
            assert all(not refuses(path_of(tmp_path, chosen, i)) for i in range(chosen.shards)), hostile.hex()


@fuzz
@given(seed=st.integers(0, 2**63))
def test_a_hostile_file_fills_a_shard_wholly_or_not_at_all(count: Count, target: Path, seed: int) -> None:
    rng = random.Random(seed)
    content = content_of(rng)
    facts, table, data = parts_of(file_of(content))
    shard = Shard(LAYOUT.shard(0, 1), RULES)
    untouched = shard.values.clone()
    for _ in range(MUTATIONS):
        count[kernels.current_path(), "checkpoint shards"] += 1
        target.write_bytes(sealed(facts, mutated(table, rng), data, rng))
        try:
            fill(target.parent.parent, content.facts.saved, shard, LAYOUT)
        except StateError:
            assert torch.equal(shard.values, untouched)
            assert not shard.ready
            continue
        assert shard.version == 3
        shard.ready = False
        shard.values.copy_(untouched)


@fuzz
@given(seed=st.integers(0, 2**63))
def test_a_right_file_brings_everything_back(target: Path, seed: int) -> None:
    content = content_of(random.Random(seed))
    target.write_bytes(file_of(content))
    assert read_facts(target) == content.facts
    back = load(target)
    assert back.facts == content.facts
    assert torch.equal(back.values, content.values)
    for mine, theirs in zip(content.states, back.states, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert theirs[key].dtype == value.dtype
                assert torch.equal(theirs[key], value)
            else:
                assert type(theirs[key]) is type(value)
                assert theirs[key] == value


def test_thousands_of_hostile_files_were_tried(count: Count, request: pytest.FixtureRequest) -> None:
    ran = [item for item in request.session.items if "test_fuzz_checkpoints" in item.nodeid]
    if len(ran) < 7:
        pytest.skip("only a part of the fuzz tests was selected")
    assert sum(n for (_, kind), n in count.items() if kind.startswith("checkpoint")) >= 5000
