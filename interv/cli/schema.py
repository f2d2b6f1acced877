"""`interv schema`: the JSON Schema of specs, for editors."""

from __future__ import annotations

import json
from typing import Any

from interv.cli.output import out

EPILOG = "A spec names it in its first line: # yaml-language-server: $schema=schema.json"


def schema() -> None:
    """Print the JSON Schema of specs."""
    out(json.dumps(json_schema(), indent=1))


def json_schema() -> dict[str, Any]:
    """Schema of a file: a spec as validated, but `extends` is allowed and fields may be short.

    A file that extends another need not have every section, so none is required but `kind`
    of a file by itself.
    """
    from interv.spec.kinds import KINDS

    documents = {kind: cls.model_json_schema() for kind, cls in KINDS.items()}
    definitions: dict[str, Any] = {}
    cases = []
    for kind, document in documents.items():
        definitions |= document.pop("$defs")
        _allow_short_forms(document)
        # `name` is the file's own where it is not given.
        needed = [key for key in document.pop("required") if key != "name"]
        document["anyOf"] = [{"required": needed}, {"required": ["extends"]}]
        cases.append({"if": {"properties": {"kind": {"const": kind}}}, "then": document})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "a spec of interv",
        "type": "object",
        "properties": {"kind": {"enum": list(KINDS)}},
        "allOf": cases,
        "$defs": definitions,
    }


def _allow_short_forms(document: dict[str, Any]) -> None:
    properties = document["properties"]
    properties["extends"] = {"type": "string", "description": "a spec that this one is laid over"}
    bare = {"type": "string", "description": "smollm2-135m, a hub name, or a path from here"}
    properties["model"] = {"anyOf": [bare, properties["model"]]}
    if "decompose" in properties:
        properties["decompose"]["anyOf"].append({"const": True})
