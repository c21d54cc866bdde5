"""The JSON schema of a config file, for editors. `load_settings` checks more than it can say."""

from __future__ import annotations

from typing import Any

from pipelines.settings.sections import Settings

DIALECT = "https://json-schema.org/draft/2020-12/schema"
EXTENDS = {
    "type": "string",
    "description": "Name of another config file, relative to this one. This file then lists only "
    "what differs from it.",
}


def config_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a config file.

    No field is required, because a file that extends another may leave out any.
    """
    schema = Settings.model_json_schema()
    properties = {"extends": EXTENDS, **schema["properties"]}
    fields = {**schema, "title": "MANTiS config", "properties": properties}
    del fields["required"]
    del fields["$defs"]["DataConfig"]["required"]
    return {"$schema": DIALECT, **fields}
