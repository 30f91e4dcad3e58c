"""The command line; ``service.cli.main.app`` is where it begins."""
