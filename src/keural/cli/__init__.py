"""The `keural` command: one module per group of subcommands, and what they print."""
