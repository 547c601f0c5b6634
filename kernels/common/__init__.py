"""What at least two ops use."""
