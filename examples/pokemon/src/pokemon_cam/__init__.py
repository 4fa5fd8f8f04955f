"""The experiments of a paper on Pokémon: two CAM networks and one Grad-CAM network, with camkit.

The modules, in the order in which a run uses them:

- `pokemon_cam.cli`: the command line, ``python -m pokemon_cam run``.
- `pokemon_cam.creatures`: draws the built-in data set, with a mask for every picture.
- `pokemon_cam.kinds`: the shapes of the seven kinds of creatures.
- `pokemon_cam.drawing`: the outlines and colours from which the shapes are made.
- `pokemon_cam.photos`: reads a folder of photos instead.
- `pokemon_cam.pictures`: the labelled picture set that both return, and its split.
- `pokemon_cam.networks`: the three networks, with published weights or as small relatives.
- `pokemon_cam.weights`: downloads or reads the published weights.
- `pokemon_cam.recipes`: the training recipes.
- `pokemon_cam.training`: trains a network and records its scores.
- `pokemon_cam.scoring`: measures how often a map points at the creature.
- `pokemon_cam.report`: writes the tables, the curves and the picture grids.
- `pokemon_cam.progress`: the progress bar of every stage.
"""

__version__ = "0.1.0"
