"""The engine process's own side: its loop, and what an engine implements."""
