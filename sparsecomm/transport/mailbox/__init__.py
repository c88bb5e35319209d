"""Messages of unknown length from any rank, and memory that other ranks read, for the parameter server."""

from sparsecomm.transport.mailbox.base import Mailbox

__all__ = ["Mailbox"]
