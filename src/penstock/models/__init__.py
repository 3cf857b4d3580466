"""Models by short name: which there are (`catalogue`), where they are here (`cache`), how they get here (`pull`)."""
