"""`hashlens bench`: how fast the search side is, beside what a user would pick instead.

Every benchmark checks its answers before it prints a number, and times peers in the same process
run, in turn with ours. Ratios are what counts: machines are shared and noisy.
"""
