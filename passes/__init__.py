"""Graph passes: sites, rows, plan, rewrite. Knows graphs, weights and rows; never models or files."""
