"""Helpers for arguments, nested outputs, random numbers and colour maps; they use nothing else of camkit."""
