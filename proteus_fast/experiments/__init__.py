"""Experiments: the paper's own, and those that a sceptic would ask for, each one command that writes what it found."""
