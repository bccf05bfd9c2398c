"""Training: pure steps over an apply function, and the loop around them; knows no model."""
