"""Write nativesd/parameters.json.gz: the names and shapes of the published models' parameters.

python tools/parameters.py
"""

from __future__ import annotations

import gzip
import json

from nativesd.models.build import expected
from nativesd.shipped import PARAMETERS
from nativesd.weights.maps.parameters import published


def main() -> None:
    """Write the file."""
    kept = {name: expected(config) for name, config in published().items()}
    PARAMETERS.write_bytes(gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), mtime=0))


if __name__ == "__main__":
    main()
