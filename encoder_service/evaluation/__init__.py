"""What codes are worth: protocols, rankings, baselines, reports."""
