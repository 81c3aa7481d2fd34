"""Where results and pictures go: the checkout, or the working directory of who runs an installed package."""

from __future__ import annotations

from pathlib import Path

# distmuon/benchmarks is a link in a checkout.
_ABOVE = Path(__file__).resolve().parent.parent
ROOT = _ABOVE if (_ABOVE / "setup.py").is_file() else Path.cwd()
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"


def write(path: Path, text: str) -> None:
    """Write a text file, with the folders it needs.

    Args:
        path: the file.
        text: what it shall hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
