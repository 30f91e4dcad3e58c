"""A specification read from a document, and what is wrong with it in the words of its writer."""

from collections.abc import Mapping

from pydantic import ValidationError

from service.domain.errors import InvalidSpec
from service.domain.spec.job import JobSpec
from service.domain.spec.problems import field_problems


def parse_spec(data: object) -> JobSpec:
    """Check a specification read from YAML or JSON.

    Args:
        data: the parsed document.

    Raises:
        InvalidSpec: with one problem per field, each with its dotted path and what to do.
    """
    if not isinstance(data, Mapping):
        raise InvalidSpec("A job is a mapping of fields to values, such as `name: digits`.")
    try:
        return JobSpec.model_validate(dict(data))
    except ValidationError as error:
        raise InvalidSpec("The job cannot be run as written.", field_problems(error.errors())) from None
