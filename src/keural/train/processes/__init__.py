"""One process or many: who is there, what is divided among them, and which mode runs where."""
