"""Run GR2 on a data set: `python run_recbole_gr2.py --dataset amazon-beauty`. See README.md and `--help`."""

import sys

from recbole_gr2.quick_start import main

if __name__ == "__main__":
    sys.exit(main())
