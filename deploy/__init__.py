"""The command line and its rooms: configs, estimates, the doctor, the probe, clusters, displays."""
