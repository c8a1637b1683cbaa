"""What a reader sees: words, tables, figures, pages, TensorBoard."""
