"""The base of every configuration section, and the few field types that several sections share."""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """One section of the configuration: strict types, no unknown keys, immutable once read."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


MAX_INT = 2**63 - 1
"""What a 64-bit integer holds: of a greater number neither an array nor a seed could be made."""

PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]

Seconds = Annotated[float, Field(gt=0, le=1e9)]
"""A bound of a wait. The operating system's clocks count no further than a few hundred years."""

Temperature = Annotated[float, Field(ge=0.01, le=2)]
"""A sampling temperature. vLLM takes a lower one for 0.01 and refuses a higher one."""

Location = Annotated[str, Field(min_length=1)]
"""A path or a hub id; an empty one would be the working directory."""

DottedPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""A Python object as `package.module:name`."""


def _variable_name(name: str) -> str:
    # The value is not quoted: it may be the secret itself. Tokens have small letters or signs in them.
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError("this is the name of an environment variable, in capitals such as REWARD_TOKEN; no secret")
    return name


VariableName = Annotated[str, AfterValidator(_variable_name)]
"""The name of an environment variable that holds a secret."""


def _http_address(url: str) -> str:
    # The address is not quoted: what is wrong with it may be a password.
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # reading it checks it
    except ValueError:
        sound = False
    if not sound:
        raise ValueError("this is no http or https address with a host and, where there is one, a port")
    return url


HTTPAddress = Annotated[str, AfterValidator(_http_address)]
