"""What run.py does: its options, and what it does with them."""
