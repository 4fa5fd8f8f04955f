"""A paper's Pokémon experiments with camkit: two CAM networks and one Grad-CAM, as one command.

The modules, in the order in which a run uses them:

- `pokemon_cam.creatures`: draws the built-in pictures, with the truth for every pixel.
- `pokemon_cam.photos`: reads a folder of photos.
- `pokemon_cam.pictures`: what both give, and how it is split into train and test.
- `pokemon_cam.networks`: the three networks, with published weights or from scratch.
- `pokemon_cam.training`: trains one and keeps its curves.
- `pokemon_cam.scoring`: tests whether the maps point at the creature.
- `pokemon_cam.report`: the table, the curves and the picture grids.
- `pokemon_cam.cli`: ``python -m pokemon_cam run``.
"""

__version__ = "0.1.0"
