"""The exchange of one bucket between all ranks. Read pipeline.py first."""

from sparsecomm.exchange.method import blank_header
from sparsecomm.exchange.pipeline import exchange, report_failure
from sparsecomm.exchange.plan import Plan

# Registers all methods. Last, since they import the modules above.
from sparsecomm.exchange import methods  # noqa: F401  isort: skip

__all__ = ["Plan", "blank_header", "exchange", "report_failure"]
