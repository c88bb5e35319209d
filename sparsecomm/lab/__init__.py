"""Several hosts on one Linux machine: network namespaces joined by links of a given rate, and mpirun across them."""

from sparsecomm.errors import LabError
from sparsecomm.lab.lab import Lab
from sparsecomm.lab.requirements import missing
from sparsecomm.lab.survey import LabStatus, survey

__all__ = ["Lab", "LabError", "LabStatus", "missing", "survey"]
