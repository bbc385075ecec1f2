"""Files to rows: formats, encodings, archives, hubs."""
