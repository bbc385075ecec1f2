"""Many answers at once on one network: slots that hold what was read, and a scheduler that shares the steps out."""
