"""recbole-gr2: the Generative Reasoning Re-ranker (GR2, arXiv 2602.07774) as a plugin for RecBole."""

__version__ = "0.1.0"
