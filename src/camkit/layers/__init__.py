"""Finding the layer that a map is made at, by a dry run of the model."""
