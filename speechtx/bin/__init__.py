"""Command line: one module a verb, thin: parse flags, call one function, map errors to exit codes."""
