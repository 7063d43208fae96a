"""Backups: `hashlens backup` and `hashlens restore`.

A manifest describes a prefix of append-only files, so a backup needs neither the lock of the data
directory nor the service that works in it: it takes the files as far as the last checkpoint's
manifest says. `docs/format.md` describes what it leaves.
"""
