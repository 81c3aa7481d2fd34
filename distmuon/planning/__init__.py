"""``distmuon plan``: what a model's placement costs, before it is trained."""
