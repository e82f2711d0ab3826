"""Errors, the console, files, facts of the machine, measures of error: every room may use them. They know no room."""
