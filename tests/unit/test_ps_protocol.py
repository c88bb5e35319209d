"""The protocol of the parameter server is complete, and imports between its parts run one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from simulated_job import SimulatedJob

import sparsecomm as sc
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Kind

PS = Path(sc.ps.__file__).parent
BELOW = {
    "protocol": {"protocol"},
    "worker": {"worker", "protocol", "modes"},
    "server": {"server", "protocol", "modes"},
}


def test_the_table_names_every_kind_of_message() -> None:
    assert ms.__doc__ is not None
    rows = re.findall(r"^\| (\d+) ([A-Z]+) \|", ms.__doc__, re.MULTILINE)
    assert {name: int(number) for number, name in rows} == {kind.name: kind.value for kind in Kind}


def test_every_kind_of_message_is_handled() -> None:
    job = SimulatedJob(1, 1, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    worker = sc.ps.Worker(torch.nn.Linear(2, 2, dtype=torch.float32), link=job.links[0])
    handled = {*job.servers[0]._handlers, *worker._client.on_answer, Kind.REJECT}
    assert handled == set(Kind)


@pytest.mark.parametrize("part", BELOW)
def test_imports_inside_the_parameter_server_run_one_way(part: str) -> None:
    for path in (PS / part).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is not None and module.startswith("sparsecomm.ps."):
                assert module.split(".")[2] in BELOW[part], f"{path}:{node.lineno} imports {module}"
