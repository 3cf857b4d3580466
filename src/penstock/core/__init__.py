"""The vocabulary of Penstock: no I/O, no third-party package but msgspec."""
