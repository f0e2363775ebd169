"""What a run will need on chips that are not at hand: memory, traffic and time, before a start."""
