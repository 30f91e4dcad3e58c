"""How messages name what there may be many of."""

from collections.abc import Sequence

_MAX_NAMES = 3


def first_of(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
