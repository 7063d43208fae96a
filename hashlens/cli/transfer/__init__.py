"""Items as files of others: NumPy's .npz, and Arrow's .parquet and .arrow."""
