"""Measurements on any apply or loss function; they know no model and no training loop."""
