"""Pauses between looks at what may have come."""

from __future__ import annotations

import pytest

from sparsecomm.transport import Backoff, backoff


def test_pauses_grow_with_the_time_without_news_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(backoff.time, "monotonic", lambda: now[0])
    waiting = Backoff()
    assert waiting.pause() == 0.0, "what answers at once is not slept through"
    pauses = []
    for _ in range(200):
        now[0] += 1e-5
        pauses.append(waiting.pause())
    assert pauses == sorted(pauses)
    for i, pause in enumerate(pauses):
        assert pause <= (i + 1) * 1e-5 / 4 + 1e-9
    now[0] += 60.0
    assert waiting.quiet == pytest.approx(60.002)
    assert waiting.pause() == pytest.approx(500e-6)
    waiting.news()
    assert waiting.pause() == 0.0


def test_a_pause_of_nothing_is_no_call_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(backoff.time, "monotonic", lambda: 5.0)
    monkeypatch.setattr(backoff.time, "sleep", slept.append)
    Backoff().sleep()
    assert slept == []
