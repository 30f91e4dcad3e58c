from syncbn.kernels.dispatch import Backend, backend_for

__all__ = ["Backend", "backend_for"]
