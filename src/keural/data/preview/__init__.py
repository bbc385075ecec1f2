"""Before a recipe: what a file holds, which adapter reads it, and what becomes of its rows; and what every adapter is."""
