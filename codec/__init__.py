"""Compression of what crosses a slow link. Pure: torch and numpy, no Ray, no process groups."""
