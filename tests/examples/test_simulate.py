"""The simulation of ranks: it equals dense training where it should, and its command line works."""

from __future__ import annotations

import argparse
import copy

import pytest
import simulate
import torch


def switches(**changes: object) -> argparse.Namespace:
    base: dict[str, object] = {"dense": False, "ranks": 1, "steps": 4, "density": 1.0, "fall": 0.0, "clip": 1.0}
    base |= {"clip_by": "average", "short": False, "follow": True, "shorter": True}
    return argparse.Namespace(**{**base, "moment": "average", "ahead": "aligned", "infer": True, **changes})


def final_loss(**changes: object) -> float:
    task, settings = simulate.make_task("lstm", ["--steps", "4", "--global-batch", "4", "--held-out", "1"])
    return simulate.simulate(switches(**changes), task, settings)[0]


def test_one_rank_that_sends_everything_is_dense() -> None:
    assert final_loss() == pytest.approx(final_loss(dense=True), rel=1e-5)


def test_nothing_is_lost_in_what_is_inferred() -> None:
    task, settings = simulate.make_task("lstm", ["--steps", "4", "--global-batch", "4", "--held-out", "1"])
    model = simulate.FlatModel(task, settings, 2)
    method = simulate.Method(switches(ranks=2, shorter=False), model)
    random = torch.Generator().manual_seed(0)
    for step in range(3):
        grads = torch.randn(2, model.at.numel(), generator=random, dtype=torch.float32)
        before = method.residual.clone()
        added = simulate.Method(switches(ranks=2, shorter=False), model)
        added.momentum, added.second = method.momentum.clone(), method.second.clone()
        added.gradients = copy.deepcopy(method.gradients)
        everything = added.update(grads.clone(), step, 1.0)
        sent = method.update(grads.clone(), step, 0.05)
        torch.testing.assert_close(before.mean(0) + everything, sent + method.residual.mean(0), rtol=1e-4, atol=1e-4)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ranks", "2", "--steps", "3", "--task-flags", "--global-batch 4 --held-out 1"]
    assert simulate.main(["lstm", *flags]) == 0
    assert "average moment, ahead aligned, infer True: loss" in capsys.readouterr().out
