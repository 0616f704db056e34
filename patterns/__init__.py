"""All knowledge of how attention is spelled, one aspect a file, as rules over expressions."""
