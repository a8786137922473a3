"""From an outcome table to a checkpoint."""
