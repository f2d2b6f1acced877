"""`interv schema`: the JSON Schema of specs, for editors."""

from __future__ import annotations

import json
from typing import Any

import typer

EPILOG = "A spec names it in its first line: # yaml-language-server: $schema=schema.json"


def schema() -> None:
    """Print the JSON Schema of specs."""
    typer.echo(json.dumps(json_schema(), indent=1))


def json_schema() -> dict[str, Any]:
    """Schema of a file: a spec as validated, but `extends` is allowed and fields may be short.

    A file that extends another need not have every section, so none is required but `kind`
    of a file by itself.
    """
    from interv.spec.schema import TraceSpec

    document = TraceSpec.model_json_schema()
    properties = document["properties"]
    properties["extends"] = {"type": "string", "description": "a spec that this one is laid over"}
    bare = {"type": "string", "description": "smollm2-135m, a hub name, or a path from here"}
    properties["model"] = {"anyOf": [bare, properties["model"]]}
    for key in ("grid", "metric"):
        properties[key] = {"anyOf": [properties[key]["items"], properties[key]]}
    component = document["$defs"]["TraceGrid"]["properties"]["component"]
    document["$defs"]["TraceGrid"]["properties"]["component"] = {
        "anyOf": [component["items"], component]
    }
    # `name` is the file's own where it is not given.
    needed = [key for key in document.pop("required") if key != "name"]
    document["anyOf"] = [{"required": needed}, {"required": ["extends"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}
