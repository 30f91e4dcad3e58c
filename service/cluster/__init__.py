"""The only part that knows Ray: supervisors, gangs of rank actors, and the forkserver of each node."""
