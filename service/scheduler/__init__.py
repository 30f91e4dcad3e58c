"""The loop that starts what is queued and follows what runs."""
