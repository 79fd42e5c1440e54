"""The report's sections of a self-evolution run."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath


def read(root: epath.Path) -> dict[str, Any]:
    path = root / "evolution.json"
    return json.loads(path.read_text()) if path.exists() else {}


def sections(record: Mapping[str, Any], pictures: Any) -> dict[str, str]:
    return {}
