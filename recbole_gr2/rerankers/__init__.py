"""Re-rankers. `base` has the interface, `registry` all built-in ones."""
