"""Data of the study that do not come with Python: prose and pictures, from packages of Debian.

    python bench/convergence/study_data.py          (or: make data)

It puts the files under runs/data, which git ignores. A package that is not installed is downloaded with
``apt-get download`` and unpacked there, which needs no root.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from run_log import replace_file

FOLDER = Path("runs") / "data"  # below the project's root, from which all commands are run
PROSE = FOLDER / "kjv.txt"
FASHION = FOLDER / "fashion-mnist"
FASHION_FILES = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
BIBLE, VERSES = Path("usr/bin/bible"), Path("usr/lib/bible.data")
PICTURES = Path("usr/share/datasets/fashion-mnist")
ADVICE = "run `python bench/convergence/study_data.py` from the project's root"
LABEL = re.compile(rb"^\S+:\d+ ", re.MULTILINE)


class FetchError(RuntimeError):
    """Data cannot be fetched; the message names the package and the reason."""


def hint(path: Path) -> str:
    """Returns the end of an error message: what to run, if ``study_data.py`` is to make that file."""
    return f"; {ADVICE}" if FOLDER.resolve() in path.resolve().parents else ""


def run(*command: str | Path, cwd: Path | None = None) -> bytes:
    """Runs a command and returns its output.

    Raises:
        FetchError: The command is not there, or fails.
    """
    words = list(map(str, command))
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, check=False)
    except OSError as error:
        raise FetchError(f"cannot run {words[0]}: {error.strerror or error}") from error
    if done.returncode:
        raise FetchError(f"`{' '.join(words)}` failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return done.stdout


def unpacked(wanted: Path, package: str, scratch: Path) -> Path:
    """Returns the root below which a file lies: the system's, or a folder into which its package is unpacked.

    Args:
        wanted: A file or folder of the package, relative to the root.
        package: Name of a Debian package.
        scratch: Folder for a package that is not installed.
    """
    if (Path("/") / wanted).exists():
        return Path("/")
    print(f"downloading {package} ...", flush=True)
    folder = scratch / package
    folder.mkdir()
    run("apt-get", "download", package, cwd=folder)
    for archive in folder.glob("*.deb"):
        run("dpkg-deb", "-x", archive, folder)
    if not (folder / wanted).exists():
        raise FetchError(f"the package {package} holds no {wanted}")
    return folder


def make_prose(scratch: Path) -> None:
    """Writes the King James Bible, one verse a line, without the labels ("Ge1:1"), which are no prose.

    Debian's file is compressed in a form that only its own program reads.
    """
    program = unpacked(BIBLE, "bible-kjv", scratch) / BIBLE
    verses = unpacked(VERSES, "bible-kjv-text", scratch) / VERSES
    lines = run(program, "-p", verses.parent, "-f", "-l", "10000", "Gen1:1-Rev22:21")
    replace_file(PROSE, LABEL.sub(b"", lines))


def make_fashion(scratch: Path) -> None:
    """Copies the files of Fashion-MNIST."""
    root = unpacked(PICTURES, "dataset-fashion-mnist", scratch)
    for name in FASHION_FILES:
        replace_file(FASHION / name, (root / PICTURES / name).read_bytes())


def main() -> int:
    """Makes the missing files and returns the exit status."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=FOLDER) as name:
            scratch = Path(name).resolve()
            if not PROSE.exists():
                make_prose(scratch)
            if not all((FASHION / name).exists() for name in FASHION_FILES):
                make_fashion(scratch)
    except (FetchError, OSError) as error:
        print(f"study_data.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{PROSE}: {PROSE.stat().st_size:,} bytes; {FASHION}: {len(FASHION_FILES)} files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
