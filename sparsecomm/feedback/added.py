"""A gradient in the memory of a bucket, with everything needed to undo its addition."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from sparsecomm.feedback.corrections import Correction, advance, rewind, work_space
from sparsecomm.feedback.memory import BucketMemory, Empty
from sparsecomm.feedback.options import ErrorFeedback, Feedback
from sparsecomm.feedback.watch import Hidden
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import Pairs, Span

__all__ = ["Added", "Clipping", "Incoming", "set_aside_and_correct"]

_ERROR_FEEDBACK = ErrorFeedback()


@dataclass(frozen=True, slots=True)
class Clipping:
    """How a rank clips its gradient of one bucket, g, before momentum or Adam correction.

    It stands for the clipping of the average gradient, which a rank does not know. The squared norm that is clipped is
    therefore g's only in part, the more the ranks agree, and for the rest the usual one. A rank that went by g alone
    would clip in nearly every step, since the norm of a small batch varies more than that of a large one. Its hard
    batches would then count as little as its easy ones.

    Attributes:
        norm: norm to which g is clipped.
        usual: usual squared norm of g, the mean over ranks and earlier steps.
        own: weight of g's squared norm, in (0, 1]; `usual` has the rest.
    """

    norm: float
    usual: float = 0.0
    own: float = 1.0

    def factor(self, norm: float) -> float:
        """Returns the factor in (0, 1] that clips a gradient of this norm."""
        expected = math.sqrt((1.0 - self.own) * self.usual + self.own * norm * norm)
        return min(1.0, self.norm / expected) if expected > 0.0 else 1.0


@dataclass(frozen=True, slots=True)
class Incoming:
    """A gradient, and the options of its addition to the memory of a bucket.

    Attributes:
        grad: shape (n,), float32, float16 or bfloat16.
        feedback: treatment of elements that are not sent; None drops them.
        scale: factor that converts the gradient to the units of the residual.
        unused: spans of parameters that this rank did not use in this step. Their gradient is zero. Their memory does
            not change, since DDP would discard the average of a parameter that no rank used.
        clipping: how momentum or Adam correction clips this bucket's gradient; None to not clip.
        grad_survives: whether the gradient stays unchanged until commit or undo. Otherwise undo needs a copy of the
            memory.
    """

    grad: torch.Tensor
    feedback: Feedback | None = _ERROR_FEEDBACK
    scale: float = 1.0
    unused: tuple[Span, ...] = ()
    clipping: Clipping | None = None
    grad_survives: bool = True


@dataclass(slots=True)
class Added:
    """A gradient that was added to the memory of a bucket.

    Attributes:
        memory: memory of the bucket.
        incoming: the gradient. It must be unchanged when `undo` is called, unless there are `copies`.
        source: vector that is added to the residual: the gradient (times scale) or the output of a correction. None if
            a correction met a gradient that is not finite, and changed nothing.
        nonfinite: number of elements that were NaN or infinite.
        in_residual: whether `source` has been added to the residual.
        clip: factor by which a correction clipped the gradient.
        set_aside: slices of unused parameters in residual and moments, each with its previous content.
        copies: residual and moments, each with its previous content; empty if the gradient survives.
    """

    memory: BucketMemory
    incoming: Incoming
    source: torch.Tensor | None
    nonfinite: int = 0
    in_residual: bool = False
    clip: float = 1.0
    set_aside: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def correction(self) -> Correction | None:
        """The momentum or Adam correction in use; None without one."""
        feedback = self.incoming.feedback
        return None if feedback is None or isinstance(feedback, ErrorFeedback) else feedback

    @property
    def masking(self) -> bool:
        """Whether momentum is zeroed at the positions of sent elements."""
        return self.correction is not None and self.correction.masking

    @property
    def factor(self) -> float:
        """Factor by which `source` is multiplied when it is added to the residual."""
        return self.incoming.scale if self.correction is None else 1.0

    @property
    def hidden(self) -> list[Hidden]:
        """The residuals that are set aside, each with its first position in the bucket."""
        # The residual's slices come first in `set_aside`; the moments have as many each.
        pairs = zip(self.incoming.unused, self.set_aside, strict=False)
        return [(start, content) for (start, _), (_, content) in pairs]

    def set_aside_is_nonzero(self) -> bool:
        """Returns whether the previous content of unused parameters is nonzero anywhere."""
        return any(bool(content.any()) for _, content in self.set_aside)

    def finish(self) -> None:
        """Adds the previous content of unused parameters to anything that the exchange left there."""
        for place, content in self.set_aside:
            place.add_(content)
        self.set_aside = []

    def undo(self, selected: Pairs | None) -> None:
        """Restores residual and moments, exactly from copies, otherwise to rounding.

        Args:
            selected: positions (uint32) and values (float32) that were taken out of the residual after the addition.
        """
        if self.copies:
            for memory, content in self.copies:
                memory.copy_(content)
            self.set_aside = []
            return
        if self.source is not None:
            if self.in_residual and self.memory.residual is not None:
                self._subtract(self.memory.residual, self.source, selected)
            if self.correction is not None:
                rewind(self.correction, self.memory, self.incoming.grad, self.incoming.scale * self.clip)
        for place, content in self.set_aside:
            place.copy_(content)
        self.set_aside = []

    def _subtract(self, residual: torch.Tensor, source: torch.Tensor, selected: Pairs | None) -> None:
        step = source if self.correction is not None else source.to(torch.float32) * self.incoming.scale
        if self.nonfinite:
            # The kernel left the residual unchanged where the sum was not finite. Adding again shows where that was.
            residual.sub_(torch.where(torch.isfinite(residual + step), step, torch.zeros_like(step)))
        else:
            residual.sub_(step)
        if selected is not None:
            chosen = selected[0].to(torch.int64)
            residual[chosen] = selected[1] - torch.nan_to_num(step[chosen], nan=0.0, posinf=0.0, neginf=0.0)


def set_aside_and_correct(memory: BucketMemory, incoming: Incoming, arena: Arena) -> Added:
    """Sets the memory of unused parameters aside and, with a correction, updates the moments.

    Args:
        memory: memory of the bucket. Mutated.
        incoming: the gradient.
        arena: allocates the buffers.

    Returns:
        The gradient, with `source` not yet added to the residual.
    """
    if incoming.feedback is None and memory.residual is not None:
        memory.residual.zero_()
    memory.empty = Empty.UNKNOWN
    added = Added(memory, incoming, incoming.grad)
    for name in ("residual", "velocity", "second_moment"):
        kept: torch.Tensor | None = getattr(memory, name)
        if kept is not None:
            if not incoming.grad_survives:
                copy = arena.get((memory.index, name, "before"), kept.numel(), torch.float32)
                added.copies.append((kept, copy.copy_(kept)))
            for start, end in incoming.unused:
                place = kept[start:end]
                added.set_aside.append((place, place.clone()))
                place.zero_()
    if added.correction is not None:
        _correct(added, added.correction, arena)
    if memory.watch is not None and memory.residual is not None and added.source is not None:
        memory.watch.began(added.source, added.factor, memory.residual)
    return added


def _correct(added: Added, options: Correction, arena: Arena) -> None:
    """Clips the gradient, updates the moments and sets `source`. A gradient with NaN or infinity changes no moment."""
    memory, incoming = added.memory, added.incoming
    grad, n = incoming.grad, incoming.grad.numel()
    low, high = (float(x) for x in torch.aminmax(grad)) if n else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        added.nonfinite = n - int(torch.isfinite(grad).sum())
        added.source = None
        return
    if incoming.clipping is not None and n:
        norm = float(torch.linalg.vector_norm(grad, dtype=torch.float32)) * abs(incoming.scale)
        added.clip = incoming.clipping.factor(norm)
    space = work_space(options, arena, memory.index, n)
    added.source = advance(options, memory, grad, incoming.scale * added.clip, space)
