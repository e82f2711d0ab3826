"""What builds and runs engines: one folder for each backend, and what they share."""
