"""`check_compressor` for authors of compressors: it finds bugs that would break a training run."""

from sparsecomm.testing.contract import ContractError, check_compressor

__all__ = ["ContractError", "check_compressor"]
