"""What was measured, item by item: the records, and the files that keep them."""
