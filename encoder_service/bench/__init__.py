"""`hashlens bench encode`: the encoder service beside a bare loop over the same model."""
