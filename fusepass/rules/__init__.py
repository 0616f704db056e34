"""The engine that peels layers off: terms (elements of expressions), rules about them, and their formulas."""
