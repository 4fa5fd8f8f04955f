"""Runs the command line: ``python -m pokemon_cam run``."""

import sys

from pokemon_cam.cli import main

sys.exit(main())
