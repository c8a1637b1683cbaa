"""From cells to estimates: numbers in, numbers out."""
