"""Compute kernels of distmuon and their plain torch twins, installed as ``distmuon.kernels``."""
