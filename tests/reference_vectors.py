"""The reference vectors: inputs and outputs with eight decimals, computed apart from the project."""

import json
from pathlib import Path
from typing import Any

VECTORS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "vectors.json").read_text())
