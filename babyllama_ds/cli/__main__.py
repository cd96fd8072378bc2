"""`python -m babyllama_ds.cli`: the same as `babyllama-ds`."""

import sys

from babyllama_ds.cli import main

sys.exit(main())
