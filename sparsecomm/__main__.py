"""`python -m sparsecomm` is the `sparsecomm` command."""

from sparsecomm.cli import main

if __name__ == "__main__":
    main()
