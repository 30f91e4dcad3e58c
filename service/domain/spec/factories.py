"""Things that are built by name: models, datasets, augmentations."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator

from service.domain.catalog import DATASETS, MODELS, FactoryArguments
from service.domain.catalog.arguments import EXTERNAL_FACTORY, EXTERNAL_LIBRARY
from service.domain.catalog.augmentations import AUGMENTATIONS
from service.domain.spec.base import STORED, SpecModel, problem
from service.domain.spec.problems import field_problems

FactoryName = Annotated[str, Field(min_length=1, max_length=200)]
FactoryArgs = Annotated[dict[str, Any], Field(max_length=64)]


def _check_reference(reference: str) -> str:
    if not EXTERNAL_FACTORY.fullmatch(reference):
        raise problem("", f"{reference!r} names no function. Write it as package.module:function.")
    return reference


CodeReference = Annotated[
    str, Field(max_length=200, description="package.module:function"), AfterValidator(_check_reference)
]


class FactorySpec(SpecModel):
    """Something built by name with arguments."""

    factory: FactoryName
    args: FactoryArgs = Field(default_factory=dict)

    catalog: ClassVar[Mapping[str, type[FactoryArguments]]]
    libraries: ClassVar[bool] = False

    @model_validator(mode="after")
    def _known_factory_with_fitting_arguments(self, info: ValidationInfo) -> Self:
        if info.context is STORED:
            return self  # with the defaults of its time
        if EXTERNAL_FACTORY.fullmatch(self.factory) or (self.libraries and EXTERNAL_LIBRARY.fullmatch(self.factory)):
            return self  # only a rank can tell what it takes
        schema = self.catalog.get(self.factory)
        if schema is None:
            near = get_close_matches(self.factory, self.catalog, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            others = ", or package.module:function of your own code"
            if self.libraries:
                others = ", timm:NAME, torchvision:NAME" + others
            raise problem(
                "factory", f"unknown factory {self.factory!r}. {hint}Known: {', '.join(sorted(self.catalog))}{others}."
            )
        object.__setattr__(self, "args", fitting_arguments(schema, self.args, below="args"))
        return self


class ModelSpec(FactorySpec):
    """The network to train."""

    catalog = MODELS
    libraries = True


class DatasetSpec(FactorySpec):
    """The samples to train and evaluate on."""

    catalog = DATASETS


class AugmentationSpec(SpecModel):
    """A random change of each training sample; drawn from (seed, epoch, sample), so the same whoever draws it."""

    name: Annotated[str | None, Field(description="a builtin one; or give factory")] = None
    factory: Annotated[
        CodeReference | None, Field(description="called with args; returns function(sample, generator)")
    ] = None
    args: FactoryArgs = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known_with_fitting_arguments(self, info: ValidationInfo) -> Self:
        if info.context is STORED:
            return self
        if (self.name is None) == (self.factory is None):
            raise problem("name", "give either name or factory, and not both.")
        if self.name is None:
            return self
        schema = AUGMENTATIONS.get(self.name)
        if schema is None:
            raise problem("name", f"unknown augmentation {self.name!r}. Known: {', '.join(sorted(AUGMENTATIONS))}.")
        object.__setattr__(self, "args", fitting_arguments(schema, self.args, below="args"))
        return self


def fitting_arguments(schema: type[FactoryArguments], arguments: Mapping[str, Any], *, below: str) -> dict[str, Any]:
    """Check arguments, and write their defaults out.

    With the defaults written out, a later change of a default does not change a submitted job.

    Args:
        schema: of the factory.
        arguments: as given.
        below: path of the field that holds them.

    Raises:
        PydanticCustomError: the first that does not fit.
    """
    try:
        return schema.model_validate(dict(arguments)).model_dump(mode="json")
    except ValidationError as error:
        first = field_problems(error.errors())[0]
        raise problem(f"{below}.{first.field}" if first.field else below, first.message) from None
