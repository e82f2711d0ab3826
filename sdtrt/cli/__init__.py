"""The command line. Nothing is imported here: signals are listened to before anything else is loaded."""
