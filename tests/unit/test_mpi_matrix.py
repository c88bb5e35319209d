"""The runner of `make test-mpi` names wheels that it cannot install, and never counts a failure as a pass."""

from __future__ import annotations

from pathlib import Path

import mpi_matrix
import pytest

REPORT = """<testsuites><testsuite>
<testcase classname="tests.jobs.test_mpi_suite" name="test_the_mpi_suite_passes[1]">
  <properties><property name="passed" value="486"/></properties></testcase>
<testcase classname="tests.jobs.test_mpi_suite" name="test_the_mpi_suite_passes[2]"><failure>x</failure></testcase>
<testcase classname="tests.jobs.test_jobs" name="test_a"/>
<testcase classname="tests.jobs.test_jobs" name="test_b"><error>x</error></testcase>
<testcase classname="tests.jobs.test_jobs" name="test_c"><skipped/></testcase>
<testcase classname="tests.unit.test_doctor" name="test_d[n]"/>
<testcase classname="" name="pytest"><error>interrupted</error></testcase>
</testsuite></testsuites>"""


def test_the_table_counts_failures_errors_skips_and_what_never_ran(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert mpi_matrix.columns(report, [1, 2, 3], mpi_matrix.OTHERS) == {
        "n = 1": "486 passed",
        "n = 2": "FAILED 1, 0 passed",
        "n = 3": "FAILED: not run",
        "test_jobs": "FAILED 1, 1 passed",
        "test_doctor": "1 passed",
    }


def test_without_a_report_nothing_passed(tmp_path: Path) -> None:
    found = mpi_matrix.columns(tmp_path / "none.xml", [1], ["test_jobs"])
    assert found == {"n = 1": "FAILED: not run", "test_jobs": "FAILED: not run"}


def test_a_wheel_that_cannot_be_had_is_named_with_its_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "constraints.txt").write_text("mpich==999.9\n")
    monkeypatch.setattr(mpi_matrix, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert mpi_matrix.main(["--mpi", "mpich"]) == 1
    said = capsys.readouterr()
    assert "mpich cannot be tested: pip cannot install mpich==999.9" in said.err
    assert "not available" in said.out


@pytest.mark.parametrize("wheel", mpi_matrix.WHEELS)
def test_every_wheel_is_pinned(wheel: str) -> None:
    assert mpi_matrix.pinned(wheel).startswith(f"{wheel}==")
