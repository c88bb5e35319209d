"""`python -m sparsecomm` is the `sparsecomm` command."""

from sparsecomm.tools.cli import main

if __name__ == "__main__":
    main()
