"""What the pages of the documentation contain, for the tests that compare it with the package."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def logged_keys() -> set[str]:
    """The keys of log.json that docs/logged-metrics.md documents."""
    text = (ROOT / "docs" / "logged-metrics.md").read_text()
    start, end = text.index("## All stages"), text.index("## Other files")
    return set(re.findall(r"^\| `([^`]+)` \|", text[start:end], flags=re.MULTILINE))
