"""The commands of `recbole-gr2`."""
