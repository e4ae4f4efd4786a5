"""Search sessions: on disk, as prompts, and from the embedded generator."""
