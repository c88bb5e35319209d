"""Fusion of buckets: which are exchanged together, and how averages and errors return to each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.ddp.fusion import Batch, Fusion, HandedBucket
from sparsecomm.errors import TransportError
from sparsecomm.feedback import BucketLayout
from sparsecomm.runtime.arena import Arena


def handed(index: int, numel: int, dtype: torch.dtype = torch.float32) -> HandedBucket:
    return HandedBucket(
        index, [torch.nn.Parameter(torch.zeros(numel, dtype=dtype))], torch.full((numel,), index, dtype=dtype)
    )


def one_pass(buckets: list[HandedBucket], fuse_bytes: int) -> list[Batch]:
    fusion = Fusion()
    last = len(buckets) - 1
    return [batch for i, h in enumerate(buckets) for batch in fusion.add(h, fuse_bytes, last=i == last)]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([torch.float32, torch.float16])), min_size=1, max_size=12),
    st.integers(0, 200),
)
def test_every_bucket_is_exchanged_once_in_order(sizes: list[tuple[int, torch.dtype]], fuse_bytes: int) -> None:
    buckets = [handed(i, n, dtype) for i, (n, dtype) in enumerate(sizes)]
    batches = one_pass(buckets, fuse_bytes)
    assert [m.index for b in batches for m in b.members] == list(range(len(buckets)))
    assert [b.last for b in batches] == [False] * (len(batches) - 1) + [True]
    for i, batch in enumerate(batches):
        total = sum(m.nbytes for m in batch.members)
        assert len({m.grad.dtype for m in batch.members}) == 1
        if len(batch.members) > 1:
            assert all(m.nbytes < fuse_bytes for m in batch.members), "a large bucket is never copied"
        following = batches[i + 1].members[0] if i + 1 < len(batches) else None
        if following is not None and following.grad.dtype == batch.members[0].grad.dtype:
            assert total >= fuse_bytes or following.nbytes >= fuse_bytes, "sent before it was worth it"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_the_average_comes_back_to_its_bucket(sizes: list[int]) -> None:
    buckets = [handed(i, n) for i, n in enumerate(sizes)]
    (batch,) = one_pass(buckets, 10**6)
    flat = batch.flat(Arena())
    assert flat.numel() == batch.numel == sum(sizes)
    flat.mul_(2.0)
    batch.finish(flat)
    for h in buckets:
        assert h.result.wait() is h.grad
        assert h.grad.eq(2.0 * h.index).all()


def test_a_failure_reaches_every_bucket_and_touches_none() -> None:
    buckets = [handed(i, 3) for i in range(3)]
    (batch,) = one_pass(buckets, 10**6)
    batch.flat(Arena()).fill_(float("nan"))
    batch.fail(ValueError("no"))
    for h in buckets:
        with pytest.raises(Exception, match="no"):
            h.result.wait()
        assert h.grad.eq(h.index).all()


def test_what_a_broken_off_backward_left_is_failed_not_sent_with_the_next() -> None:
    fusion, stale, fresh = Fusion(), handed(0, 3), handed(0, 3)
    assert fusion.add(stale, 100, last=False) == []
    (batch,) = fusion.add(fresh, 100, last=True)
    assert batch.members == [fresh]
    with pytest.raises(Exception, match="did not come to its end"):
        stale.result.wait()


def test_unused_parameters_are_found_across_buckets() -> None:
    buckets = [handed(i, 4) for i in range(3)]  # the gradient of the first is zero
    buckets.append(handed(3, 2))
    buckets[3].grad.zero_()
    (batch,) = one_pass(buckets, 10**6)
    shapes = tuple(tuple(p.shape) for p in batch.parameters)
    layout = BucketLayout(tuple("abcd"), shapes, tuple((1,) for _ in shapes))
    assert batch.unused_spans(layout) == ((0, 4), (12, 14))


def test_the_error_of_a_member_is_the_errors_of_all() -> None:
    first, second = handed(0, 3), handed(1, 3)
    second.error = TransportError("mine")
    (batch,) = one_pass([first, second], 10**6)
    with pytest.raises(TransportError, match="mine"):
        batch.check("rank 0, bucket 0")
