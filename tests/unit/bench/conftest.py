"""The benchmarks are scripts beside each other, not a package: their folder is where they find one another."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "bench"))
