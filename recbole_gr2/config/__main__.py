"""Prints docs/settings.md."""

from recbole_gr2.config.page import settings_page

print(settings_page(), end="")
