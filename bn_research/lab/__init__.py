"""The machinery of an experiment: it knows no question."""
