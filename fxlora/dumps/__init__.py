"""Graph dumps: text, data and pictures of a graph before and after the rewrite. See `fxlora.dumps.dump`."""
