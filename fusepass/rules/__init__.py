"""The engine that peels layers off: elements of expressions, rules about them, and their formulas."""
