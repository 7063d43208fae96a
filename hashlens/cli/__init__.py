"""The `hashlens` command. It starts the services as processes and talks to them by the client."""
