"""Many runs: resumable sweeps, and studies that answer one question."""
