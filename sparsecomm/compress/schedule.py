"""Density schedules: the density at each step of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsecomm.errors import ConfigError

__all__ = ["Constant", "Density", "Geometric", "Warmup", "check_density", "density_at"]


def check_density(value: float, *, name: str = "density") -> float:
    """Returns the density if it lies in (0, 1].

    Raises:
        ConfigError: if it is not a number in (0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"{name} must be in (0, 1], got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Constant:
    """The same density at every step."""

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, step: int) -> float:
        """Returns the density at this step."""
        return self.density


@dataclass(frozen=True)
class Warmup:
    """A list of densities that last a number of steps each, then a final density (DGC's warm-up, counted in steps).

    Attributes:
        densities: the stages, e.g. ``(0.25, 0.063, 0.015, 0.004)``.
        steps_per_stage: steps per stage.
        final: density after the last stage.
    """

    densities: Sequence[float]
    steps_per_stage: int
    final: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "densities", tuple(self.densities))
        for i, d in enumerate(self.densities):
            check_density(d, name=f"Warmup.densities[{i}]")
        check_density(self.final, name="Warmup.final")
        if isinstance(self.steps_per_stage, bool) or not isinstance(self.steps_per_stage, int):
            raise ConfigError(f"Warmup.steps_per_stage must be an int, got {self.steps_per_stage!r}")
        if self.steps_per_stage < 1:
            raise ConfigError(f"Warmup.steps_per_stage must be at least 1, got {self.steps_per_stage!r}")

    @property
    def final_from(self) -> int:
        """First step with the final density."""
        return len(self.densities) * self.steps_per_stage

    def __call__(self, step: int) -> float:
        """Returns the density at this step."""
        stage = step // self.steps_per_stage
        return self.densities[stage] if stage < len(self.densities) else self.final


@dataclass(frozen=True)
class Geometric:
    """A density that falls geometrically and then stays constant (DGC's warm-up, counted in steps).

    Attributes:
        start: density at step 0.
        final: density from step `steps` on.
        steps: number of steps during which it falls; 0 starts with the final density.
    """

    start: float
    final: float
    steps: int

    def __post_init__(self) -> None:
        check_density(self.start, name="Geometric.start")
        check_density(self.final, name="Geometric.final")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ConfigError(f"Geometric.steps must be an int >= 0, got {self.steps!r}")

    @property
    def final_from(self) -> int:
        """First step with the final density."""
        return self.steps

    def __call__(self, step: int) -> float:
        """Returns the density at this step."""
        if step >= self.steps:
            return self.final
        return float(self.start * (self.final / self.start) ** (step / self.steps))


Density = float | Constant | Warmup | Geometric | Callable[[int], float]
"""A constant in (0, 1], a schedule, or any callable from step to density."""


def density_at(density: Density, step: int) -> float:
    """Returns the density at a step, and checks it.

    Raises:
        ConfigError: if a callable returned a value outside (0, 1].
    """
    if callable(density):
        return check_density(density(step), name=f"density({step})")
    return density
