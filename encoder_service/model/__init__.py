"""The network, its backbones and the file it is kept in."""
