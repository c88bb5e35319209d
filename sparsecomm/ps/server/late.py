"""Names the ranks that a server waits for, so that errors of a timeout point at the late ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsecomm.ps.server.answers import Answers

__all__ = ["late", "ranks"]


def late(answers: Answers | None, workers: Sequence[int], backup: int | None, clock: int = 0) -> str:
    """Names whom a shard waits for before its server can answer; empty if all its workers have left.

    Args:
        answers: The shard and its open requests; None if nobody has said HELLO for it.
        workers: Ranks of the living workers.
        backup: Rank of the server that keeps the shard's copy; None for none.
        clock: Pushes that the worker has done which asks; 0 for no worker.
    """
    if answers is None:
        return ranks("HELLO of worker", workers)
    shard = answers.shard
    if not answers.mirror.quiet and backup is not None:
        return f"server rank {backup} to store updates"
    silent = [w for w in workers if shard.clocks.get(w) == 0 and w not in answers.greeted and not shard.version]
    if not shard.ready and answers.initializer in answers.greeted:
        return f"the first values from worker rank {answers.initializer}"
    if not shard.ready:
        return ranks("HELLO of worker", silent)
    behind = _behind(answers, clock)
    if behind:
        return f"push {min(shard.clocks[w] for w in behind) + 1} of {ranks('worker', behind)}"
    return ranks("HELLO of worker", silent) or ranks("messages of worker", shard.clocks)


def _behind(answers: Answers, clock: int) -> list[int]:
    """Returns the workers that keep others from pulling, or a round from closing; the slowest alone."""
    shard, mode = answers.shard, answers.shard.rules.mode
    if mode.lead is None or not shard.clocks:
        return []
    pushed = max(shard.clocks.values()) if mode.rounds else 0
    needed = max(clock, pushed, *(pull.clock for pull in answers.pulls.values())) - mode.lead
    slowest = min(shard.clocks.values())
    return [w for w, clock in shard.clocks.items() if clock == slowest < needed]


def ranks(noun: str, numbers: Iterable[int]) -> str:
    """Returns a noun with the ranks that it stands for, in words; empty for no rank."""
    found = sorted(numbers)
    return f"{noun}{'s' * (len(found) > 1)} at rank {', '.join(map(str, found))}" if found else ""
