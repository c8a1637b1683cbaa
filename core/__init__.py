"""A Vision Transformer as pure functions, and the training optimizations as transforms of it."""
