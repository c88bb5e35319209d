"""Several hosts on one Linux machine: network namespaces, links of a given rate between them, and mpirun on top."""

from sparsecomm.errors import LabError
from sparsecomm.tools.lab.lab import Lab
from sparsecomm.tools.lab.requirements import missing
from sparsecomm.tools.lab.survey import LabStatus, survey

__all__ = ["Lab", "LabError", "LabStatus", "missing", "survey"]
