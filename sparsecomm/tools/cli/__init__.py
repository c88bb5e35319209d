"""The `sparsecomm` command, one module or package a subcommand."""

__all__ = ["main"]


def main() -> None:
    """Runs the command line; the entry point of the `sparsecomm` script."""
    from sparsecomm.tools.cli.app import app  # here, so that importing a subcommand's module does not load typer

    app()
