"""The command line: arguments to configs, results to stdout, errors to one line and an exit code."""
