"""Options and exit codes of the command line. Each command is implemented in the module of the same name."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsecomm.tools.cli.lab import lab_app

__all__ = ["app"]

app = typer.Typer(
    name="sparsecomm",
    help="Sparse gradient communication for PyTorch data-parallel training over MPI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(lab_app, name="lab")


def _print_version(wanted: bool) -> None:
    if wanted:
        from sparsecomm import __version__

        typer.echo(f"sparsecomm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which MPI must start and the ranks must find each other.")
    ] = 60.0,
) -> None:
    """Check this installation and, under mpirun, srun or torchrun, this job. Exits with 1 if something is broken."""
    from sparsecomm.tools.cli.doctor import run

    raise typer.Exit(run(as_json=json, seconds=timeout))


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(ctx: typer.Context) -> None:
    """Measure kernels, codecs, collectives and training; `sparsecomm bench --list` lists the benches."""
    from sparsecomm.tools.cli.bench import run

    raise typer.Exit(run(list(ctx.args)))
