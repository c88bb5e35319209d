"""Optimizers, feedback and density schedules of the training scripts, by hand."""

from __future__ import annotations

import compression
import optimizers
import pytest
import study_gpt
import torch

import sparsecomm as sc


def test_weight_decay_does_not_pass_through_sgds_momentum() -> None:
    settings = study_gpt.parse(["--optimizer", "sgd", "--lr", "0.5", "--momentum", "0.9", "--weight-decay", "0.1"])
    model = torch.nn.Linear(2, 2, dtype=torch.float32)
    optimizer = optimizers.make_optimizer(settings, model, None)
    weight, bias = (p.detach().double().clone() for p in (model.weight, model.bias))
    velocity = torch.zeros_like(weight)
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.full_like(p, step + 1.0)
        optimizer.step()
        velocity = 0.9 * velocity + step + 1.0
        weight = weight * (1 - 0.5 * 0.1) - 0.5 * velocity
        bias = bias - 0.5 * velocity[0]
    assert torch.allclose(model.weight.double(), weight, atol=1e-5)
    assert torch.allclose(model.bias.double(), bias, atol=1e-5), "vectors do not decay"


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_momentum_is_applied_once(name: str) -> None:
    flags = ["--optimizer", name, "--beta1" if name == "adamw" else "--momentum", "0.7"]
    model = torch.nn.Linear(2, 2, dtype=torch.float32)

    def inner(feedback: str) -> float:
        settings = study_gpt.parse([*flags, "--feedback", feedback])
        group = optimizers.make_optimizer(settings, model, None).param_groups[0]
        return float(group["betas"][0] if name == "adamw" else group["momentum"])

    assert inner("ef") == 0.7
    assert inner("dgc") == 0.0
    settings = study_gpt.parse([*flags, "--feedback", "dgc", "--clip", "2"])
    assert compression.make_feedback(settings) == sc.MomentumCorrection(momentum=0.7, clip_norm=2.0)


def test_adam_before_compression_leaves_decoupled_sgd_after_it() -> None:
    settings = study_gpt.parse(["--feedback", "adam", "--beta1", "0.5", "--clip", "2"])
    assert compression.make_feedback(settings) == sc.AdamCorrection(beta1=0.5, beta2=0.95, clip_norm=2.0)
    optimizer = optimizers.make_optimizer(settings, torch.nn.Linear(2, 2, dtype=torch.float32), None)
    assert isinstance(optimizer, optimizers.DecoupledSGD)
    assert [g["decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(g["momentum"] == 0.0 and g["weight_decay"] == 0.0 for g in optimizer.param_groups)


def test_adam_before_compression_is_refused_with_sgd(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study_gpt.parse(["--feedback", "adam", "--optimizer", "sgd"])
    assert "--feedback adam has no meaning with --optimizer sgd" in capsys.readouterr().err


def test_feedback_and_schedules() -> None:
    assert compression.make_feedback(study_gpt.parse([])) == sc.ErrorFeedback()
    assert compression.make_feedback(study_gpt.parse(["--feedback", "none"])) is None
    flags = ["--density", "0.001", "--warmup-steps", "30", "--steps", "60"]
    density = compression.make_density(study_gpt.parse([*flags, "--warmup-kind", "exp"]))
    assert callable(density)
    assert density(0) == 0.25
    assert density(15) == pytest.approx((0.25 * 0.001) ** 0.5)
    assert density(30) == density(59) == 0.001
    assert compression.make_density(study_gpt.parse(flags)) == sc.Warmup((0.25, 0.063, 0.015), 10, 0.001)
    assert compression.make_density(study_gpt.parse([])) == 0.01


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_ahead_takes_the_settings_of_dense(name: str) -> None:
    flags = ["--optimizer", name, "--feedback", "ahead", "--weight-decay", "0.2", "--clip", "2", "--lr", "0.5"]
    settings = study_gpt.parse(flags)
    model = torch.nn.Linear(2, 2, dtype=torch.float32)
    sc.init()
    state = sc.SparseState(sc.TopK(0.5), model=model)
    optimizer = optimizers.make_optimizer(settings, model, state)
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.5
    if name == "adamw":
        assert isinstance(optimizer, sc.optim.AdamW)
        assert group["betas"] == (settings.averaging, 0.95)
        assert group["weight_decay"] == 0.2
    else:
        assert isinstance(optimizer, sc.optim.SGD)
        assert group["momentum"] == 0.9
        assert group["weight_decay"] == pytest.approx(0.02), "momentum multiplies it by 10"
    assert state.config.feedback is not None
    assert state.config.feedback.clip_norm == 2.0
