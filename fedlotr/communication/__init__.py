"""What crosses between server and clients, and what it costs."""

from fedlotr.communication.ledger import Entry, communication_summary, read_ledger, write_part

__all__ = ["Entry", "communication_summary", "read_ledger", "write_part"]
