"""Commands of the command line `recbole-gr2`."""
