"""Arms, recipes and cells: what is run and recorded."""
