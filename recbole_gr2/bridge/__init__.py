"""The RecBole adapter: data sets, base models, and RecBole's evaluator."""
