"""Runs torch's own tests of a backend (DistributedTest._DistTestBase) over ours and over Gloo, and compares.

    python tests/torch_suite/run.py --ranks 3

Fails if a test that passes over Gloo does not pass over ours, unless `KNOWN` gives the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import ROOT, job_environment, mpirun_command

RANK = Path(__file__).with_name("rank.py")
KNOWN: dict[str, str] = {}
"""Tests that pass over Gloo and not over ours, each with the reason."""
Outcomes = dict[str, tuple[str, str]]


def all_tests() -> list[str]:
    """The names of torch's tests, in order."""
    code = (
        "from torch.testing._internal.distributed.distributed_test import DistributedTest as D\n"
        "print('\\n'.join(n for n in sorted(dir(D._DistTestBase)) if n.startswith('test')))"
    )
    env = job_environment() | {"BACKEND": "gloo", "WORLD_SIZE": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def run(backend: str, ranks: int, names: list[str], seconds: float) -> Outcomes:
    """Runs tests in as few jobs as failures allow."""
    outcomes: Outcomes = {}
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory(prefix="sparsecomm-torch-") as temporary:
            folder = Path(temporary)
            for name in ("barrier", "test_dir", "init_dir"):
                (folder / name).mkdir()
            env = job_environment() | {"TEMP_DIR": temporary, "SPARSECOMM_TIMEOUT": "30"}
            command = [*mpirun_command(ranks), sys.executable, str(RANK), backend, temporary, *left]
            with open(folder / "output", "w+") as output:
                subprocess.run(
                    [*command, "--seconds", str(seconds)], env=env, cwd=ROOT, stdout=output, stderr=output, check=False
                )
                output.seek(0)
                said = output.read()
            over = (folder / "over").exists()  # the ranks ended by themselves
            found = [json.loads(path.read_text()) for path in folder.glob("*.outcome")]
        outcomes |= {name: (kind, why) for name, kind, why in found}
        done = len(found)
        if done < len(left) and not over:
            outcomes[left[done]] = ("fail", "the job ended in it:\n" + said[-3000:])
            done += 1
        for name in left[:done]:
            if name in outcomes and outcomes[name][0] == "fail":
                print(f"{name}: {outcomes[name][1][-400:]}", file=sys.stderr)
        left = left[done:]
        print(f"{backend}: {len(names) - len(left)} of {len(names)} done", file=sys.stderr, flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="most seconds of a test")
    parser.add_argument("--only", default="", help="only tests with this in their name")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "torch_suite")
    parser.add_argument("--fresh", action="store_true", help="run Gloo again, too")
    options = parser.parse_args()
    names = [name for name in all_tests() if options.only in name]
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / f"gloo-{options.ranks}.json"
    if kept.exists() and not options.fresh:
        gloo: Outcomes = json.loads(kept.read_text())
    else:
        gloo = run("gloo", options.ranks, names, options.seconds)
        if not options.only:
            kept.write_text(json.dumps(gloo, indent=1))
    passed = [name for name in names if gloo[name][0] == "pass"]
    ours = run("sparsecomm", options.ranks, passed, options.seconds)
    (options.out / f"sparsecomm-{options.ranks}.json").write_text(json.dumps(ours, indent=1))
    print(f"torch's tests at {options.ranks} ranks: {len(names)}")
    print(f"  gloo: {dict(Counter(kind for kind, _ in gloo.values()))}")
    print(f"  of the {len(passed)} that pass over gloo, over sparsecomm: {dict(Counter(k for k, _ in ours.values()))}")
    bad = {name: why for name, (kind, why) in ours.items() if kind != "pass"}
    for name, why in bad.items():
        print(f"  {name}: {KNOWN.get(name) or why.strip().splitlines()[-1:]}")
    return int(bool(bad.keys() - KNOWN.keys()))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
