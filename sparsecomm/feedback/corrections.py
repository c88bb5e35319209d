"""Momentum before compression: from a gradient, computes the vector that is added to the residual, and undoes that."""

from __future__ import annotations

import math

import torch

from sparsecomm.feedback.memory import BucketMemory
from sparsecomm.feedback.options import AdamCorrection, MomentumCorrection
from sparsecomm.runtime.arena import Arena

__all__ = ["Correction", "advance", "rewind", "work_space"]

Correction = MomentumCorrection | AdamCorrection
"""Feedback that keeps moments of the gradients of this rank."""


def advance(
    options: Correction, memory: BucketMemory, grad: torch.Tensor, factor: float, out: torch.Tensor
) -> torch.Tensor:
    """Updates the moments of a bucket by one step.

    Args:
        options: the correction.
        memory: memory of the bucket. Mutated: `velocity` and, for Adam, `second_moment`, both float32, shape (n,).
        grad: float32, float16 or bfloat16, shape (n,), finite.
        factor: factor on the gradient, from unscaling and clipping.
        out: float32, shape (n,), work space. Mutated.

    Returns:
        The vector to add to the residual, float32, shape (n,): `out` or the velocity.
    """
    velocity, second_moment, age = memory.velocity, memory.second_moment, memory.age
    assert velocity is not None, "a correction needs a velocity"
    if isinstance(options, AdamCorrection):
        assert second_moment is not None, "Adam needs a second moment"
        torch.mul(grad, factor, out=out)
        velocity.lerp_(out, 1.0 - options.beta1)
        second_moment.mul_(options.beta2).addcmul_(out, out, value=1.0 - options.beta2)
        torch.sqrt(second_moment, out=out)
        shrink = memory.alignment.of_gradients() if options.aligned else 1.0
        out.mul_(math.sqrt(shrink / (1.0 - options.beta2**age))).add_(options.eps)
        return torch.div(velocity, out, out=out).div_(1.0 - options.beta1**age)
    if options.nesterov:
        velocity.add_(grad, alpha=factor).mul_(options.momentum)
        return torch.add(velocity, grad, alpha=factor, out=out)
    return velocity.mul_(options.momentum).add_(grad, alpha=factor)


def work_space(options: Correction, arena: Arena, bucket: int, numel: int) -> torch.Tensor:
    """Returns the work space of `advance`: float32, shape (numel,), or empty if it needs none."""
    needed = isinstance(options, AdamCorrection) or options.nesterov
    return arena.get((bucket, "update"), numel if needed else 0, torch.float32)


def rewind(options: Correction, memory: BucketMemory, grad: torch.Tensor, factor: float) -> None:
    """Undoes one `advance` of the same gradient and factor, to rounding."""
    velocity, second_moment = memory.velocity, memory.second_moment
    assert velocity is not None, "a correction needs a velocity"
    step = grad.to(torch.float32) * factor
    if isinstance(options, AdamCorrection):
        assert second_moment is not None, "Adam needs a second moment"
        velocity.sub_(step, alpha=1.0 - options.beta1)
        _divide(velocity, options.beta1)
        second_moment.addcmul_(step, step, value=options.beta2 - 1.0)
        _divide(second_moment, options.beta2)
        second_moment.clamp_(min=0.0)
    elif options.nesterov:
        _divide(velocity, options.momentum)
        velocity.sub_(step)
    else:
        velocity.sub_(step)
        _divide(velocity, options.momentum)


def _divide(moment: torch.Tensor, decay: float) -> None:
    """Undoes a decay; a decay of 0 cannot be undone and gives zeros."""
    if decay == 0.0:
        moment.zero_()
    else:
        moment.div_(decay)
