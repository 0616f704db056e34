"""The steps of docs/recipes, walked with toys."""
