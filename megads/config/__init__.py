"""One typed configuration tree: JSON, command line and code see the same names. No torch here."""
