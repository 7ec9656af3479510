"""recbole-gr2: Generative Reasoning Re-ranker (GR2, arXiv 2602.07774) as a RecBole plugin."""

__version__ = "0.1.0"
