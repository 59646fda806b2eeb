"""Command lines: each parses its flags, calls one function of the package, and reports."""
