"""What lies on the disk: runs, sweeps, locks, weights. No torch."""
