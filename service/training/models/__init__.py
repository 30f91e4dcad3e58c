"""The networks."""

from service.training.models.builders import build_model

__all__ = ["build_model"]
