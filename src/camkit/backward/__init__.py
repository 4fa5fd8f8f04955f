"""Backward passes: gradients, and rules in the place of gradients."""
