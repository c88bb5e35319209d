"""The `sparsecomm` command; each subcommand has its own module or package."""

__all__ = ["main"]


def main() -> None:
    """Runs the command line; the entry point of the `sparsecomm` script."""
    from sparsecomm.tools.cli.app import app  # late, so that importing a subcommand's module does not load typer

    app()
