"""The user's model as an object: its modules, its inputs, a stand-in for it, its state."""
