"""`hashlens inspect`: what a checkpoint is, and how healthy its codes, or a collection's, are."""
