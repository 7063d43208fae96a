"""Learning the codes: data sets, the training loop, what it is measured by."""
