"""Write the table and pictures of `bench peers` into docs/results.md: `make readme`.

    python bench/readme.py bench/results/..._peers.json

Replaces the text between the page's markers and draws the pictures next to the result file. Every run has a row, also
one that failed or that loses to plain DDP. The README repeats some of these rows; a test compares them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import results
from sparsecomm.tools.benches.plots_train import plots

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- peers: written by bench/readme.py -->", "<!-- /peers -->"


def cell(row: Mapping[str, Any], best: float) -> str:
    """Returns a step's milliseconds with the exposed ones in parentheses, in bold if the step equals `best`."""
    if row["error"]:
        return "failed"
    text = f"{1e3 * row['step_seconds']:.0f} ({1e3 * row['exposed_seconds']:.0f})"
    return f"**{text}**" if row["step_seconds"] == best else text


def label(row: Mapping[str, Any]) -> str:
    """Returns the name of a run in the table."""
    names = {"none": "no communication (floor)", "ddp-gloo": "plain DDP over Gloo, fp32"}
    name = names.get(row["method"], row["method"])
    return name if row["density"] is None else f"{name}, {100 * row['density']:g}%"


def markdown(result: results.Result) -> str:
    """Returns the conditions of the measurement, the table, and the reasons of the runs that failed."""
    rows, meta = result.rows, result.meta
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    runs = list(dict.fromkeys((row["method"], row["density"]) for row in rows))
    found = {(row["rate"], row["method"], row["density"]): row for row in rows}
    timed = [row for row in rows if not row["error"] and row["method"] != "none"]
    best = {rate: min(row["step_seconds"] for row in timed if row["rate"] == rate) for rate in rates}
    lines = [
        "| method | " + " | ".join(f"{rate}: step ms (exposed)" for rate in rates) + " | bytes a step | loss |",
        "|---" * (len(rates) + 3) + "|",
    ]
    reasons = []
    for method, density in runs:
        cells = [found[rate, method, density] for rate in rates]
        good = [row for row in cells if not row["error"]]
        reasons += [f"{label(cells[0])}: {cells[0]['error']}"] if not good else []
        sent = f"{good[0]['bytes_per_step']:,}" if good else ""
        loss = f"{good[0]['final_loss']:.3f}" if good else ""
        times = " | ".join(cell(row, best[row["rate"]]) for row in cells)
        lines.append(f"| {label(cells[0])} | {times} | {sent} | {loss} |")
    core = " and one core" if meta.get("cores_of_hosts") else ""
    about = (
        f"{meta['hosts']} hosts (network namespaces of one machine with {meta['cores']} cores of {meta['cpu']}), "
        f"one rank{core} each, {meta['task']} with {meta['numel'] / 1e6:.1f}M parameters, medians. "
        f"Command: `{meta['command']}`. "
        "*Exposed* is the time of a step minus that of the same step without communication. "
        f"The loss is the one after {meta['loss_steps']} steps: it shows that all methods train, not where they end."
    )
    failures = "".join(f"\n- {reason}" for reason in reasons)
    return f"{about}\n\n" + "\n".join(lines) + (f"\n\nNot measured:{failures}" if failures else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a file that `sparsecomm bench peers --json` wrote")
    parser.add_argument("--readme", type=Path, default=PAGE, help="the page to write (default: docs/results.md)")
    options = parser.parse_args(arguments)
    try:
        result = results.load(options.result)
    except ConfigError as error:
        parser.error(str(error))
    if result.bench != "peers":
        parser.error(f"{options.result} is a result of bench {result.bench}, not peers")
    text = options.readme.read_text()
    parts = re.split(f"({re.escape(BEGIN)}|{re.escape(END)})", text)
    if [p for p in parts if p in (BEGIN, END)] != [BEGIN, END]:
        parser.error(f"{options.readme} needs the markers {BEGIN} and {END}, once each")
    stem = options.result.with_suffix("").name
    drawn = plots(result.content, result.path.parent)
    pictures = [file.rename(file.with_name(f"{stem}{file.name.removeprefix('peers')}")) for file in drawn]
    shown = [p for p in pictures if p.suffix == ".png" and "exposed" in p.name]
    places = [os.path.relpath(p, options.readme.resolve().parent) for p in shown]
    links = "".join(f"\n\n![exposed time by bandwidth]({place})" for place in places)
    parts[2] = f"\n{markdown(result)}{links}\n"
    options.readme.write_text("".join(parts))
    print(f"{options.readme}: table and {len(pictures)} pictures", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
