"""For those who write compressors of their own: `check_compressor` finds what would break a training run."""

from sparsecomm.testing.contract import ContractError, check_compressor

__all__ = ["ContractError", "check_compressor"]
