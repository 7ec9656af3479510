"""Checks that the addresses in the README, the documentation and the results can be reached: `make links`.

The program needs the network and is no part of the tests. It prints each address that fails with its pages.
"""

from __future__ import annotations

import re
import sys
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "docs/*.md", "results/*.md")
ADDRESS = re.compile(r"https?://[^\s<>()\[\]`\"'|]+")
LOCAL = re.compile(r"https?://(localhost|127\.0\.0\.1|[^/]*example\.)")  # addresses of examples
TIMEOUT = 20  # seconds


def addresses(pages: Iterable[Path]) -> dict[str, list[str]]:
    """Return the addresses in pages, with the names of the pages that contain each of them."""
    found: dict[str, list[str]] = {}
    for page in pages:
        for address in dict.fromkeys(ADDRESS.findall(page.read_text(encoding="utf-8"))):
            address = address.rstrip(".,;:*")
            if not LOCAL.match(address):
                found.setdefault(address, []).append(page.name)
    return found


def problem(address: str) -> str:
    """Return the reason why an address cannot be reached, or "". A server that refuses HEAD gets a GET request."""
    reason = ""
    for method in ("HEAD", "GET"):
        request = urllib.request.Request(address, method=method, headers={"User-Agent": "Mozilla/5.0 (link check)"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT):
                return ""
        except (OSError, ValueError) as error:  # HTTPError and URLError are OSErrors
            reason = str(error)
    return reason


def main() -> int:
    """Check all addresses and return the exit code."""
    found = addresses(page for pattern in PAGES for page in sorted(ROOT.glob(pattern)))
    with ThreadPoolExecutor(8) as pool:
        problems = dict(zip(found, pool.map(problem, found), strict=True))
    failed = {address: reason for address, reason in problems.items() if reason}
    for address, reason in failed.items():
        print(f"{address}: {reason} ({', '.join(found[address])})", file=sys.stderr)
    print(f"{len(found)} addresses, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
