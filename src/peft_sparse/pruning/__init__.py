"""From weights and statistics to zeros."""
