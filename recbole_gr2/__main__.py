"""`python -m recbole_gr2` is the command `recbole-gr2`."""

import sys

from recbole_gr2.commands import main

if __name__ == "__main__":
    sys.exit(main())
