"""What things are called in Ray."""

import uuid

NAMESPACE = "syncbn"
_SUPERVISOR = "supervisor/"


def new_supervisor_name() -> str:
    """Return a name that no actor has had. Whose attempt it runs is written in the attempt's launch marker."""
    return f"{_SUPERVISOR}{uuid.uuid4().hex}"


def is_supervisor_name(name: str) -> bool:
    """Return whether an actor with this name supervises attempts."""
    return name.startswith(_SUPERVISOR)


def node_agent_name(node_id: str) -> str:
    """Return the name of the actor that owns a node's forkserver and its warm rank actors."""
    return f"node-agent/{node_id}"
