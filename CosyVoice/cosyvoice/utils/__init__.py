"""Helpers that the models, the data preparation and the command line share."""
