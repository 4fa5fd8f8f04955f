"""Backward passes: gradients of several scores, and rules that take the place of gradients."""
