"""Generated images against a reference: features, statistics, metrics, sweeps."""
