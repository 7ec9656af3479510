"""Features of candidates, computed from training interactions and item texts, and the prior that is fitted to them."""
