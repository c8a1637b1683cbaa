"""Names of other libraries, pretrained sources, checkpoints."""
