"""Entry point of ``python -m pokemon_cam``."""

import sys

from pokemon_cam.cli import main

sys.exit(main())
