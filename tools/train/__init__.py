"""Trains *millrace*, the small model that ships inside Penstock, from nothing."""
