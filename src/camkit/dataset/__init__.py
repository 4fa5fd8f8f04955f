"""Explaining a whole data set with one method."""
