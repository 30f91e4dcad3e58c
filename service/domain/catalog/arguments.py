"""What every builtin factory's arguments have in common, and how factories that are not builtin are named."""

import re

from pydantic import BaseModel, ConfigDict

EXTERNAL_LIBRARY = re.compile(r"\A(?P<library>timm|torchvision):(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)\Z")
"""A model of a library that is installed beside the service, such as ``timm:resnet18``."""

EXTERNAL_FACTORY = re.compile(
    r"\A(?!(?:builtin|timm|torchvision):)"
    r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<attribute>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\Z",
    re.ASCII,
)
"""A function in the job's own code, such as ``package.module:function``."""


class FactoryArguments(BaseModel):
    """Arguments of a builtin factory; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
