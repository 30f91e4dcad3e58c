"""The Python client; ``service.client.client.Client`` is where to begin."""
