"""Training scripts, one thin script a method: python -m train.NAME --help."""
