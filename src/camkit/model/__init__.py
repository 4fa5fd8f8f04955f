"""The user's model: its modules, its inputs, a stand-in for it, and the state to restore after a call."""
