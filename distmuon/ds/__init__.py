"""The DeepSpeed plug-in; only this package and distmuon.train import deepspeed."""
