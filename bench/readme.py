"""Write the README's table and pictures of `bench peers` from a result file: `make readme`.

    python bench/readme.py bench/results/..._peers.json

Replaces what stands between the README's markers, and draws the pictures beside the file. Nothing is left out: a run
that failed, or that loses to plain DDP, has its row.
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
BEGIN, END = "<!-- peers: written by bench/readme.py -->", "<!-- /peers -->"


def cell(row: Mapping[str, Any], best: float) -> str:
    """A step's milliseconds and, of these, the exposed ones; the shortest step in bold."""
    if row["error"]:
        return "failed"
    text = f"{1e3 * row['step_seconds']:.0f} ({1e3 * row['exposed_seconds']:.0f})"
    return f"**{text}**" if row["step_seconds"] == best else text


def label(row: Mapping[str, Any]) -> str:
    """The run's name in the table."""
    names = {"none": "no communication (floor)", "ddp-gloo": "plain DDP over Gloo, fp32"}
    name = names.get(row["method"], row["method"])
    return name if row["density"] is None else f"{name}, {100 * row['density']:g}%"


def markdown(result: results.Result) -> str:
    """The table, the pictures and what a reader must know to judge them."""
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
        own = [found[rate, method, density] for rate in rates]
        good = [row for row in own if not row["error"]]
        reasons += [f"{label(own[0])}: {own[0]['error']}"] if not good else []
        sent = f"{good[0]['bytes_per_step']:,}" if good else ""
        loss = f"{good[0]['final_loss']:.3f}" if good else ""
        cells = " | ".join(cell(row, best[row["rate"]]) for row in own)
        lines.append(f"| {label(own[0])} | {cells} | {sent} | {loss} |")
    about = (
        f"{meta['hosts']} hosts (namespaces on one machine: {meta['cores']} cores of {meta['cpu']}), one rank each, "
        f"{meta['task']} of {meta['numel'] / 1e6:.1f}M parameters; medians; `{meta['command']}`. "
        "Exposed is a step minus the same step without communication. "
        f"The loss is that after {meta['loss_steps']} steps: it shows that all train, not where they end."
    )
    failures = "".join(f"\n- {reason}" for reason in reasons)
    return f"{about}\n\n" + "\n".join(lines) + (f"\n\nNot measured:{failures}" if failures else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a file that `sparsecomm bench peers --json` wrote")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="default: the project's")
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
    pictures = [file.rename(file.with_name(f"{stem}{file.name.removeprefix('peers')}")) for file in drawn(result)]
    shown = [p for p in pictures if p.suffix == ".png" and "exposed" in p.name]
    places = [os.path.relpath(p, options.readme.resolve().parent) for p in shown]
    links = "".join(f"\n\n![exposed time by bandwidth]({place})" for place in places)
    parts[2] = f"\n{markdown(result)}{links}\n"
    options.readme.write_text("".join(parts))
    print(f"{options.readme}: table and {len(pictures)} pictures", file=sys.stderr)
    return 0


def drawn(result: results.Result) -> list[Path]:
    """Draws the pictures beside the file."""
    return plots(result.content, result.path.parent)


if __name__ == "__main__":
    raise SystemExit(main())
