"""Finding the layer at which a map is made, by a dry run of the model."""
