"""The `sparsecomm` command; each subcommand has its own module or package."""

__all__ = ["main"]


def main() -> None:
    """Runs the command line; the entry point of the `sparsecomm` script."""
    from sparsecomm.tools.cli.app import app  # imported late: subcommands work without typer

    app()
