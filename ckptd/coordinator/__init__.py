"""The coordinator: it decides, and is never on the path of a byte of state."""
