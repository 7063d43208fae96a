"""`hashlens top`: what both services do at this moment."""
