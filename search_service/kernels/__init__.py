"""The inner loops: pure functions, arrays in, results written into given arrays."""
