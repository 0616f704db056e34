"""All knowledge of how attention is spelled, as rules over expressions: one aspect per file."""
