"""Penstock: submit once, stream anywhere, lose nothing."""

__version__ = "0.1.0"
