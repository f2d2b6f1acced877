"""What every section of a spec is made of."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from interv.spec.conditions import KEY, in_words


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are never coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    bare: ClassVar[tuple[str, ...]] = ()
    """Fields for which a bare value may stand in the section's place."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        found = handler(schema)
        section = handler.resolve_ref_schema(found)
        for name, field in cls.model_fields.items():
            own = section["properties"][name]
            if own.pop(KEY, None) is not None:
                first = f"{own['description']}; " if "description" in own else ""
                own["description"] = f"{first}only with {in_words(field)}"
        if cls.bare:
            whole = dict(section)
            about = {"description": whole.pop("description")}
            fields = [whole["properties"][name] for name in cls.bare]
            forms = [form for field in fields for form in field.get("anyOf", [field])]
            section.clear()
            section |= {
                **about,
                "anyOf": [*(form for form in forms if form.get("type") != "null"), whole],
            }
        return found


def wrong(message: str, expected: str) -> PydanticCustomError:
    """What a validator raises: the message, and what was expected."""
    # Braces would be read as template fields.
    return PydanticCustomError("interv", "{message}", {"message": message, "expected": expected})


def one_or_list(value: Any) -> Any:
    """The value as a list."""
    return value if isinstance(value, list) else [value]


class _OrOne:
    """Of a list: a single entry stands for a list of it, for the program and for editors."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(one_or_list, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        listed = handler(schema)
        return {"anyOf": [listed["items"], listed]}


OR_ONE = _OrOne()
"""The last of a list's annotations, where one entry may be written without the list."""
