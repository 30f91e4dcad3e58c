from syncbn.kernels.backend import Backend, GradientSums
from syncbn.kernels.dispatch import backend_for

__all__ = ["Backend", "GradientSums", "backend_for"]
