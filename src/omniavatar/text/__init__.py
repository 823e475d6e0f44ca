"""Text from outside: `reading` checks the files it comes in, `showing` prepares it for terminals and logs."""
