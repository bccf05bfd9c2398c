"""One experiment a file; each answers one question about batch normalization."""
