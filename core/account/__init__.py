"""What a step costs before it runs: FLOPs, bytes, graphs."""
