"""The fast swarm. Start with `swarm/tick.py`."""
