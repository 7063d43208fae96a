"""The encoder service: image bytes in, binary codes and F7 features out."""
