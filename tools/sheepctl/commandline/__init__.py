"""What may be typed, and how it is explained: --help, shell completion, man pages."""
