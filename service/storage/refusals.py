"""What object stores say when they do not do what was asked, in the errors of this service.

Each has exceptions of its own, some of them no ``OSError``. Here they become one of three: ``NotFound``,
``StorageError`` where a person has to change something, and ``OSError`` where trying again may help.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from service.domain.errors import NotFound, StorageError

_NO_BUCKET = frozenset({"NoSuchBucket"})
_EXISTS = frozenset({"PreconditionFailed", "412"})  # some name no condition, by which fsspec would know it
_BEYOND_END = frozenset({"InvalidRange", "416"})
_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError"}
)
# Of the libraries behind fsspec; importing them to name their exceptions would cost those who use none.
_LIBRARIES = ("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google")


@contextmanager
def refusals_of(url: str, path: str) -> Iterator[None]:
    """Translate what a file system raises meanwhile.

    Args:
        url: of run storage, without secrets.
        path: the file, below it.

    Raises:
        NotFound: no such file.
        StorageError: no such bucket, or access is denied; the message names the remedy.
        FileExistsError: a file that was to be created is there already.
        OSError: anything else of the storage or of the way to it.
    """
    try:
        yield
    except FileNotFoundError as error:
        if _code(error) in _NO_BUCKET:
            raise StorageError(
                f"Run storage {url} does not exist: {error}. Create the bucket, or correct the URL."
            ) from error
        raise NotFound(f"Run storage has no file {path}.") from error
    except PermissionError as error:
        raise StorageError(
            f"Run storage {url} denies access to {path}: {error}. Give the credentials in the environment of the "
            "service and of its nodes the right to list, read, write and delete there."
        ) from error
    except FileExistsError:
        raise
    except OSError as error:
        if _code(error) in _EXISTS:
            raise FileExistsError(errno.EEXIST, "exists already", path) from error
        raise
    except Exception as error:
        name = type(error).__name__
        if name in _CREDENTIALS:
            raise StorageError(
                f"Run storage {url} cannot be used without credentials: {error}. Put them into the environment of the "
                "service and of its nodes (for s3://: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
            ) from error
        if type(error).__module__.startswith(_LIBRARIES):
            raise OSError(errno.EIO, f"run storage {url} does not answer: {name}: {error}") from error
        raise


def is_beyond_the_end(error: OSError) -> bool:
    """Whether a range was asked for that begins where the file has ended."""
    return _code(error) in _BEYOND_END


def _code(error: BaseException) -> str:
    """Return the code in the response that an error was made of; empty if there is none."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) and "Error" in response else ""
