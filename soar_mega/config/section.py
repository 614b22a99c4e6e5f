"""What every section of the configuration has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

Text = Annotated[str, StringConstraints(min_length=1)]
# YAML gives lists; the frozen configuration keeps tuples.
Texts = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    """Immutable; refuses unknown keys, NaN and Inf; converts nothing but integers to floats."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def broken_rule(message: str, *keys: str) -> PydanticCustomError:
    """The error of a rule between several keys.

    Args:
        message: The settings, their values, the rule and the fix.
        keys: Full names (``section.key``) of the settings, so that the message to the user can say
            where each value came from.
    """
    return PydanticCustomError("rule", "{message}", {"message": message, "keys": list(keys)})
