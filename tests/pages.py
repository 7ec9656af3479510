"""What the pages of the documentation contain, for the tests that compare it with the package."""

import importlib.util
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def logged_keys() -> set[str]:
    """The keys of log.json that docs/logged-metrics.md documents."""
    text = (ROOT / "docs" / "logged-metrics.md").read_text()
    start, end = text.index("## All stages"), text.index("## Other files")
    return set(re.findall(r"^\| `([^`]+)` \|", text[start:end], flags=re.MULTILINE))


def site_builder() -> Any:
    """The module docs/build_site.py."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
