"""Labelled images: where they are, how they become pixels, how they are split and augmented."""
