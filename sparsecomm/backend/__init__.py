"""A backend of torch.distributed over this package's engine: `dist.init_process_group("sparsecomm")`.

docs/backend.md says what it can do. Below the process group (`process_group.py`, `group.py`) are generators over the
engine's channels (`moves.py`, `sums.py`), the operations (`reduction.py`), tags that keep groups apart (`tags.py`), and
torch's handles of what is in progress (`work.py`).
"""

from sparsecomm.backend.register import NAME, register

__all__ = ["NAME", "register"]
