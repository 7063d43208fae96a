"""The search service: codes and features in, nearest items out."""
