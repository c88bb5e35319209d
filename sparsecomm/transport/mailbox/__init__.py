"""Messages of unknown length from anyone, and memory that others read: for the parameter server."""

from sparsecomm.transport.mailbox.base import Mailbox

__all__ = ["Mailbox"]
