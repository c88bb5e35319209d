"""`sparsecomm lab`: makes, uses, lists and removes labs of several hosts (network namespaces) on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsecomm.errors import LabError
from sparsecomm.tools.lab import Lab, LabStatus, missing, survey
from sparsecomm.tools.lab.survey import remove

__all__ = ["lab_app"]

HOSTS, RATE = 4, "1gbit"
_TIMED_OUT = 124  # as of timeout(1)

lab_app = typer.Typer(
    help="Several hosts on this machine, joined by links of a given rate (needs Linux and root).", no_args_is_help=True
)
Name = Annotated[str, typer.Option("--name", help="Name of the lab; several labs can be up at once.")]
_PIN_HELP = "Run the processes of each host on a core of their own."
_RATE_HELP = "Rate of every link in each direction: 1gbit, 100mbit, ...; none for no limit."


@lab_app.command()
def up(
    hosts: Annotated[int, typer.Option(help="Number of hosts.")] = HOSTS,
    rate: Annotated[str, typer.Option(help=_RATE_HELP)] = RATE,
    pin: Annotated[bool, typer.Option("--pin", help=_PIN_HELP)] = False,
    name: Name = "lab",
) -> None:
    """Make a lab that stays until `lab down`."""
    with _clear_errors(), _signals_raise():
        lab = Lab(hosts=hosts, rate=_rate(rate), name=name, pin=pin).up(persistent=True)
        pinned = "" if lab.cores is None else f", on cores {', '.join(map(str, lab.cores))}"
        _say(f"lab {name!r} is up: {', '.join(lab.hosts)} at {lab.rate or 'no limit'}{pinned}")


@lab_app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="Command that every rank runs.")],
    ranks: Annotated[int | None, typer.Option("-n", help="Number of ranks; one per host by default.")] = None,
    hosts: Annotated[int | None, typer.Option(help="Make a lab of this many hosts for this run only.")] = None,
    rate: Annotated[str | None, typer.Option(help="Make a lab with links of this rate for this run only.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help=f"Make a lab for this run only. {_PIN_HELP}")] = False,
    env: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Variable for all ranks; may be repeated.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="End the job after this time, with exit code 124.")
    ] = None,
    name: Name = "lab",
) -> None:
    """Run a command under mpirun across the hosts of a lab: the one that is up, or one made for this run."""
    with _clear_errors(), _signals_raise():
        variables = dict(map(_variable, env or ()))
        if hosts is None and rate is None and not pin:
            code = _run(Lab.find(name), command, ranks, variables, timeout)
        else:
            count = HOSTS if hosts is None else hosts
            with Lab(hosts=count, rate=_rate(rate or RATE), name=name, pin=pin) as lab:
                code = _run(lab, command, ranks, variables, timeout)
    raise typer.Exit(code if code >= 0 else 128 - code)


@lab_app.command()
def rate(
    value: Annotated[str, typer.Argument(metavar="RATE", help=_RATE_HELP)],
    name: Name = "lab",
) -> None:
    """Change the rate of all links of a lab."""
    with _clear_errors():
        lab = Lab.find(name)
        lab.set_rate(_rate(value))
        _say(f"lab {name!r}: {lab.rate or 'no limit'}")


@lab_app.command()
def status() -> None:
    """List all labs, including the remains of labs whose process died."""
    with _clear_errors():
        labs = survey()
    console = Console(width=None if sys.stdout.isatty() else 120)
    if not labs:
        console.print("no lab is up")
        problem = missing()
        if problem:
            console.print(f"and none can be made here: {escape(problem)}", soft_wrap=True, highlight=False)
    for lab in labs:
        _print_status(lab, console)


@lab_app.command()
def down(name: Name = "lab") -> None:
    """Kill all processes in a lab and remove it; also removes the remains of a dead one."""
    with _clear_errors():
        killed = remove(name)
        _say(f"lab {name!r} is removed" + (f"; {killed} processes inside were killed" if killed else ""))


def _print_status(lab: LabStatus, console: Console) -> None:
    title = Text.assemble((lab.name, "bold"), f", {lab.rate or 'no limit'} each way")
    if lab.owner is not None:
        title.append(f", removed when process {lab.owner} ends")
    console.print(title)
    if lab.problem:
        console.print(Text.assemble(("  not usable: ", "red"), lab.problem), soft_wrap=True)
        console.print(f"  remove it with: {lab.fix}", soft_wrap=True, markup=False, highlight=False)
    table = Table("host", "address", "core", "processes", box=None, padding=(0, 2))
    cores = ["all"] * len(lab.hosts) if lab.cores is None else map(str, lab.cores)
    for host, address, core, count in zip(lab.hosts, lab.addresses, cores, lab.processes, strict=True):
        table.add_row(host, address, core, str(count))
    if lab.hosts:
        console.print(table)


def _run(lab: Lab, command: list[str], ranks: int | None, env: dict[str, str], timeout: float | None) -> int:
    """Runs a job with the streams of this process; returns its exit code."""
    try:
        done = lab.mpirun(command, ranks=ranks, env=env, timeout=timeout, capture=False)
    except subprocess.TimeoutExpired:
        _complain(f"the job did not end within {timeout:g} s: all processes in lab {lab.name!r} were killed")
        return _TIMED_OUT
    if done.stderr:
        _complain(done.stderr.strip())
    return done.returncode


def _say(text: str) -> None:
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def _complain(text: str) -> None:
    Console(stderr=True).print(Text.assemble(("error:", "red"), f" {text}"), soft_wrap=True)


def _rate(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _variable(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise LabError(f"--env {text!r} is not KEY=VALUE")
    return key, value


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except LabError as error:
        _complain(str(error))
        raise typer.Exit(1) from None


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turns the signals that end a process into SystemExit, so that the lab is removed on the way out."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    old = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
