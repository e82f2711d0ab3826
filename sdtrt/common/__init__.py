"""What every room may use: errors, the console, files, facts of the machine, measures of error."""
