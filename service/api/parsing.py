"""Bodies as models."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from service.api.body import Document
from service.api.problems import REQUEST_INVALID, Refused
from service.domain.spec import field_problems

Body = TypeVar("Body", bound=BaseModel)


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return what the schema of the API says of a body that ``parse`` reads; its parts are answered as well."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def parse(model: type[Body], document: Document) -> Body:
    """Read a body. Raises ``Refused``."""
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        problems = field_problems(error.errors())
        raise Refused(REQUEST_INVALID, "The request cannot be answered as written.", problems) from None
