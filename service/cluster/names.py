"""What things are called in Ray."""

NAMESPACE = "syncbn"


def supervisor_name(job_id: str, attempt: int) -> str:
    """Return the name of the actor that owns an attempt."""
    return f"supervisor/{job_id}/{attempt}"


def parse_supervisor_name(name: str) -> tuple[str, int] | None:
    """Return job and attempt of a supervisor's name; None for other actors."""
    kind, _, rest = name.partition("/")
    job_id, _, attempt = rest.rpartition("/")
    return (job_id, int(attempt)) if kind == "supervisor" and attempt.isdecimal() else None


def node_agent_name(node_id: str) -> str:
    """Return the name of the actor that owns a node's forkserver."""
    return f"node-agent/{node_id}"
