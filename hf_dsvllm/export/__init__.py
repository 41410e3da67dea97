"""A trained model as one folder that is proven equal to what was trained: `make` does it, the others are its steps."""
