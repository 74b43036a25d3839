"""Small modules whose rows are known, for the row prover and the forms of a graph."""

from __future__ import annotations
