"""Row provenance: which request each row of a tensor belongs to."""
