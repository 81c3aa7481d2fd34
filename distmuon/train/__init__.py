"""The training system: model, data, loop and report."""
