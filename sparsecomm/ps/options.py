"""The arguments of `run`: their checks, and the settings that servers and workers derive from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsecomm.compress import Compressor
from sparsecomm.errors import ConfigError, LaunchError
from sparsecomm.launch import default_timeout, detect, is_initialized
from sparsecomm.ps.joining import Rendezvous
from sparsecomm.ps.modes import Asynchronous, Mode, StaleSynchronous, Synchronous
from sparsecomm.ps.server.checkpoint import Checkpoints
from sparsecomm.ps.server.options import ServerOptions
from sparsecomm.ps.server.rules import OptimizerFactory, Rules
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.types import ValueCodec

__all__ = ["JobOptions", "PullOptions", "seconds_of"]

_PULL_BY = ("asked", "one_sided", "auto")
_PULL_CODECS = {c.name.lower(): c for c in ValueCodec}


def seconds_of(timeout: float | None) -> float:
    """Returns a timeout in seconds; the default one for None.

    Raises:
        ConfigError: If it is not a positive number.
    """
    limit = default_timeout() if timeout is None else timeout
    if isinstance(limit, bool) or not (isinstance(limit, (int, float)) and limit > 0):
        raise ConfigError(f"timeout must be a positive number of seconds, got {timeout!r}")
    return limit


@dataclass(frozen=True)
class PullOptions:
    """The arguments of `run` about pulls, as documented there.

    Attributes:
        compressor: The argument `pull`.
        codec_name: The argument `pull_codec`.
        by: The argument `pull_by`.
    """

    compressor: Compressor | None
    codec_name: str
    by: str

    @property
    def codec(self) -> ValueCodec:
        """Codec of the values of sparse pulls."""
        return _PULL_CODECS[self.codec_name]

    def check(self) -> None:
        """Checks the options.

        Raises:
            ConfigError: If one is wrong. It names the option and its value.
        """
        given = self.compressor
        if not (given is None or isinstance(given, Compressor)) or (given is not None and given.collectives):
            raise ConfigError(f"pull must be None or a compressor such as TopK(density=0.01), got {given!r}")
        if self.codec_name not in _PULL_CODECS:
            raise ConfigError(f"pull_codec must be one of {', '.join(_PULL_CODECS)}, got {self.codec_name!r}")
        if self.by not in _PULL_BY:
            raise ConfigError(f"pull_by must be one of {', '.join(_PULL_BY)}, got {self.by!r}")

    def has_windows(self, mailbox: Mailbox) -> bool:
        """Returns whether all ranks open windows for one-sided pulls.

        Windows and ULFM do not go together. Open MPI 5.0.11 says that none of its one-sided components is tested after
        a failure; with shared memory, a Get from a dead rank's window succeeds and returns its last values.

        Raises:
            ConfigError: If one-sided pulls are demanded in a job that survives deaths.
        """
        if mailbox.fault_tolerant and self.by == "one_sided":
            raise ConfigError(
                'pull_by="one_sided": no kind of window of this MPI goes on after the death of a rank; start the job '
                'without ULFM, or use "auto"'
            )
        return self.by != "asked" and not mailbox.fault_tolerant


@dataclass(frozen=True)
class JobOptions:
    """The arguments of `run`, as documented there, with those about pulls joined in `pulls`."""

    optimizer: OptimizerFactory
    servers: int
    mode: Mode | None
    pulls: PullOptions
    rate: Callable[[int], float] | None
    fault_tolerant: bool | None
    replicate: bool | None
    checkpoints: Checkpoints | None
    rendezvous: Rendezvous | None
    timeout: float | None

    def check(self) -> int:
        """Checks the options, alike on all ranks and before any of them communicates; returns the number of ranks.

        Raises:
            ConfigError: If an option is wrong. It names the option and its value.
            LaunchError: If the job was not started by an mpirun.
        """
        launch, servers, mode = detect(), self.servers, self.mode
        if not launch.mpi:
            raise LaunchError(
                f"a parameter server needs MPI, this process was started by {launch.launcher}; start it with "
                f"mpirun -n {max(1, servers) + 1} or more ranks ({servers} of them serve)"
            )
        if isinstance(servers, bool) or not isinstance(servers, int) or servers < 1:
            raise ConfigError(f"servers must be a whole number >= 1, got {servers!r}")
        if launch.size <= servers:
            raise ConfigError(f"servers = {servers} of {launch.size} ranks leave zero workers; start more ranks")
        if not (mode is None or isinstance(mode, (Synchronous, StaleSynchronous, Asynchronous))):
            raise ConfigError(f"mode must be Synchronous(), StaleSynchronous(bound) or Asynchronous(), got {mode!r}")
        self.pulls.check()
        seconds_of(self.timeout)
        if is_initialized():
            raise LaunchError("sparsecomm.ps.run brings up MPI by itself; leave out sparsecomm.init()")
        return launch.size

    def rules(self, world: int) -> Rules:
        """Returns the rules of a job of `world` ranks, whose last ones serve."""
        return Rules(
            optimizer=self.optimizer,
            workers=tuple(range(world - self.servers)),
            world=world,
            mode=Synchronous() if self.mode is None else self.mode,
            pull=self.pulls.compressor,
            pull_codec=self.pulls.codec,
            rate=self.rate,
        )

    def server_options(self, servers: tuple[int, ...], fault_tolerant: bool) -> ServerOptions:
        """Returns the options of each server.

        Args:
            servers: Ranks of the servers.
            fault_tolerant: Whether the job survives the death of a rank.
        """
        return ServerOptions(
            servers=servers,
            replicate=(fault_tolerant if self.replicate is None else self.replicate) and len(servers) > 1,
            checkpoints=self.checkpoints,
        )
