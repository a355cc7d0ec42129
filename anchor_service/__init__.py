"""The slow anchor: old snapshots and their replay in, dense gradient out, as a versioned correction."""
