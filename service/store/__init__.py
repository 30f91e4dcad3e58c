"""The job database: SQLite or PostgreSQL behind the domain's ports."""

from service.store.migration import migrate
from service.store.store import SqlStore

__all__ = ["SqlStore", "migrate"]
