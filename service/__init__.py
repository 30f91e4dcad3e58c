"""The training service: REST API, scheduler, Ray execution, training loop, client and command line."""
