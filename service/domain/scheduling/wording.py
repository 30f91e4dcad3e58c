"""Why a job waits, in words that stay the same for as long as possible: each change of them is a write to the store."""

from service.domain.scheduling.pending import Pending

# Up to here a place in line is told exactly, and what is free; those further behind would be rewritten at each start.
EXACT_PLACES = 10

_MINUTES = (1, 2, 3, 5, 10, 15, 20, 30, 45)
_HOURS = (1, 2, 3, 4, 6, 8, 12, 18)
_DAYS = (1, 2, 3, 5, 7, 10, 14, 21, 30)


def ordinal(place: int) -> str:
    """Write a place, of the first few."""
    return f"{place}{_ENDINGS.get(place, 'th')}"


_ENDINGS = {1: "st", 2: "nd", 3: "rd"}


def far_behind(position: int, queue: str) -> tuple[str, int]:
    """Write a place behind the first few, in steps; and return the last place that is told the same."""
    power = EXACT_PLACES
    while power * 10 < position:
        power *= 10
    ahead = max(power * factor for factor in (1, 2, 5) if power * factor < position)
    until = min(power * factor for factor in (2, 5, 10) if power * factor >= position)
    return f"More than {ahead} jobs are ahead of it in queue {queue}.", until


def about(seconds: float) -> str:
    """Write a time to come, rounded up to a few steps."""
    if seconds <= 30:
        return "soon"
    for steps, unit_s, unit in ((_MINUTES, 60.0, "min"), (_HOURS, 3600.0, "h"), (_DAYS, 86400.0, "days")):
        for step in steps:
            if seconds <= step * unit_s:
                return f"about {step} {unit}" if (step, unit) != (1, "days") else "about a day"
    return "more than a month"


def need(job: Pending, num_free: int) -> str:
    """Write what has to fit at once and how much of it does."""
    at_least = "at least " if job.is_elastic else ""
    return f"Needs {at_least}{job.fewest} × ({job.per_rank}) at once; {num_free} free"
