"""JSON files of other programs: taken as they write them, within limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError
from lora_state_format.io.strict_json import check_size
from lora_state_format.model.sources import File

__all__ = ["read_json", "read_json_object"]

MAX_JSON: Final = 64 << 20
"""Bytes of a JSON file beside a checkpoint; the log in a ``trainer_state.json`` has some 100 a step."""


def read_json(path: Path) -> Any:
    """Return the value of a JSON file as others write it, so ``NaN`` and keys that occur twice are taken.

    Raises ``FileError``.
    """

    def fail(detail: str) -> FileError:
        return FileError(detail, path=path)

    with File(path) as file:
        if file.size > MAX_JSON:
            raise fail(f"JSON of {file.size} bytes, more than {MAX_JSON}")
        data = file.read(0, file.size)
    try:
        text = data.decode("utf-8-sig")
        check_size(text, fail)
        return json.loads(text)
    except FileError:
        raise
    except ValueError as error:
        raise fail(f"not JSON: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the members of a JSON file that holds one object. Raises ``FileError``."""
    members = read_json(path)
    if not isinstance(members, dict):
        raise FileError("not a JSON object", path=path)
    return members
