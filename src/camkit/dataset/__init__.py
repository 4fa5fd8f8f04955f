"""A method over a whole data set."""
