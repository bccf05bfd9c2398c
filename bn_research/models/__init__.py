"""Networks that are handed their norm layer."""
