from syncbn.kernels.backend import Backend, GradientSums, Meetings
from syncbn.kernels.dispatch import backend_for

__all__ = ["Backend", "GradientSums", "Meetings", "backend_for"]
