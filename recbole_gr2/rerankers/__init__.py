"""Re-rankers that GR2 is compared with, on the same lists and the same evidence."""
